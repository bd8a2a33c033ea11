"""Self-alignment: rounds of sampling, scoring and training from the base on weighted samples.

A round draws texts from the policy, scores them, and turns scores into weights, so that an exact
fit has p_{k+1}(y) = p_k(y) t_k(r(y)), t_k(r) = exp(r / (beta s)) / Z_k. Mixed with a share `a` of
the base's own text (the anchor) it is p_{k+1} = (1 - a) p_k t_k + a p_0. All of this is a function
of the reward alone: p_k(y) = p_0(y) f_k(r(y)), so that samples of earlier rounds still count, with
weights f_k t_k / f_j, and the next round's KL to the base is known before anything is trained.

`beta` here is a temperature: small is greedy. That of the decoder that `distil_beta` samples from
is a multiplier, its inverse.

Sources: Dong et al. 2023, RAFT (arXiv:2304.06767); Gulcehre et al. 2023, ReST (arXiv:2308.08998);
Singh et al. 2023, ReST-EM (arXiv:2312.06585), for training from the base in every round.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from nanogpt.text_measures import (
    duplicate_rate,
)
from nanogpt.tilt import effective_sample_size, tilt

WEIGHTINGS = ("exp", "keep", "identity")
KL_BUDGET_PER_TOKEN = 0.05


@dataclass(frozen=True)
class SelfAlignConfig:
    """How to align.

    Attributes:
        rounds: times to sample, score and train, at most.
        num_generations: samples of a round.
        weighting: "exp"; "keep", the best `keep_fraction` with equal weights; "identity", all the
            same, which is for samples that are tilted already, and for controls.
        beta: a temperature, in units of `scale_rewards`; small is greedy.
        scale_rewards: "std" measures rewards in standard deviations of the base's, "none" as is.
        max_weight: samples of average reward that one may count for.
        keep_fraction: of the samples; those that tie at the edge share what is left.
        anchor_fraction: of the trained targets, original text.
        kl_budget: nats of a text that the result may be away from the base; None is 0.05 for each
            token of a text.
        worst_nll_increase: of general text, relative to the base, that a round may cost.
        deduplicate: train on a text once however often it was drawn.
        distil_beta: a multiplier: draw from the reward-augmented decoder instead and train on what
            it wrote, unweighted. For terms that the policy never writes by itself.
        seed: of samples and training.
    Raises: ValueError for a value out of range; for exp or keep together with distil_beta.
    """

    rounds: int = 3
    num_generations: int = 1024
    weighting: str = "exp"
    beta: float = 1.0
    scale_rewards: str = "std"
    max_weight: float = 20.0
    keep_fraction: float = 0.2
    anchor_fraction: float = 0.3
    kl_budget: float | None = None
    worst_nll_increase: float = 0.02
    deduplicate: bool = True
    distil_beta: float | None = None
    seed: int = 1337

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}")
        if self.scale_rewards not in ("std", "none"):
            raise ValueError(f"scale_rewards must be std or none, not {self.scale_rewards!r}")
        for name, least in (("rounds", 1), ("num_generations", 2), ("max_weight", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta, a temperature, must be above 0, not {self.beta}")
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction must be above 0 and at most 1: {self.keep_fraction}")
        if not 0 <= self.anchor_fraction < 1:
            raise ValueError(f"anchor_fraction must be from 0 to below 1: {self.anchor_fraction}")
        if self.kl_budget is not None and not self.kl_budget > 0:
            raise ValueError(f"kl_budget must be above 0, not {self.kl_budget}")
        if self.distil_beta is not None and self.weighting != "identity":
            raise ValueError(_DOUBLE_TILT)


_DOUBLE_TILT = (
    "double_tilt: these samples come from the reward-augmented decoder, so weighting them by "
    "reward too would tilt twice; use weighting='identity'"
)


@dataclass
class Samples:
    """Texts that a policy wrote.

    Attributes:
        written: completions as they were drawn: two that are equal are duplicates.
        texts: the same without the words that their edges cut: what is scored.
        prompts: what each one continued.
        n_tokens: (n,) int64, tokens of each completion.
        counts: (n,) float64, draws that each one stands for: 1, or an importance weight
            p(text)/q(text) where it was drawn from q instead of the policy.
        tokens: (n, T) int64, prompt and completion, where the policy has tokens.
        kl: (n,) float64 nats, exact KL of policy to base summed along each text.
        entropy: (n,) float64 nats, the policy's, summed along each text.
        base_nll: (n,) float64, the base's mean nats per token of each completion.
        temperature, top_k: how they were drawn.
        tilted: drawn from a decoder that the rewards have moved.
    """

    written: list[str]
    texts: list[str]
    prompts: list[str]
    n_tokens: torch.Tensor
    counts: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    base_nll: torch.Tensor
    tokens: torch.Tensor | None = None
    temperature: float = 1.0
    top_k: int | None = None
    tilted: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: torch.Tensor) -> "Samples":
        """Some of them."""
        listed = rows.tolist()
        return replace(
            self,
            written=[self.written[i] for i in listed],
            texts=[self.texts[i] for i in listed],
            prompts=[self.prompts[i] for i in listed],
            n_tokens=self.n_tokens[rows],
            counts=self.counts[rows],
            kl=self.kl[rows],
            entropy=self.entropy[rows],
            base_nll=self.base_nll[rows],
            tokens=None if self.tokens is None else self.tokens[rows],
        )


class Policy(Protocol):
    """What a round knows of a model."""

    def sample(self, n: int, seed: int, *, distil_beta: float | None = None) -> Samples:
        """Draw n texts at temperature 1 without any filter, or from the decoder at distil_beta."""

    def fit(self, pool: Samples, weights: torch.Tensor, anchor: float, seed: int) -> "Policy":
        """A new policy, trained from the base on the pool with a share of original text.

        Args:
            weights: (n,) float64 of mean 1.
        """

    def general_nll(self) -> float | None:
        """Mean nats per target on original text that is not trained on; None without any."""

    def state(self) -> dict[str, Any]:
        """What makes this policy out of its base: what torch.save(weights_only) can hold."""

    def with_state(self, state: dict[str, Any]) -> "Policy":
        """The policy that `state` described, of the same base."""


Reward = Callable[[Samples], torch.Tensor]


@dataclass(frozen=True)
class RewardTilt:
    """What a round multiplies the probability of a text by, a function of its reward alone.

    Attributes:
        log_factor of a reward r is min((r - mean) / unit, log_limit) - log_z for weighting exp;
        for keep it is log_above above `mean` (the edge), log_at at it and -inf below.
    """

    weighting: str
    mean: float = 0.0
    unit: float = 1.0
    log_limit: float = math.inf
    log_z: float = 0.0
    log_above: float = 0.0
    log_at: float = 0.0

    def log_factor(self, rewards: torch.Tensor) -> torch.Tensor:
        """(n,) float64, log t of rewards (n,)."""
        if self.weighting == "identity":
            return torch.zeros_like(rewards)
        if self.weighting == "exp":
            return self._moved(rewards) - self.log_z
        below = torch.full_like(rewards, -math.inf)
        at = torch.where(rewards == self.mean, self.log_at, below)
        return torch.where(rewards > self.mean, self.log_above, at)

    def _moved(self, rewards: torch.Tensor) -> torch.Tensor:
        return ((rewards - self.mean) / self.unit).clamp(max=self.log_limit)

    @classmethod
    def exponential(
        cls, rewards: torch.Tensor, counts: torch.Tensor, unit: float, max_weight: float
    ) -> "RewardTilt":
        """t(r) proportional to exp(r / unit), of mean 1 over the samples.

        It gives the weights of `tilt.reward_weights` where all counts are 1.
        """
        mean = float((counts * rewards).sum() / counts.sum())
        open_tilt = cls("exp", mean, unit, math.log(max_weight))
        moved = tilt(counts.log(), open_tilt._moved(rewards), 1.0)
        return replace(open_tilt, log_z=float(moved.log_z))

    @classmethod
    def best(cls, rewards: torch.Tensor, counts: torch.Tensor, fraction: float) -> "RewardTilt":
        """t(r) keeps the best ceil(fraction n) draws; ties at the edge share what is left."""
        total = float(counts.sum())
        quota = min(total, math.ceil(fraction * total - 1e-9))
        order = rewards.argsort(descending=True, stable=True)
        reached = counts[order].cumsum(0)
        place = int((reached < quota - 1e-9).sum())
        edge = float(rewards[order[min(place, len(order) - 1)]])
        above = float(counts[rewards > edge].sum())
        at = float(counts[rewards == edge].sum())
        share = total / quota
        log_at = math.log(share * (quota - above) / at) if quota > above else -math.inf
        return cls("keep", mean=edge, log_above=math.log(share), log_at=log_at)


@dataclass
class _Drawn:
    """A round's samples with their rewards, each (n,) float64.

    log_then and log_now are log p_k(y)/p_0(y) of exact fits: k the round that drew them, and now.
    """

    samples: Samples
    rewards: torch.Tensor
    log_then: torch.Tensor
    log_now: torch.Tensor


class SelfAlignTrainer:
    """Rounds of self-alignment on any policy.

    A round whose result is further from the base than the budget, or worse at general text than
    allowed, is undone: `policy` is the last one that kept the limits.

    Args:
        policy: the base.
        reward: scores samples, (n,) finite.
        accepts: which samples (n,) have what is rewarded; without any a round learns nothing. By
            default those of a reward above 0, and rounds go on without any.
        measure: more metrics of samples, by name.
        progress: called with what is being done and how far it is, 0 to 1.
    Attributes:
        policy: the best so far.
        rounds: metrics of the base (round 0) and of every round since, as plain dicts: round,
            kept, reward, reward_std, acceptance, frac_reward_zero_std, ess, ess_fraction,
            kl_predicted, kl, kl_se (nats a text), entropy (nats a token), mean_length (tokens),
            duplicate_rate, val_loss, val_loss_change, seconds, and what `measure` adds.
        stopped: why it ended, one sentence; None while it goes on.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        config: SelfAlignConfig | None = None,
        *,
        accepts: Callable[[Samples], torch.Tensor] | None = None,
        measure: Callable[[Samples], dict[str, Any]] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        self.policy, self.reward = policy, reward
        self.config = config or SelfAlignConfig()
        self.rounds: list[dict[str, Any]] = []
        self.stopped: str | None = None
        self._accepts, self._measure, self._progress = accepts, measure, progress
        self._tilts: list[RewardTilt] = []
        self._drawn: list[_Drawn] = []
        self._unit = 1.0

    def train(self) -> list[dict[str, Any]]:
        """All rounds; returns `rounds`."""
        while self.step():
            pass
        return self.rounds

    def step(self) -> bool:
        """Measure the base, or go one round further. False where nothing is left to do."""
        if self.stopped is None:
            if not self.rounds:
                self._begin()
            else:
                self._round()
        return self.stopped is None

    @property
    def kl_budget(self) -> float:
        """Nats of a text; known once the base has been sampled."""
        if self.config.kl_budget is not None:
            return self.config.kl_budget
        return KL_BUDGET_PER_TOKEN * self.rounds[0]["mean_length"]

    def texts(self, number: int) -> list[str]:
        """What the base (0), or a round that was kept, has written."""
        return self._drawn[number].samples.written

    def state(self) -> dict[str, Any]:
        """Everything that goes on from here depends on, beside base, reward and configuration.

        Tensors, numbers, texts, lists and dicts only.
        """
        return {
            "policy": self.policy.state(),
            "rounds": copy.deepcopy(self.rounds),
            "stopped": self.stopped,
            "unit": self._unit,
            "tilts": [asdict(one) for one in self._tilts],
            "drawn": [{**vars(one), "samples": vars(one.samples).copy()} for one in self._drawn],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.policy = self.policy.with_state(state["policy"])
        self.rounds = copy.deepcopy(state["rounds"])
        self.stopped, self._unit = state["stopped"], state["unit"]
        self._tilts = [RewardTilt(**one) for one in state["tilts"]]
        self._drawn = [
            _Drawn(**{**one, "samples": Samples(**one["samples"])}) for one in state["drawn"]
        ]

    def _begin(self) -> None:
        started = time.perf_counter()
        self._tell("sampling the base", 0.0)
        drawn = self._draw(self.policy, 0)
        self._drawn = [drawn]
        _, deviation = _moments(drawn.rewards, drawn.samples.counts)
        if self.config.scale_rewards == "std" and deviation > 0:
            self._unit = deviation
        metrics = self._metrics(self.policy, drawn, started)
        self.rounds.append({"round": 0, "kept": True, **metrics, "val_loss_change": 0.0})

    def _round(self) -> None:
        started = time.perf_counter()
        config, number = self.config, len(self.rounds)
        if number > config.rounds:
            done = "the round is" if config.rounds == 1 else f"all {config.rounds} rounds are"
            self.stopped = f"{done} done"
            return
        source = self._source(number)
        nothing = self._nothing_to_learn(source)
        if nothing is not None:
            warnings.warn(nothing, RuntimeWarning, stacklevel=3)
            self.stopped = nothing
            return
        step = self._next_tilt(source)
        predicted = self._kl_after(step)
        if predicted > self.kl_budget:
            self.stopped = (
                f"the KL budget is reached: round {number} would go {predicted:.3g} nats a text "
                f"away from the base, over {self.kl_budget:.3g}"
            )
            return
        pool, weights = self._pool(source, step)
        self._tell(f"round {number}: training on {len(pool)} texts", 0.2)
        policy = self.policy.fit(pool, weights, config.anchor_fraction, config.seed + number)
        self._tell(f"round {number}: sampling", 0.6)
        drawn = self._draw(policy, number)
        ess = effective_sample_size(weights)
        metrics = self._metrics(policy, drawn, started)
        broken = self._broken(number, metrics)
        self.rounds.append(
            {
                "round": number,
                "kept": broken is None,
                **metrics,
                "ess": ess,
                "ess_fraction": ess / len(weights),
                "kl_predicted": predicted,
            }
        )
        if broken is not None:
            self.stopped = broken
            return
        self.policy = policy
        self._tilts.append(step)
        for earlier in self._drawn:
            earlier.log_now = self._moved(earlier.log_now, earlier.rewards, step)
        for one in self._tilts:
            drawn.log_now = self._moved(drawn.log_now, drawn.rewards, one)
        drawn.log_then = drawn.log_now
        self._drawn.append(drawn)

    def _source(self, number: int) -> _Drawn:
        """What a round trains on: the policy's samples, or what the decoder writes for it."""
        if self.config.distil_beta is None:
            return self._drawn[-1]
        self._tell(f"round {number}: sampling with the reward", 0.0)
        seed = _seed(self.config.seed, number, 1)
        samples = self.policy.sample(
            self.config.num_generations, seed, distil_beta=self.config.distil_beta
        )
        return self._scored(samples)

    def _nothing_to_learn(self, source: _Drawn) -> str | None:
        """Why a round on these samples would be about noise alone, in a sentence, or None."""
        if self._accepts is not None and not bool(self._accepts(source.samples).any()):
            return (
                f"nothing is accepted: none of {len(source.samples)} samples has what is rewarded; "
                f"distil_beta draws from the reward-augmented decoder instead"
            )
        if self.config.weighting != "identity" and _all_equal(source.rewards):
            return "nothing can be learnt: all samples of this round have the same reward"
        return None

    def _draw(self, policy: Policy, number: int) -> _Drawn:
        samples = policy.sample(self.config.num_generations, _seed(self.config.seed, number, 0))
        if samples.tilted and self.config.weighting != "identity":
            raise ValueError(_DOUBLE_TILT)
        filtered = samples.temperature != 1 or samples.top_k is not None
        if filtered and bool((samples.counts == 1).all()):
            raise ValueError(
                f"samples at temperature {samples.temperature:g} and top-k {samples.top_k} are not "
                f"the policy's: draw at 1 without a filter, or give importance weights as counts"
            )
        return self._scored(samples)

    def _scored(self, samples: Samples) -> _Drawn:
        rewards = torch.as_tensor(self.reward(samples), dtype=torch.float64).cpu()
        if rewards.shape != (len(samples),) or not bool(rewards.isfinite().all()):
            raise ValueError(
                f"the reward must give {len(samples)} finite numbers, "
                f"not {tuple(rewards.shape)} with {int((~rewards.isfinite()).sum())} that are not"
            )
        return _Drawn(samples, rewards, torch.zeros_like(rewards), torch.zeros_like(rewards))

    def _next_tilt(self, drawn: _Drawn) -> RewardTilt:
        config, counts = self.config, drawn.samples.counts
        if config.weighting == "keep":
            return RewardTilt.best(drawn.rewards, counts, config.keep_fraction)
        if config.weighting == "exp":
            unit = config.beta * self._unit
            return RewardTilt.exponential(drawn.rewards, counts, unit, config.max_weight)
        return RewardTilt("identity")

    def _moved(
        self, log_ratio: torch.Tensor, rewards: torch.Tensor, step: RewardTilt
    ) -> torch.Tensor:
        """log p_{k+1}(y)/p_0(y) of an exact fit, from log p_k(y)/p_0(y)."""
        tilted = log_ratio + step.log_factor(rewards)
        anchor = self.config.anchor_fraction
        if anchor == 0:
            return tilted
        return torch.logaddexp(
            tilted + math.log1p(-anchor), torch.full_like(tilted, math.log(anchor))
        )

    def _kl_after(self, step: RewardTilt) -> float:
        """KL to the base, in nats a text, of an exact fit of the next round.

        With an anchor p_{k+1} is a mixture, so the mean of log p_{k+1}/p_0 is taken over both.
        nan where the samples come from a decoder whose tilt is not a function of the reward.
        """
        if self.config.distil_beta is not None:
            return math.nan
        anchor, last = self.config.anchor_fraction, self._drawn[-1]

        def log_ratio(drawn: _Drawn) -> torch.Tensor:
            return self._moved(drawn.log_now, drawn.rewards, step)

        moved = tilt(last.samples.counts.log(), step.log_factor(last.rewards), 1.0).log_q.exp()
        kl = (1 - anchor) * _mean(log_ratio(last), moved)
        if anchor:
            base = self._drawn[0]
            kl += anchor * _mean(log_ratio(base), base.samples.counts)
        return max(0.0, kl)

    def _pool(self, source: _Drawn, step: RewardTilt) -> tuple[Samples, torch.Tensor]:
        """All samples so far, weighted to the next policy: (pool, weights of mean 1).

        Every round's samples make an estimate of their own; they share in proportion to their
        effective sizes, so that samples which are far from the next policy by now count little.
        """
        if self.config.distil_beta is not None:
            rounds = [(source, torch.zeros_like(source.rewards))]
        else:
            rounds = []
            for drawn in self._drawn:
                log_weights = step.log_factor(drawn.rewards)
                if drawn is not source:
                    log_weights = log_weights + drawn.log_now - drawn.log_then
                rounds.append((drawn, log_weights))
        parts, shares = [], []
        for drawn, log_weights in rounds:
            rows = _first_of_each(drawn.samples) if self.config.deduplicate else None
            samples = drawn.samples if rows is None else drawn.samples.take(rows)
            of_rows = log_weights if rows is None else log_weights[rows]
            counts = samples.counts
            usable = torch.nonzero(of_rows + counts.log() > -math.inf)[:, 0]
            if not len(usable):
                continue
            share = tilt(counts[usable].log(), of_rows[usable], 1.0).log_q.exp()
            parts.append(samples.take(usable))
            # A record of many draws is as good as as many records.
            draws = counts[usable] / counts.sum() * len(drawn.samples)
            size = float(share.sum() ** 2 / (share**2 / draws).sum())
            shares.append(share * size)
        weights = torch.cat(shares)
        weights = weights / weights.max()  # equal weights become exactly 1
        return _joined(parts), weights / weights.mean()

    def _broken(self, number: int, metrics: dict[str, Any]) -> str | None:
        """The limit that a round's result breaks, in a sentence, or None."""
        change = metrics["val_loss_change"]
        if not math.isfinite(metrics["kl"]) or not math.isfinite(change or 0.0):
            return f"round {number} has no finite figures, and is undone: train more gently"
        if metrics["kl"] > self.kl_budget:
            return (
                f"the KL budget is reached: round {number} went {metrics['kl']:.3g} nats a text "
                f"away from the base, over {self.kl_budget:.3g}, and is undone"
            )
        if change is not None and change > self.config.worst_nll_increase:
            return (
                f"general text suffers: round {number} predicts it {100 * change:.1f} % worse than "
                f"the base, over {100 * self.config.worst_nll_increase:g} %, and is undone"
            )
        return None

    def _metrics(self, policy: Policy, drawn: _Drawn, started: float) -> dict[str, Any]:
        samples, counts = drawn.samples, drawn.samples.counts
        mean, deviation = _moments(drawn.rewards, counts)
        tokens = _mean(samples.n_tokens.to(torch.float64), counts)
        val_loss = policy.general_nll()
        change = None
        if val_loss is not None and self.rounds:
            change = val_loss / self.rounds[0]["val_loss"] - 1
        accepted = self._accepts(samples) if self._accepts else drawn.rewards > 0
        kl, kl_deviation = _moments(samples.kl, counts)
        return {
            "reward": mean,
            "reward_std": deviation,
            "acceptance": _mean(accepted.to(torch.float64), counts),
            "frac_reward_zero_std": float(_all_equal(drawn.rewards)),
            "kl": kl,
            "kl_se": kl_deviation / math.sqrt(len(samples)),
            "entropy": _mean(samples.entropy, counts) / max(tokens, 1e-9),
            "mean_length": tokens,
            "duplicate_rate": duplicate_rate(samples.written),
            "val_loss": val_loss,
            "val_loss_change": change,
            **(self._measure(samples) if self._measure else {}),
            "seconds": time.perf_counter() - started,
        }

    def _tell(self, what: str, part: float) -> None:
        if self._progress is not None:
            self._progress(what, part)


def _seed(seed: int, number: int, use: int) -> int:
    """A seed of 62 bits for one use in one round."""
    words = np.random.SeedSequence((seed, number, use)).generate_state(1, dtype=np.uint64)
    return int(words[0]) >> 2


def _mean(values: torch.Tensor, counts: torch.Tensor) -> float:
    return float((torch.where(counts > 0, values, 0.0) * counts).sum() / counts.sum())


def _moments(values: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """Mean and the population's standard deviation; exactly 0 where all are equal."""
    mean = _mean(values, counts)
    if _all_equal(values):
        return mean, 0.0
    return mean, math.sqrt(_mean((values - mean) ** 2, counts))


def _all_equal(values: torch.Tensor) -> bool:
    return bool((values == values[0]).all())


def _first_of_each(samples: Samples) -> torch.Tensor:
    """Rows of the texts that no earlier row equals."""
    first = {text: row for row, text in reversed(list(enumerate(samples.written)))}
    return torch.tensor(sorted(first.values()))


def _joined(parts: Sequence[Samples]) -> Samples:
    tokens = [part.tokens for part in parts if part.tokens is not None]
    return replace(
        parts[0],
        written=[text for part in parts for text in part.written],
        texts=[text for part in parts for text in part.texts],
        prompts=[text for part in parts for text in part.prompts],
        n_tokens=torch.cat([part.n_tokens for part in parts]),
        counts=torch.cat([part.counts for part in parts]),
        kl=torch.cat([part.kl for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        base_nll=torch.cat([part.base_nll for part in parts]),
        tokens=torch.cat(tokens) if tokens else None,
    )
