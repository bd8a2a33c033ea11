"""How well confidences match outcomes: calibration errors, what noise makes of them, and curves.

This module knows no model and no logits: confidences and whether they were right are all it reads.
Sums are float64, logs natural.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

CONFIDENT = 1.959963984540054  # standard deviations of a two-sided 95 % interval
_LEAST_RESAMPLED_GROUPS, _MOST_RESAMPLED_GROUPS = 8, 2000
_CURVE_POINTS = 200


@dataclass(frozen=True)
class Bin:
    """The tokens whose confidence is in (low, high]; the first bin holds 0 too.

    Attributes:
        count: how many.
        confidence, accuracy: their means; None in an empty bin.
        interval: Wilson's 95 % of the accuracy; None in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class CalibrationReport:
    """How well confidences match outcomes. What needs more than confidences may be None.

    Attributes:
        n_tokens: N.
        accuracy, confidence: means.
        ece: sum_m n_m / N |accuracy_m - confidence_m| over equal bins of confidence.
        ece_floor, ece_floor_sd: mean and standard deviation of the ece of a perfect model with
            these very confidences: what noise alone makes of it. They hold for text, because under
            a perfect model the errors of successive tokens are uncorrelated.
        ece_interval: 95 % for the calibration error of these bins without its noise; it begins at
            0 where the ece may be noise alone.
        adaptive_ece: ece over bins of equal counts (Nixon et al. 2019).
        mce, rmsce: the largest gap of a bin, and the root of the mean squared gap.
        brier_top: mean of (confidence - correct)^2, in [0, 1].
        reliability, resolution, uncertainty: Murphy's parts of it over the bins; reliability -
            resolution + uncertainty is brier_top where each bin holds one value.
        brier: mean of sum_k (p_k - [k is right])^2 over all classes, in [0, 2].
        nll: mean, in nats. entropy: mean of the predictions' entropy, in nats.
        entropy_gap: entropy - nll; negative for an over-confident model.
        auroc: probability that a right token is more confident than a wrong one, ties counting
            half; None where all are right or all wrong.
        aurc: mean error rate over all coverages, the most confident first.
        risk_coverage: points (coverage, error rate) of that curve.
        bins: the reliability diagram.
    Source: Guo et al. 2017 (arXiv:1706.04599) for ece, mce and bins closed on the right; Murphy
        1973, A new vector partition of the probability score; Geifman and El-Yaniv 2017
        (arXiv:1705.08500) for risk and coverage; Wilson 1927.
    """

    n_tokens: int
    accuracy: float
    confidence: float
    ece: float
    ece_floor: float
    ece_floor_sd: float
    ece_interval: tuple[float, float]
    adaptive_ece: float
    mce: float
    rmsce: float
    brier_top: float
    reliability: float
    resolution: float
    uncertainty: float
    brier: float | None
    nll: float | None
    entropy: float | None
    auroc: float | None
    aurc: float
    risk_coverage: tuple[tuple[float, float], ...]
    bins: tuple[Bin, ...]

    @property
    def entropy_gap(self) -> float | None:
        if self.entropy is None or self.nll is None:
            return None
        return self.entropy - self.nll

    @property
    def ece_z(self) -> float:
        """By how many standard deviations the ece exceeds what noise alone makes."""
        excess = self.ece - self.ece_floor
        if self.ece_floor_sd > 0:
            return excess / self.ece_floor_sd
        return 0.0 if self.ece < 1e-12 else math.inf

    @property
    def is_consistent(self) -> bool:
        """Whether a perfect model could show this ece: less than three deviations above."""
        return self.ece_z < 3

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values, infinities and the like as None."""
        content = dataclasses.asdict(self)
        content |= {"entropy_gap": self.entropy_gap, "ece_z": self.ece_z}
        return {**_finite(content), "is_consistent": self.is_consistent}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def calibration_report(
    confidence: torch.Tensor,
    correct: torch.Tensor,
    n_bins: int = 15,
    *,
    groups: torch.Tensor | None = None,
    nll: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    brier: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> CalibrationReport:
    """Compare confidences with outcomes.

    Args:
        confidence: (N,) probabilities that the predictions are right; or (N, V) probabilities of
            all classes, whose largest is the confidence.
        correct: (N,) whether they were right; or, beside (N, V), the labels.
        n_bins: bins of equal width, closed on the right.
        groups: (N,) numbers from 0 of tokens that may depend on each other, for the interval.
        nll, entropy: (N,) nats of each token; taken from (N, V) where that is given.
        brier: the mean over all classes; taken from (N, V) where that is given.
        resamples, seed: of the bootstrap by groups, merged to 2,000 of them at most.
    Raises: ValueError where there are no tokens, shapes disagree or a probability is outside
        [0, 1] (logits are never taken for probabilities).
    """
    if n_bins < 1:
        raise ValueError(f"there must be a bin at least, not {n_bins}")
    if confidence.dim() == 2:
        confidence, correct, nll, entropy, brier = _of_all_classes(confidence, correct)
    if confidence.dim() != 1 or confidence.shape != correct.shape:
        raise ValueError(
            f"confidence {tuple(confidence.shape)} must be (N,), or (N, V) probabilities, and "
            f"the outcomes {tuple(correct.shape)} (N,)"
        )
    if not len(confidence):
        raise ValueError("there are no tokens to report on")
    c = _exact(confidence)
    y = _exact(correct)
    if not bool(((c >= 0) & (c <= 1)).all()):
        raise ValueError(
            "confidences are probabilities in [0, 1]; give softmax(logits), not logits"
        )
    if not bool(((y == 0) | (y == 1)).all()):
        raise ValueError("correct must be True and False, or 1 and 0")
    count = len(c)
    edges = torch.arange(n_bins + 1, dtype=torch.float64) / n_bins
    at = torch.bucketize(c, edges[1:-1])  # edges[at] < c <= edges[at + 1]
    sizes = torch.bincount(at, minlength=n_bins).to(torch.float64)
    filled = sizes.clamp_min(1)
    conf = torch.bincount(at, weights=c, minlength=n_bins) / filled
    acc = torch.bincount(at, weights=y, minlength=n_bins) / filled
    gaps, share = (acc - conf).abs(), sizes / count
    # Under a perfect model a bin's sum of (correct - confidence) is near normal with this variance.
    noise = torch.bincount(at, weights=c * (1 - c), minlength=n_bins)
    base = float(y.mean())
    ece = float((share * gaps).sum())
    return CalibrationReport(
        n_tokens=count,
        accuracy=base,
        confidence=float(c.mean()),
        ece=ece,
        ece_floor=math.sqrt(2 / math.pi) * float(noise.sqrt().sum()) / count,
        ece_floor_sd=math.sqrt((1 - 2 / math.pi) * float(noise.sum())) / count,
        ece_interval=_ece_interval(at, y - c, ece, n_bins, groups, resamples, seed),
        adaptive_ece=_adaptive_ece(c, y, n_bins),
        mce=float(gaps[sizes > 0].max()),
        rmsce=math.sqrt(float((share * gaps.square()).sum())),
        brier_top=float((c - y).square().mean()),
        reliability=float((share * gaps.square()).sum()),
        resolution=float((share * (acc - base).square()).sum()),
        uncertainty=base * (1 - base),
        brier=brier,
        nll=None if nll is None else float(_exact(nll).mean()),
        entropy=None if entropy is None else float(_exact(entropy).mean()),
        auroc=_auroc(c, y),
        **_risk(c, y),
        bins=tuple(
            Bin(
                edges[m].item(),
                edges[m + 1].item(),
                int(sizes[m]),
                float(conf[m]) if sizes[m] else None,
                float(acc[m]) if sizes[m] else None,
                wilson_interval(float(acc[m]), int(sizes[m])) if sizes[m] else None,
            )
            for m in range(n_bins)
        ),
    )


def _exact(values: torch.Tensor) -> torch.Tensor:
    return values.detach().cpu().to(torch.float64)


def _of_all_classes(
    probabilities: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Confidence, correctness, NLL and entropy of every token, and the mean Brier score."""
    check_shapes(probabilities, labels, None)
    p = _exact(probabilities)
    if not len(p):
        raise ValueError("there are no tokens to report on")
    if not bool(((p >= 0) & (p <= 1)).all()) or float((p.sum(1) - 1).abs().max()) > 1e-3:
        raise ValueError("rows of probabilities are in [0, 1] and sum to 1; give softmax(logits)")
    chosen = labels.cpu().to(torch.int64)
    if int(chosen.min()) < 0 or int(chosen.max()) >= p.shape[1]:
        raise ValueError(f"the labels must be in [0, {p.shape[1]})")
    of_label = p.gather(1, chosen[:, None])[:, 0]
    confidence, top = p.max(1)
    brier = float((p.square().sum(1) - 2 * of_label + 1).mean())
    return confidence, top == chosen, -of_label.log(), torch.special.entr(p).sum(1), brier


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % for the probability behind `share` of `count` independent outcomes.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    z2 = CONFIDENT**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = math.sqrt(share * (1 - share) * z2 / count + (z2 / (2 * count)) ** 2) / (1 + z2 / count)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _adaptive_ece(c: torch.Tensor, y: torch.Tensor, n_bins: int) -> float:
    """Over bins of equal counts: the pieces of the tokens in the order of their confidence."""
    order = c.argsort(stable=True)
    excess = (y - c)[order]
    pieces = torch.tensor_split(excess, min(n_bins, len(c)))
    return sum(abs(float(piece.sum())) for piece in pieces) / len(c)


def _auroc(c: torch.Tensor, y: torch.Tensor) -> float | None:
    """Mann and Whitney's statistic with midranks."""
    right = float(y.sum())
    wrong = len(y) - right
    if not right or not wrong:
        return None
    _, place, sizes = torch.unique(c, return_inverse=True, return_counts=True)
    midranks = sizes.cumsum(0) - 0.5 * (sizes - 1)
    return (float((midranks[place] * y).sum()) - right * (right + 1) / 2) / (right * wrong)


def _risk(c: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Error rates among the most confident k of N, for k = 1 … N.

    Equal confidences come in no order: each stands for the error rate of all of them.
    """
    _, place, sizes = torch.unique(-c, return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, place, 1 - y)
    errors = torch.repeat_interleave(wrong / sizes, sizes).cumsum(0)
    covered = torch.arange(1, len(c) + 1, dtype=torch.float64)
    risk = errors / covered
    picked = torch.linspace(0, len(c) - 1, min(len(c), _CURVE_POINTS)).round().long().unique()
    curve = zip((covered[picked] / len(c)).tolist(), risk[picked].tolist(), strict=True)
    return {"aurc": float(risk.mean()), "risk_coverage": tuple(curve)}


def _ece_interval(
    at: torch.Tensor,
    excess: torch.Tensor,
    ece: float,
    n_bins: int,
    groups: torch.Tensor | None,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95 % for the calibration error behind an ece, by a bootstrap over groups and its inversion.

    The ece of a sample is too large by its noise, and the bootstrap's is too large by it twice. So
    the bootstrap gives the noise of every bin's signed gap alone, and the interval is made of the
    true errors s ece, the observed gaps stretched by s, under which the observed ece is not among
    the 2.5 % most extreme on either side.
    """
    count = len(at)
    if groups is None:
        unit = torch.arange(count)
    else:
        if groups.shape != at.shape:
            raise ValueError(f"groups {tuple(groups.shape)} must be as many as the tokens")
        unit = torch.unique(groups.cpu(), return_inverse=True)[1]
    units = int(unit.max()) + 1
    if units < _LEAST_RESAMPLED_GROUPS:  # too few to know their spread: tokens stand for themselves
        unit, units = torch.arange(count), count
    if units > _MOST_RESAMPLED_GROUPS:
        unit, units = unit * _MOST_RESAMPLED_GROUPS // units, _MOST_RESAMPLED_GROUPS
    cells = torch.bincount(unit * n_bins + at, weights=excess, minlength=units * n_bins)
    sums = cells.view(units, n_bins)  # (G, M)
    sizes = torch.bincount(unit, minlength=units).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(units, (resamples, units), generator=generator)
    times = torch.zeros(resamples, units, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    observed = sums.sum(0) / count  # (M,)
    noise = (times @ sums) / (times @ sizes)[:, None] - observed  # (R, M)
    low, high = 1.0, 1.0
    for stretch in torch.linspace(0, 3, 193, dtype=torch.float64).tolist():
        simulated = (stretch * observed + noise).abs().sum(1)
        if float((simulated >= ece).double().mean()) >= 0.025:
            low = min(low, stretch)
        if float((simulated <= ece).double().mean()) >= 0.025:
            high = max(high, stretch)
    return low * ece, high * ece


def check_shapes(logits: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor | None) -> None:
    """What all that reads logits asks of them. Raises: ValueError in words."""
    if logits.dim() != 2 or labels.dim() != 1 or len(logits) != len(labels):
        raise ValueError(
            f"logits {tuple(logits.shape)} must be (N, V) and labels {tuple(labels.shape)} (N,)"
        )
    if not logits.shape[1]:
        raise ValueError("the logits have no classes")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating, not {logits.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be whole numbers, not {labels.dtype}")
    if groups is not None and groups.shape != labels.shape:
        raise ValueError(f"groups {tuple(groups.shape)} must be as many as labels")
