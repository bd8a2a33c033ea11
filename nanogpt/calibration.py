"""Do probabilities mean what they say? Temperature scaling, and the numbers that judge it.

Everything streams: what is kept of a token is a handful of numbers, never its row of V logits. This
module knows no model and no text; `calibrate.py` brings them. Logs are natural, sums are float64.

`beta` is the inverse temperature 1/T here: it multiplies the logits, and a larger one sharpens.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from nanogpt import native
from nanogpt.reliability import (
    CONFIDENT,
    CalibrationReport,
    calibration_report,
    check_shapes,
)

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Logits (n, V), labels (n,) and the numbers of the tokens' groups (n,), or None."""
Batches = Callable[[], Iterable[Batch]]
"""Gives the same batches anew for every pass."""

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
FEW_TOKENS = 1000
# Float64 numbers of logits that are worked on at once: 8 MiB, few enough for a processor's cache,
# enough that the threads of torch and the engine seldom take turns; on a GPU, to keep it busy.
_CHUNK_NUMBERS, _CHUNK_NUMBERS_GPU = 2**20, 2**24
# Odd, so that beta = 1, in the middle of a symmetric range of log beta, is one of them.
_GRID_POINTS = 13
_MOST_PASSES = 60
# Below it Newton's step is taken without looking again: what it leaves is of the order of its
# square.
_RELATIVE_STEP = 1e-6
# A fit to logits in memory looks at one row of so many first, where there are enough of them.
_SAMPLED, _LEAST_TO_SAMPLE = 16, 4096
_SAMPLE_WIDTH = 0.1  # of the sample's bracket, as a share of beta
_SAMPLE_REACH = 4.0  # standard errors of the sample's beta, to either side
_NARROWEST = 4e-16
# Distances of the next points from the estimated root, as shares of the way to the bracket's ends:
# where a pass costs more than its points, and where it does not.
_LADDER, _SHORT_LADDER = (1 / 64, 1 / 64**2, 1 / 64**3), (1 / 64,)


class TemperatureScaler:
    """One temperature for all logits, fitted by maximum likelihood: p = softmax(z / T).

    The mean NLL is convex in beta = 1/T, with slope g = mean(E_q[z] - z_y) and curvature
    H = mean(Var_q[z]), so that a bracketed Newton search finds the only minimum. Each pass over the
    data evaluates several beta at once and at least halves the bracket; three or four passes are
    the rule. At the minimum the mean predictive entropy equals the mean NLL.

    Attributes:
        temperature_: T, within [0.05, 20].
        temperature_se_: its standard error: T^2 / sqrt(N H) for independent tokens, and
            T^2 sqrt(sum_b g_b^2) / (N H) with g_b the slope of group b where groups were given;
            infinite where T ended at a bound or the data do not determine it.
        nll_before_, nll_after_: mean NLL in nats at T = 1 and at T; never higher after.
        n_tokens_: N, what counted.
        bound_: "lower" or "upper" where the best temperature lies at or beyond the range's end: the
            logits are far too small or too large, every token is the likeliest one, or the model is
            worse than chance.
        passes_: passes over the data.
    Source: Guo et al. 2017, On calibration of modern neural networks (arXiv:1706.04599); Liang and
        Zeger 1986 for the sum over groups.
    """

    temperature_: float
    temperature_se_: float
    nll_before_: float
    nll_after_: float
    n_tokens_: int
    bound_: str | None
    passes_: int

    def fit(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None
    ) -> "TemperatureScaler":
        """Fit to logits in memory, their tokens taken as independent.

        Args:
            logits: (N, V) floating, of any precision; a class other than the label's may be -inf.
            labels: (N,) whole numbers in [0, V).
            mask: (N,) bool, False where a token does not count; its row may then hold anything.
        Returns: itself.
        Raises: ValueError where shapes disagree, no token counts, a label is outside the
            vocabulary or a logit is not finite.
        """
        check_shapes(logits, labels, None)
        if mask is not None and (mask.shape != labels.shape or mask.dtype != torch.bool):
            raise ValueError(
                f"the mask must be {tuple(labels.shape)} of bool, not {tuple(mask.shape)} of "
                f"{str(mask.dtype).removeprefix('torch.')}"
            )
        start: list[float] = []
        if len(logits) >= _LEAST_TO_SAMPLE:
            some = slice(None, None, _SAMPLED)
            sample = _counted(logits[some], labels[some], None if mask is None else mask[some])
            start = _first_look(sample)
        return self._fit(_counted(logits, labels, mask), start, _SHORT_LADDER)

    def fit_batches(
        self, batches: Batches, note: Callable[[str], None] = lambda message: None
    ) -> "TemperatureScaler":
        """Fit to a stream of logits that is read again for every pass and never kept.

        Args:
            batches: gives a fresh iterator over (logits (n, V), labels (n,), groups (n,) or None);
                groups are numbers from 0, equal for tokens that may depend on each other.
            note: receives a sentence about each pass.
        Returns: itself. Raises: as `fit`.
        """
        return self._fit(batches, [], _LADDER, note)

    def _fit(
        self,
        batches: Batches,
        start: list[float],
        ladder: tuple[float, ...],
        note: Callable[[str], None] = lambda message: None,
    ) -> "TemperatureScaler":
        """Fit from the bracket of `start`, or from the whole range where that holds no root."""
        points, self.passes_ = _evaluate(batches, start) if start else [], 1
        if not (points and points[0].slope < 0 < points[-1].slope):
            self.passes_ += bool(points)
            points = _evaluate(batches, _grid())
        at_one, count = next(point for point in points if point.beta == 1), points[0].count
        self.bound_ = None
        if all(point.slope == 0 for point in points):
            found = at_one  # every distribution is the same at every temperature
        elif points[-1].slope <= 0:
            self.bound_, found = "lower", points[-1]
        elif points[0].slope >= 0:
            self.bound_, found = "upper", points[0]
        else:
            left, right = _bracket(points)
            found = min((left, right), key=_newton_step)
            while (
                _newton_step(found) > _RELATIVE_STEP
                and right.beta - left.beta > _NARROWEST * right.beta
                and self.passes_ < _MOST_PASSES
            ):
                note(
                    f"pass {self.passes_}: the temperature is between {1 / right.beta:.6g} and "
                    f"{1 / left.beta:.6g}"
                )
                points = _evaluate(batches, _next_betas(left, right, ladder))
                self.passes_ += 1
                left, right = _bracket([left, *points, right])
                found = min((found, *points), key=_newton_step)
            if _newton_step(found) <= _RELATIVE_STEP:
                found = _stepped(found, left.beta, right.beta)
        if at_one.nll < found.nll:  # by rounding, where T is 1 but for its last digits
            self.bound_, found = None, at_one
        self.temperature_ = 1.0 / found.beta
        self.temperature_se_ = math.inf if self.bound_ else _standard_error(found)
        self.nll_before_, self.nll_after_ = at_one.nll / count, found.nll / count
        self.n_tokens_ = count
        self._warn()
        return self

    def transform(self, logits: torch.Tensor) -> torch.Tensor:
        """logits / T, any shape, in float32 or wider; every row keeps its order of classes.

        Confidences of different rows may change their order where there are more than two classes.
        """
        return _wide(logits) / self._fitted()

    def predict_proba(self, logits: torch.Tensor) -> torch.Tensor:
        """softmax(logits / T) over the last dimension, in float32 or wider."""
        return self.transform(logits).softmax(-1)

    def _fitted(self) -> float:
        if not hasattr(self, "temperature_"):
            raise ValueError("this TemperatureScaler has no temperature yet: call fit first")
        return self.temperature_

    def _warn(self) -> None:
        shown = f"{self.temperature_:.4g}"
        if self.bound_ == "lower":
            warnings.warn(
                f"the temperature ended at its lower bound, {shown}: on these {self.n_tokens_:,} "
                f"tokens the likelihood still rises towards smaller ones, as it does where the "
                f"likeliest token is always the right one",
                stacklevel=3,
            )
        elif self.bound_ == "upper":
            warnings.warn(
                f"the temperature ended at its upper bound, {shown}: on these "
                f"{self.n_tokens_:,} tokens the likelihood still rises towards larger ones, as it "
                f"does where the logits say less than nothing",
                stacklevel=3,
            )
        if self.n_tokens_ < FEW_TOKENS:
            error = self.temperature_se_
            known = f"standard error {error:.2g}" if math.isfinite(error) else "no standard error"
            warnings.warn(
                f"the temperature was fitted to {self.n_tokens_:,} tokens, fewer than "
                f"{FEW_TOKENS:,}: {shown}, {known}",
                stacklevel=3,
            )


@dataclass(frozen=True)
class _Point:
    """Sums over all tokens at one beta: NLL and its two derivatives, and sum_b g_b^2."""

    beta: float
    nll: float
    slope: float
    curvature: float
    count: int
    group_squares: float | None
    groups: int


def _evaluate(batches: Batches, betas: list[float]) -> list[_Point]:
    """One pass over the data: the sums at every beta."""
    sums = torch.zeros(3, len(betas), dtype=torch.float64)
    grouped = _GroupSums(len(betas))
    count, any_groups = 0, False
    at = torch.tensor(betas, dtype=torch.float64)
    for z, labels, groups in _row_chunks(batches):
        at = at.to(z.device)
        of_label = z.gather(1, labels[:, None])  # (n, 1)
        log_total, mean, variance = _moments(z, at)
        slopes = mean - of_label
        nll = log_total - at * of_label
        # On the device, so that nothing waits for them.
        sums = sums.to(z.device) + torch.stack([nll.sum(0), slopes.sum(0), variance.sum(0)])
        count += len(z)
        if groups is not None:
            any_groups = True
            grouped.add(groups, slopes)
    if not count:
        raise ValueError("there are no tokens to fit a temperature to")
    squares = grouped.totals.square().sum(0).tolist() if any_groups else [None] * len(betas)
    columns = sums.tolist()
    return [
        _Point(beta, nll, slope, curvature, count, square, grouped.count)
        for beta, nll, slope, curvature, square in zip(betas, *columns, squares, strict=True)
    ]


def _moments(z: torch.Tensor, betas: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Log-sum-exp of beta z, and mean and variance of z under softmax(beta z); each (n, K).

    `betas` are (K,) or (n, K). Where z is -inf it has no probability and counts nothing. The rows
    of z have their maximum at 0, so that the largest probability stands there: the variance is at
    least mean^2 / V, and the difference below loses no more than a factor V.
    """
    if z.device.type == "cpu" and native.available():
        return native.softmax_moments(z, betas)
    finite = z.masked_fill(z == -math.inf, 0.0)
    columns = []
    for beta in betas.unbind(-1):
        weights = (z * beta.reshape(-1, 1)).exp_()
        total = weights.sum(1)
        mean = torch.linalg.vecdot(weights, finite) / total
        second = torch.linalg.vecdot(weights.mul_(finite), finite) / total
        columns.append((total.log(), mean, (second - mean.square()).clamp_min(0)))
    return tuple(torch.stack(column, 1) for column in zip(*columns, strict=True))


def _row_chunks(batches: Batches) -> Iterator[Batch]:
    """Checked pieces of the batches: float64 logits whose rows have their maximum at 0."""
    for logits, labels, groups in batches():
        yield from _pieces(logits, labels, groups)


def _pieces(
    logits: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor | None
) -> Iterator[Batch]:
    check_shapes(logits, labels, groups)
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    labels = labels.to(logits.device, torch.int64)
    if groups is not None:
        groups = groups.to(logits.device, torch.int64)
    rows, vocabulary = _chunk_rows(logits), logits.shape[1]
    for first in range(0, len(logits), rows):
        part = slice(first, first + rows)
        chosen = labels[part]
        if bool(((chosen < 0) | (chosen >= vocabulary)).any()):
            bad = int(chosen[(chosen < 0) | (chosen >= vocabulary)][0])
            raise ValueError(
                f"the label {bad} is outside the vocabulary of {vocabulary:,} (tokens that do not "
                f"count are left out with a mask)"
            )
        z = logits[part].detach().to(torch.float64)
        top = z.amax(1, keepdim=True)
        of_label = z.gather(1, chosen[:, None])
        if not bool((torch.isfinite(top) & torch.isfinite(of_label)).all()):
            raise ValueError(
                "the logits hold NaN or infinity (only -inf is allowed, and not of a label)"
            )
        yield z - top, chosen, None if groups is None else groups[part]


def _chunk_rows(logits: torch.Tensor) -> int:
    numbers = _CHUNK_NUMBERS if logits.device.type == "cpu" else _CHUNK_NUMBERS_GPU
    return max(1, numbers // logits.shape[1])


class _GroupSums:
    """Sums of rows by the number of their group; the memory grows with the largest number."""

    def __init__(self, columns: int) -> None:
        self._sums = torch.zeros(64, columns, dtype=torch.float64)
        self._seen = torch.zeros(64, dtype=torch.bool)

    def add(self, groups: torch.Tensor, values: torch.Tensor) -> None:
        groups, values = groups.cpu(), values.cpu()
        if not len(groups):
            return
        if int(groups.min()) < 0:
            raise ValueError(f"groups are numbers from 0, not {int(groups.min())}")
        missing = int(groups.max()) + 1 - len(self._seen)
        if missing > 0:
            more = max(missing, len(self._seen))
            self._sums = torch.cat([self._sums, self._sums.new_zeros(more, values.shape[1])])
            self._seen = torch.cat([self._seen, self._seen.new_zeros(more)])
        self._sums.index_add_(0, groups, values)
        self._seen[groups] = True

    @property
    def totals(self) -> torch.Tensor:
        """(groups, columns), of the groups that have a row."""
        return self._sums[self._seen]

    @property
    def count(self) -> int:
        return int(self._seen.sum())


def _grid() -> list[float]:
    """The whole range of beta, and 1 in its middle."""
    edge = math.log(HIGHEST_TEMPERATURE)
    exponents = torch.linspace(-edge, edge, _GRID_POINTS, dtype=torch.float64)
    exponents[_GRID_POINTS // 2] = 0.0
    return exponents.exp().tolist()


def _counted(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None) -> Batches:
    """The rows in memory that count."""
    if mask is None:
        return lambda: [(logits, labels, None)]
    rows = _chunk_rows(logits)

    def chosen() -> Iterator[Batch]:
        for first in range(0, len(logits), rows):
            keep = mask[first : first + rows]
            yield logits[first : first + rows][keep], labels[first : first + rows][keep], None

    return chosen


def _first_look(sample: Batches) -> list[float]:
    """Where to look first in all rows, by a sample of them; nothing where it does not say."""
    try:
        points = _evaluate(sample, _grid())
        if not points[0].slope < 0 < points[-1].slope:
            return []
        while True:
            left, right = _bracket(points)
            if right.beta - left.beta <= _SAMPLE_WIDTH * right.beta:
                break
            points = [left, *_evaluate(sample, _next_betas(left, right, _SHORT_LADDER)), right]
    except ValueError:
        return []  # all rows will show what is wrong
    near = min((left, right), key=_newton_step)
    if not near.curvature > 0:
        return []
    root, reach = _cubic_root(left, right), _SAMPLE_REACH / math.sqrt(near.curvature)
    lowest, highest = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE
    inside = (max(root - reach, lowest), root, min(root + reach, highest))
    return sorted({1.0, *inside})


def _bracket(points: list[_Point]) -> tuple[_Point, _Point]:
    """The neighbours between which the slope changes its sign."""
    ordered = sorted(points, key=lambda point: point.beta)
    at = next(i for i, point in enumerate(ordered) if point.slope >= 0)
    return ordered[at - 1], ordered[at]


def _newton_step(point: _Point) -> float:
    """How far Newton's next step would go, as a share of beta."""
    if point.slope == 0:
        return 0.0
    return abs(point.slope / point.curvature) / point.beta if point.curvature > 0 else math.inf


def _stepped(point: _Point, low: float, high: float) -> _Point:
    """The point where Newton's step ends, by the quadratic whose derivatives are known here."""
    if point.slope == 0:
        return point
    beta = min(max(point.beta - point.slope / point.curvature, low), high)
    gain = point.slope**2 / (2 * point.curvature)
    return dataclasses.replace(point, beta=beta, nll=point.nll - gain)


def _next_betas(left: _Point, right: _Point, ladder: tuple[float, ...]) -> list[float]:
    """Where to look next inside a bracket.

    The estimated root, a ladder of points towards either end, so that the next bracket is as narrow
    as the estimate is good, and the middle, so that it is half as wide at least.
    """
    a, b = left.beta, right.beta
    root = _cubic_root(left, right)
    steps = [root + share * (end - root) for end in (a, b) for share in ladder]
    inside = {beta for beta in (root, 0.5 * (a + b), *steps) if a < beta < b}
    return sorted(inside) or [0.5 * (a + b)]


def _cubic_root(left: _Point, right: _Point) -> float:
    """Root of the cubic through slopes and curvatures at both ends, Newton's from both sides."""
    width = right.beta - left.beta
    p0, p1 = left.slope, right.slope
    m0, m1 = left.curvature * width, right.curvature * width
    low, high = 0.0, 1.0
    for _ in range(60):
        t = 0.5 * (low + high)
        s = 1 - t
        value = s * s * ((1 + 2 * t) * p0 + t * m0) + t * t * ((3 - 2 * t) * p1 - s * m1)
        low, high = (t, high) if value < 0 else (low, t)
    return left.beta + 0.5 * (low + high) * width


def _standard_error(point: _Point) -> float:
    """Of T at the minimum; by groups where there are two of them at least."""
    if point.curvature <= 0:
        return math.inf
    if point.group_squares is None or point.groups < 2:
        of_beta = 1 / math.sqrt(point.curvature)
    else:
        few = point.groups / (point.groups - 1)
        of_beta = math.sqrt(few * point.group_squares) / point.curvature
    return of_beta / point.beta**2


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class PerTokenTemperature:
    """A temperature of its own for every token: T_i = T exp(w . phi_i).

    phi_i = [1, log of the standard deviation of the logits, margin of the two largest, entropy at
    T]. With w = 0, where the fit starts, it is the global temperature exactly; whether four more
    numbers are worth it is for text to say that neither fit has seen: see `is_worth_it`.

    Args:
        temperature: T, the global one.
        weights: w of an earlier fit; zeros without.
    Attributes:
        weights_: w, four numbers.
        passes_: passes over the data of the last fit.
    Source: the idea of Xie et al. 2024, Calibrating language models with adaptive temperature
        scaling (arXiv:2409.19817), with features in place of a transformer layer.
    """

    def __init__(self, temperature: float, weights: Iterable[float] | None = None) -> None:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"a temperature is above 0, not {temperature}")
        self.temperature = temperature
        self.weights_ = [0.0] * 4 if weights is None else [float(weight) for weight in weights]
        if len(self.weights_) != 4 or not all(map(math.isfinite, self.weights_)):
            raise ValueError("a per-token temperature has four finite weights")
        self.passes_ = 0

    def fit_batches(self, batches: Batches) -> "PerTokenTemperature":
        """Newton's method on w in float64, with steps that only ever lower the NLL.

        Args:
            batches: as for `TemperatureScaler.fit_batches`.
        Returns: itself. Raises: ValueError as there.
        """
        here = torch.tensor(self.weights_, dtype=torch.float64)
        nll, gradient, hessian = (sums[0] for sums in self._sums(batches, [here]))
        self.passes_ = 1
        while self.passes_ < _MOST_PASSES:
            step = _descent(gradient, hessian)
            # Most steps are taken whole; the shorter ones spare a pass where one overshoots.
            candidates = [here + share * step for share in (1.0, 0.5, 0.125, 0.01)]
            sums = self._sums(batches, candidates)
            self.passes_ += 1
            best = int(sums[0].argmin())
            gain = float(nll - sums[0][best])
            if not gain > 0:
                break
            here = candidates[best]
            nll, gradient, hessian = (part[best] for part in sums)
            if gain < 1e-10 * abs(float(nll)):
                break
        self.weights_ = here.tolist()
        return self

    def temperatures(self, logits: torch.Tensor) -> torch.Tensor:
        """(N,) float64 temperatures within [0.05, 20] of logits (N, V)."""
        labels = logits.argmax(1)
        rows = [self._of_rows(z) for z, _, _ in _pieces(logits, labels, None)]
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.float64)

    def transform(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (N, V), each row divided by its temperature, in float32 or wider."""
        wide = _wide(logits)
        return wide / self.temperatures(logits).to(wide)[:, None]

    def predict_proba(self, logits: torch.Tensor) -> torch.Tensor:
        """(N, V) softmax of `transform`."""
        return self.transform(logits).softmax(-1)

    def _of_rows(self, z: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(self.weights_, dtype=torch.float64, device=z.device)
        return self._log_temperatures(self._features(z), weights).exp()

    def _features(self, z: torch.Tensor) -> torch.Tensor:
        """(n, 4) phi of float64 rows whose maximum is 0."""
        possible = z > -math.inf
        finite = z.masked_fill(~possible, 0.0)
        count = possible.sum(1)
        mean = finite.sum(1) / count
        spread = (finite - mean[:, None]).masked_fill(~possible, 0.0).square().sum(1) / count
        margin = torch.zeros_like(mean)
        if z.shape[1] > 1:
            margin = -z.topk(2, dim=1).values[:, 1].clamp_min(-1e3)
        beta = z.new_tensor([1 / self.temperature])
        log_total, mean_z, _ = (column[:, 0] for column in _moments(z, beta))
        entropy = log_total - mean_z / self.temperature
        log_spread = 0.5 * spread.clamp_min(1e-12).log()
        return torch.stack([torch.ones_like(mean), log_spread, margin, entropy], 1)

    def _log_temperatures(self, features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        free = math.log(self.temperature) + features @ weights
        return free.clamp(math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE))

    def _sums(
        self, batches: Batches, candidates: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """NLL (K,), gradient (K, 4) and Hessian (K, 4, 4) at every candidate w, in one pass."""
        nll = torch.zeros(len(candidates), dtype=torch.float64)
        gradient = torch.zeros(len(candidates), 4, dtype=torch.float64)
        hessian = torch.zeros(len(candidates), 4, 4, dtype=torch.float64)
        count = 0
        for z, labels, _ in _row_chunks(batches):
            features = self._features(z)
            of_label = z.gather(1, labels[:, None])  # (n, 1)
            count += len(z)
            at = torch.stack(candidates).to(z.device)
            betas = (-self._log_temperatures(features, at.T)).exp()  # (n, K)
            log_total, mean, variance = _moments(z, betas)
            nll += (log_total - betas * of_label).sum(0).cpu()
            # d beta / d w = -beta phi, and its derivative beta phi phi^T.
            slopes = (mean - of_label) * betas
            gradient -= (slopes.T @ features).cpu()
            bends = variance * betas.square() + slopes
            hessian += torch.einsum("nk,ni,nj->kij", bends, features, features).cpu()
        if not count:
            raise ValueError("there are no tokens to fit temperatures to")
        return nll, gradient, hessian


def _descent(gradient: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Newton's step with every curvature taken as positive, and none along flat directions."""
    values, vectors = torch.linalg.eigh(hessian)
    values = values.abs()
    usable = values > 1e-12 * values.max().clamp_min(1e-300)
    along = vectors.T @ gradient
    along = torch.where(usable, along / values.where(usable, torch.ones_like(values)), 0.0)
    return -(vectors @ along)


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, after minus before.

    Attributes:
        mean: of all tokens.
        standard_error: of the mean, by groups; infinite where there are fewer than two.
    """

    mean: float
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of the normal approximation."""
        reach = CONFIDENT * self.standard_error
        return self.mean - reach, self.mean + reach

    @property
    def is_worth_it(self) -> bool:
        """Whether the mean fell by more than two standard errors."""
        return self.mean < -2 * self.standard_error


def paired_difference(
    before: torch.Tensor, after: torch.Tensor, groups: torch.Tensor | None = None
) -> Difference:
    """How much a quantity of the same tokens changed.

    Args:
        before, after: (N,) of the same tokens in the same order, such as their NLL.
        groups: (N,) numbers from 0 of tokens that may depend on each other; without, all are
            independent.
    Raises: ValueError where there are no tokens or the lengths differ.
    """
    if before.shape != after.shape or before.dim() != 1 or not len(before):
        raise ValueError("before and after must hold the same tokens, one at least")
    change = (after.to(torch.float64) - before.to(torch.float64)).cpu()
    count, mean = len(change), float(change.mean())
    if groups is None:
        groups = torch.arange(count)
    sums = _GroupSums(1)
    sums.add(groups, (change - mean)[:, None])
    if sums.count < 2:
        return Difference(mean, math.inf)
    square = float(sums.totals.square().sum()) * sums.count / (sums.count - 1)
    return Difference(mean, math.sqrt(square) / count)


class TokenStatistics:
    """What a report needs of every token, gathered in a stream: some 30 bytes a token.

    Args:
        temperature: divides the logits: one for all tokens, or each token's own.
    """

    def __init__(self, temperature: "float | PerTokenTemperature" = 1.0) -> None:
        self.temperature = temperature
        self._columns: list[tuple[torch.Tensor, ...]] = []
        self._brier = 0.0

    def add(
        self, logits: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor | None = None
    ) -> None:
        """Note tokens; shapes and errors as in `TemperatureScaler.fit_batches`.

        Tokens without groups are groups of their own; give them for all tokens or for none.
        """
        for z, chosen, of_group in _pieces(logits, labels, groups):
            self._add(z, chosen, of_group)

    def _add(self, z: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor | None) -> None:
        if isinstance(self.temperature, PerTokenTemperature):
            z = z / self.temperature._of_rows(z)[:, None]
        else:
            z = z / self.temperature
        log_total, mean, _ = (column[:, 0] for column in _moments(z, z.new_ones(1)))
        nll = log_total - z.gather(1, labels[:, None])[:, 0]
        probabilities = (z - log_total[:, None]).exp_()
        self._brier += float((probabilities.square().sum(1) - 2 * (-nll).exp() + 1).sum())
        if groups is None:
            first = self.n_tokens
            groups = torch.arange(first, first + len(z))
        columns = (
            (-log_total).exp().clamp(0, 1),  # in float32 all above 1 - 3e-8 would be equal
            z.argmax(1) == labels,
            nll,
            (log_total - mean).to(torch.float32),
            groups,
        )
        self._columns.append(tuple(column.cpu() for column in columns))

    @property
    def n_tokens(self) -> int:
        return sum(len(columns[0]) for columns in self._columns)

    @property
    def nll(self) -> torch.Tensor:
        """(N,) float64 nats of every token."""
        return self._column(2)

    @property
    def groups(self) -> torch.Tensor:
        """(N,) int64."""
        return self._column(4)

    def report(self, n_bins: int = 15, seed: int = 0) -> CalibrationReport:
        """The report on what was gathered. Raises: ValueError where that is nothing."""
        if not self._columns:
            raise ValueError("there are no tokens to report on")
        return calibration_report(
            self._column(0),
            self._column(1),
            n_bins=n_bins,
            groups=self.groups,
            nll=self.nll,
            entropy=self._column(3),
            brier=self._brier / self.n_tokens,
            seed=seed,
        )

    def _column(self, index: int) -> torch.Tensor:
        return torch.cat([columns[index] for columns in self._columns])
