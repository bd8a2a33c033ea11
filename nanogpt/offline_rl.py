"""Learning from rewarded records, without asking for new ones.

`RewardWeightedTrainer` fits the records as if each stood there as often as its weight says.
`PreferenceTrainer` (DPO) learns from pairs of which one is better, `LabelTrainer` (KTO) from
what is good or bad; both are measured against a frozen reference. The losses are pure functions.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nanogpt import machine
from nanogpt.data import BatchOrder
from nanogpt.model import GPT
from nanogpt.recipe import scheduled_rate
from nanogpt.records import IGNORED, Batch, Examples, micro_batches
from nanogpt.tilt import WeightStats, reward_weights
from nanogpt.trainer import make_optimizer, seed_dropout

# Of one micro-batch: inputs, and logits in float32.
_MOST_TOKENS = {"cuda": 65_536}
_MOST_TOKENS_ELSEWHERE = 16_384
_MOST_LOGIT_BYTES = {"cuda": 2 * 2**30}
_MOST_LOGIT_BYTES_ELSEWHERE = 256 * 2**20


def row_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each row's targets, summed: (B,) nats, fp32 or wider.

    Args:
        logits: (B, T, V); targets: (B, T) int64, -100 where they do not count.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(
        wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return nats.view(targets.shape).sum(1)


def weighted_nll(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, denominator: float
) -> torch.Tensor:
    """Negative log-likelihood of weighted rows, a scalar.

    L = sum_i w_i sum_t nll_it / denominator

    The denominator is the caller's, who keeps it free of the weights and of the batch's lengths:
    then the minimum is the weighted data's, long texts are not discounted, and parts of a batch add
    up to the whole.

    Args:
        logits: (B, T, V); targets: (B, T) int64, -100 where they do not count; weights: (B,).
    Source: Peters and Schaal 2007, Reinforcement learning by reward-weighted regression.
    """
    nats = row_nll(logits, targets)
    return (nats * weights.to(nats.dtype)).sum() / denominator


def token_kl(
    logits: torch.Tensor, reference_logits: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(model || reference) of the next token, exact over the vocabulary.

    kl = sum_v p_v (log p_v - log r_v)

    Args:
        logits, reference_logits: (..., V).
        mask: (...) bool; where it is False the result is 0.
    Returns: (...) nats, fp32 or wider.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(dtype).log_softmax(-1)
    log_r = reference_logits.to(dtype).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_r)).sum(-1)
    return kl if mask is None else kl.where(mask, torch.zeros_like(kl))


def k3_estimate(log_p: torch.Tensor, log_r: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(p || r) from samples of p: never negative, of the right mean.

    e^d - 1 - d, with d = log r(x) - log p(x)

    Source: Schulman 2020, Approximating KL divergence.
    """
    d = log_r - log_p
    return torch.expm1(d) - d


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float = 0.1,
) -> torch.Tensor:
    """Loss of each pair: (n,).

    -log sigmoid(beta ((chosen - reference_chosen) - (rejected - reference_rejected)))

    Args:
        chosen, rejected, reference_chosen, reference_rejected: (n,) log-likelihoods of whole
            completions under the model and under the reference.
        beta: the price of KL, a temperature: small moves far from the reference.
    Source: Rafailov et al. 2023, Direct preference optimization, equation 7 (arXiv:2305.18290).
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -F.logsigmoid(beta * margin)


def kto_loss(
    log_ratios: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor | float,
    beta: float = 0.1,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Loss of each record: (n,).

    desirable:    w_d (1 - sigmoid(beta (log_ratio - kl)))
    undesirable:  w_u (1 - sigmoid(beta (kl - log_ratio)))

    Args:
        log_ratios: (n,) log-likelihood of the completion under the model minus the reference's.
        desirable: (n,) bool.
        kl: the baseline: mean log-ratio of mismatched prompts and completions, taken as a constant
            and as 0 where it is negative.
        beta: the price of KL, a temperature: small moves far from the reference.
    Source: Ethayarajh et al. 2024, KTO, equations 7 and 8 (arXiv:2402.01306).
    """
    baseline = torch.as_tensor(kl, dtype=log_ratios.dtype, device=log_ratios.device)
    baseline = baseline.detach().clamp(min=0)
    gain = (log_ratios - baseline) * torch.where(desirable, 1.0, -1.0).to(log_ratios)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(log_ratios)
    return weight * torch.sigmoid(-beta * gain)


def binary_labels(rewards: Sequence[float], threshold: float | None = None) -> np.ndarray:
    """(n,) bool: rewards of at least `threshold`, by default their mean."""
    values = np.asarray(rewards, dtype=np.float64)
    if threshold is None:
        # Divided first: the sum of rewards of 1e308 is not finite.
        threshold = float((values / len(values)).sum())
        # The mean of equal numbers may be rounded above all of them.
        threshold = min(max(threshold, float(values.min())), float(values.max()))
    return values >= threshold


def preference_pairs(
    rewards: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> np.ndarray:
    """Pairs of records of which the first has the higher reward: (n, 2) int64.

    Within a group, or over all records without groups, the record of rank k of N is set against the
    one of rank k + N // 2; ties are in an order that the seed draws. Equal rewards make no pair.
    """
    values = np.asarray(rewards, dtype=np.float64)
    members: dict[Hashable, list[int]] = {}
    for place in range(len(values)):
        members.setdefault(None if groups is None else groups[place], []).append(place)
    draw = np.random.default_rng((seed, len(values)))
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for places in members.values():
        shuffled = draw.permutation(np.array(places, dtype=np.int64))
        ranked = shuffled[np.argsort(-values[shuffled], kind="stable")]
        half = len(ranked) // 2
        both = np.stack([ranked[:half], ranked[len(ranked) - half :]], axis=1)
        pairs.append(both[values[both[:, 0]] > values[both[:, 1]]])
    return np.concatenate(pairs)


def reward_quantiles(rewards: Sequence[float], n: int) -> np.ndarray:
    """(R,) int64 from 0 to n - 1, which of n parts a reward belongs to; equal rewards share one.

    Parts are of equal numbers of distinct rewards. As a prompt, a token a part makes a model that
    can be asked for texts of any of them.

    Source: Lu et al. 2022, Quark (arXiv:2205.13636), with ranks of values instead of records.
    """
    if n < 1:
        raise ValueError(f"there must be at least one quantile, not {n}")
    values, place = np.unique(np.asarray(rewards, dtype=np.float64), return_inverse=True)
    return place.astype(np.int64) * n // max(1, len(values))


@dataclass(frozen=True)
class RewardWeightedConfig:
    """Settings of training on rewarded records.

    Attributes:
        beta: in weights the temperature of rewards, in DPO and KTO the price of KL: in both, small
            is greedy.
        target_ess, target_kl, weighting, top_fraction, scale_rewards, max_weight: how rewards
            become weights; see `nanogpt.tilt.reward_weights`.
        kl_coef: price of a nat of KL to the reference, per target.
        learning_rate: the peak; after `warmup_steps` (None: a twentieth of all, 100 at most) it
            falls in a cosine to `min_lr` (None: a tenth of it).
        batch_size: examples of a step; in DPO pairs, in KTO records.
        grad_clip: largest gradient norm; 0 does not clip.
        micro_batch_tokens: most tokens computed at once; None leaves it to the machine.
    """

    beta: float = 1.0
    target_ess: float | None = None
    target_kl: float | None = None
    weighting: str = "exp"
    top_fraction: float = 0.25
    scale_rewards: str = "std"
    max_weight: float = 20.0
    kl_coef: float = 0.0
    learning_rate: float = 1e-4
    min_lr: float | None = None
    warmup_steps: int | None = None
    num_train_epochs: int = 3
    batch_size: int = 64
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    seed: int = 0
    micro_batch_tokens: int | None = None

    def weigh(
        self, rewards: Sequence[float], groups: Sequence[Hashable] | None = None
    ) -> tuple[torch.Tensor, WeightStats]:
        """Weights of a whole data set, (R,) float64 of mean 1, and what they do to it."""
        return reward_weights(
            rewards,
            weighting=self.weighting,
            beta=self.beta,
            scale=self.scale_rewards,
            max_weight=self.max_weight,
            top_fraction=self.top_fraction,
            groups=groups,
            target_ess=self.target_ess,
            target_kl=self.target_kl,
        )


@dataclass
class Progress:
    """Where training is; part of `state()`.

    Attributes:
        step: optimizer steps done.
        skipped_steps: of these, steps whose loss or gradient was not finite and which changed
            nothing.
        sums: of the epoch so far: loss, weighted nats, weighted targets, nats, targets, KL,
            gradient norm, steps.
    """

    step: int = 0
    skipped_steps: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 8)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        loss: what was minimised.
        nll: nats per target, unweighted.
        kl_ref: nats per target to the reference; nan where it was not computed.
        tokens: inputs, without padding.
        skipped: the loss or the gradient was not finite, and nothing was changed.
    """

    step: int
    loss: float
    nll: float
    kl_ref: float
    grad_norm: float
    learning_rate: float
    tokens: int
    skipped: bool


@dataclass(frozen=True)
class Ratio:
    """A mean per target and its standard error over records: targets of a record are not
    independent."""

    mean: float
    standard_error: float


_NOTHING = Ratio(math.nan, math.nan)


@dataclass(frozen=True)
class EpochMetrics:
    """An epoch. Likelihoods are in nats per target; "weighted" is over the weighted records, which
    is comparable between weightings, as the loss is not. nan where there was nothing to measure.

    Attributes:
        loss: mean over the steps of what was minimised.
        train_nll, train_nll_weighted: while training.
        val_nll, val_nll_weighted: on held-out records.
        kl_ref: exact KL to the reference after held-out prefixes, per target.
        grad_norm: mean over the steps, before clipping.
        val_loss, val_accuracy: of DPO and KTO on held-out pairs or records: the loss, and how
            often the model's likelihood moved the right way.
    """

    epoch: int
    step: int
    loss: float
    train_nll: float
    train_nll_weighted: float
    val_nll: Ratio
    val_nll_weighted: Ratio
    kl_ref: Ratio
    grad_norm: float
    skipped_steps: int
    val_loss: Ratio = _NOTHING
    val_accuracy: Ratio = _NOTHING


@dataclass(frozen=True)
class _Work:
    """The examples of a step, the weight of each in the loss, and what the sum is divided by.

    Attributes:
        loss: where the sum only has the gradient of what is minimised, its value.
    """

    examples: np.ndarray
    weights: np.ndarray
    denominator: float
    loss: float | None = None


class RewardWeightedTrainer:
    """Minimises the weighted negative log-likelihood of records, one step at a time.

    L = sum_i w_i sum_t nll_it / (examples of the step * mean targets of an example)
        + kl_coef * the same of KL(model || reference), unweighted

    The mean is the whole training set's, so that neither the weights nor the lengths of a batch
    change the scale. What a step sees is a function of (seed, step); a run that goes on from
    `state()` and the model's weights repeats the one that was not interrupted bit for bit.

    Args:
        model: trained in place, on its device; its calibration no longer holds.
        examples: of the training records.
        weights: (R,) of records, none negative; all 1 is plain training.
        eval_examples, eval_weights: held-out records; weights default to 1.
        reference: a frozen model for KL; needed where kl_coef is not 0.
        dtype: of the products.
    Attributes:
        progress: where training is.
        total_steps, steps_per_epoch: optimizer steps.
    Raises: ValueError for weights that are negative or not finite, or of another number than the
        records; for examples that do not fit the model's context.
    """

    def __init__(
        self,
        model: GPT,
        config: RewardWeightedConfig,
        examples: Examples,
        weights: torch.Tensor | Sequence[float],
        *,
        eval_examples: Examples | None = None,
        eval_weights: torch.Tensor | Sequence[float] | None = None,
        reference: GPT | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.weights = _checked_weights(weights, examples, "weights")
        self._set_up(model, config, examples, len(examples), reference, dtype)
        self.eval_examples = eval_examples
        self.eval_weights = None
        if eval_examples is not None:
            ones = torch.ones(eval_examples.n_records)
            given = ones if eval_weights is None else eval_weights
            self.eval_weights = _checked_weights(given, eval_examples, "eval_weights")
        self._mean_targets = examples.n_targets / len(examples)

    def _set_up(
        self,
        model: GPT,
        config: RewardWeightedConfig,
        examples: Examples,
        units: int,
        reference: GPT | None,
        dtype: torch.dtype,
    ) -> None:
        """What every objective has; `units` is the number of things a batch is drawn from."""
        if config.kl_coef < 0:
            raise ValueError(f"kl_coef must not be negative, not {config.kl_coef:g}")
        if config.kl_coef and reference is None:
            raise ValueError("kl_coef needs a reference model")
        if reference is model:
            raise ValueError("the reference must be a copy: the model itself moves")
        if len(examples) and int(examples.lengths.max()) > model.config.block_size:
            raise ValueError("the examples were cut for a longer context than the model's")
        if not units:
            raise ValueError("there is nothing to train on")
        model.mark_calibration_stale()
        self.model, self.config, self.examples = model, config, examples
        self.reference, self.dtype = reference, dtype
        self.device = model.token_weight.device
        self.order = BatchOrder(units, 1, config.batch_size, config.seed)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.total_steps = self.steps_per_epoch * config.num_train_epochs
        warmup = config.warmup_steps
        self.warmup_steps = min(100, self.total_steps // 20) if warmup is None else warmup
        self.min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
        betas = (config.beta1, config.beta2)
        self.optimizer = make_optimizer(model, config.learning_rate, config.weight_decay, betas)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.progress = Progress()

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.progress.step // self.steps_per_epoch

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps

    def learning_rate(self, step: int) -> float:
        """Of a step; see `nanogpt.recipe.scheduled_rate`."""
        peak = self.config.learning_rate
        return scheduled_rate(step, self.total_steps, self.warmup_steps, peak, self.min_lr)

    def step(self) -> StepMetrics:
        """One optimizer step over the next batch."""
        progress = self.progress
        if progress.step % self.steps_per_epoch == 0:
            progress.sums = Progress().sums
        rate = self.learning_rate(progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        work = self._work(self.order.starts(progress.step))
        parts = self._parts(work.examples)
        sums = torch.zeros(5, dtype=torch.float64)
        for index, part in enumerate(parts):
            sums += self._backward(work, part, index)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        weighted, of_weighted, nats, kl = sums[1:].tolist()
        loss = float(sums[0]) if work.loss is None else work.loss
        finite = math.isfinite(loss + norm)
        if finite:
            self.scaler.step(self.optimizer)
        else:
            progress.skipped_steps += 1
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        targets = int(self.examples.counts[work.examples].sum())
        if finite:
            new = [loss, weighted, of_weighted, nats, targets, kl, norm, 1]
            progress.sums = [a + b for a, b in zip(progress.sums, new, strict=True)]
        return StepMetrics(
            step=progress.step,
            loss=loss,
            nll=nats / targets,
            kl_ref=kl / targets if self.config.kl_coef else math.nan,
            grad_norm=norm,
            learning_rate=rate,
            tokens=int(self.examples.lengths[work.examples].sum()),
            skipped=not finite,
        )

    def _work(self, units: np.ndarray) -> _Work:
        weights = self.weights[self.examples.records[units]]
        return _Work(units, weights, len(units) * self._mean_targets)

    def _parts(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Places in `chosen`, micro-batch by micro-batch."""
        limit = self.config.micro_batch_tokens or _most_tokens(self.model)
        return micro_batches(self.examples.lengths[chosen], limit)

    def _backward(self, work: _Work, part: np.ndarray, index: int) -> torch.Tensor:
        """Add a micro-batch's gradient. Returns: (5,) loss, weighted nats, weighted targets, nats,
        KL."""
        batch = self.examples.batch(work.examples[part]).to(self.device)
        logits = self._logits(batch, index)
        nats = row_nll(logits, batch.targets)
        weights = torch.from_numpy(work.weights[part]).to(self.device, nats.dtype)
        weighted = (nats * weights).sum()
        loss = weighted / work.denominator
        kl = torch.zeros((), device=self.device)
        if self.config.kl_coef:
            kl = token_kl(logits, self._reference_logits(batch), batch.targets != IGNORED).sum()
            loss = loss + self.config.kl_coef * kl / work.denominator
        self.scaler.scale(loss).backward()
        counts = torch.from_numpy(self.examples.counts[work.examples[part]]).to(self.device)
        sums = torch.stack([loss, weighted, (weights * counts).sum(), nats.sum(), kl])
        return sums.detach().cpu().to(torch.float64)

    def _logits(self, batch: Batch, index: int) -> torch.Tensor:
        if self.model.config.dropout:
            seed_dropout(self.config.seed, self.progress.step, index)
        with machine.autocast(self.device, self.dtype):
            logits = self.model(batch.tokens)[0]
        assert logits is not None
        return logits

    @torch.no_grad()
    def _reference_logits(self, batch: Batch) -> torch.Tensor:
        assert self.reference is not None
        self.reference.eval()
        with machine.autocast(self.device, self.dtype):
            return self.reference(batch.tokens)[0]

    def train_epoch(self, stop: Callable[[], bool] = lambda: False) -> EpochMetrics | None:
        """The rest of this epoch and its measurements; None where `stop` ended it between steps."""
        target = (self.epoch + 1) * self.steps_per_epoch
        while self.progress.step < target:
            if stop():
                return None
            self.step()
        return self.measure_epoch()

    def train(self) -> list[EpochMetrics]:
        """All epochs that are left."""
        metrics = []
        while not self.finished:
            epoch = self.train_epoch()
            assert epoch is not None
            metrics.append(epoch)
        return metrics

    def measure_epoch(self) -> EpochMetrics:
        """The sums of the steps so far in this epoch, and the held-out records now."""
        loss, weighted, of_weighted, nats, targets, _, norm, steps = self.progress.sums
        nll = nll_weighted = kl = _NOTHING
        if self.eval_examples is not None and self.eval_examples.n_records:
            assert self.eval_weights is not None
            held, counts, held_kl = _measure(
                self.model, self.eval_examples, self.reference, self.dtype
            )
            nll = ratio(held, counts)
            nll_weighted = ratio(held, counts, torch.from_numpy(self.eval_weights))
            if held_kl is not None:
                kl = ratio(held_kl, counts)
        return EpochMetrics(
            epoch=-(-self.progress.step // self.steps_per_epoch),
            step=self.progress.step,
            loss=_quotient(loss, steps),
            train_nll=_quotient(nats, targets),
            train_nll_weighted=_quotient(weighted, of_weighted),
            val_nll=nll,
            val_nll_weighted=nll_weighted,
            kl_ref=kl,
            grad_norm=_quotient(norm, steps),
            skipped_steps=self.progress.skipped_steps,
        )

    def state(self) -> dict[str, Any]:
        """All but the model's weights, in what torch.load(weights_only=True) reads."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`; the model's weights of that moment are the caller's to load."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])


class _AgainstReference(RewardWeightedTrainer):
    """Objectives of whole records' log-likelihoods, measured against a reference's.

    A record may have several windows and a batch several micro-batches, while the loss of a pair
    needs both sums at once. So a step is two passes: log-likelihoods without gradient, the loss's
    derivative by each of them, and then a weighted likelihood with these as weights, which has the
    same gradient.
    """

    def _follow(
        self,
        model: GPT,
        config: RewardWeightedConfig,
        examples: Examples,
        units: int,
        reference: GPT,
        eval_examples: Examples | None,
        dtype: torch.dtype,
    ) -> None:
        if config.kl_coef:
            raise ValueError("DPO and KTO have their own price of KL, beta: kl_coef must be 0")
        self._set_up(model, config, examples, units, reference, dtype)
        self.eval_examples = eval_examples
        self.eval_weights = None
        if eval_examples is not None:
            self.eval_weights = np.ones(eval_examples.n_records)
            self._eval_reference = -record_nll(reference, eval_examples, dtype=dtype)[0]
        self._of_reference = -record_nll(reference, examples, dtype=dtype)[0]

    def _differentiate(
        self, records: np.ndarray, loss_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> _Work:
        """The work whose gradient is that of `loss_of` the records' log-ratios to the reference.

        Args:
            records: (n,), repetitions allowed.
            loss_of: (n,) float64 log-ratios -> scalar.
        """
        first = self.examples.first_examples
        slots = np.repeat(np.arange(len(records)), first[records + 1] - first[records])
        chosen = self.examples.examples_of(records)
        log_p = torch.zeros(len(records), dtype=torch.float64)
        with torch.no_grad():
            for index, part in enumerate(self._parts(chosen)):
                batch = self.examples.batch(chosen[part]).to(self.device)
                nats = row_nll(self._logits(batch, index), batch.targets).cpu()
                log_p.index_add_(0, torch.from_numpy(slots[part]), -nats.to(torch.float64))
        log_ratios = (log_p - self._of_reference[records]).requires_grad_()
        loss = loss_of(log_ratios)
        (slope,) = torch.autograd.grad(loss, log_ratios)
        return _Work(chosen, -slope.numpy()[slots], 1.0, float(loss.detach()))

    def measure_epoch(self) -> EpochMetrics:
        metrics = super().measure_epoch()
        if self.eval_examples is None:
            return metrics
        log_p = -record_nll(self.model, self.eval_examples, dtype=self.dtype)[0]
        losses, right = self._judge(log_p - self._eval_reference)
        ones = torch.ones(len(losses))
        return replace(metrics, val_loss=ratio(losses, ones), val_accuracy=ratio(right, ones))

    def _judge(self, log_ratios: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of held-out records: losses, and 1 where the model moved the right way."""
        raise NotImplementedError


class PreferenceTrainer(_AgainstReference):
    """Direct preference optimization: of each pair, the first becomes likelier than the second.

    Args:
        model: trained in place; the same weights as `reference` to begin with, as a rule.
        config: `beta` is the price of KL, usually 0.1; `batch_size` counts pairs.
        pairs: (n, 2) of records, the better one first; see `preference_pairs`.
        reference: frozen, and another object than the model.
        eval_examples, eval_pairs: held-out ones.
    Raises: ValueError as `RewardWeightedTrainer`; for pairs of records that do not exist.
    """

    def __init__(
        self,
        model: GPT,
        config: RewardWeightedConfig,
        examples: Examples,
        pairs: np.ndarray,
        *,
        reference: GPT,
        eval_examples: Examples | None = None,
        eval_pairs: np.ndarray | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.pairs = _checked_pairs(pairs, examples.n_records)
        held = 0 if eval_examples is None else eval_examples.n_records
        empty = np.empty((0, 2), dtype=np.int64)
        self.eval_pairs = _checked_pairs(empty if eval_pairs is None else eval_pairs, held)
        self._follow(model, config, examples, len(pairs), reference, eval_examples, dtype)

    def _work(self, units: np.ndarray) -> _Work:
        pairs = self.pairs[units]
        n = len(pairs)
        return self._differentiate(
            pairs.T.reshape(-1), lambda ratios: self._losses(ratios[:n], ratios[n:]).mean()
        )

    def _losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(chosen)
        return dpo_loss(chosen, rejected, zero, zero, self.config.beta)

    def _judge(self, log_ratios: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = log_ratios[self.eval_pairs[:, 0]], log_ratios[self.eval_pairs[:, 1]]
        return self._losses(chosen, rejected), (chosen > rejected).double()


class LabelTrainer(_AgainstReference):
    """Kahneman-Tversky optimization: good records become likelier, bad ones less likely.

    A text of which more copies are good than bad gains without end, however few more: the learning
    rate and the epochs decide how far it goes.

    Args:
        model: trained in place; the same weights as `reference` to begin with, as a rule.
        config: `beta` is the price of KL, usually 0.1; `batch_size` counts records.
        desirable: (R,) bool; see `binary_labels`.
        reference: frozen, and another object than the model.
        mismatched: examples of `nanogpt.records.mismatched_records`, for the baseline; None where
            records have no prompts, when the texts of a batch serve as each other's mismatches.
        eval_examples, eval_desirable: held-out ones.
    Raises: ValueError as `RewardWeightedTrainer`; for another number of labels than of records.
    """

    def __init__(
        self,
        model: GPT,
        config: RewardWeightedConfig,
        examples: Examples,
        desirable: np.ndarray | Sequence[bool],
        *,
        reference: GPT,
        mismatched: Examples | None = None,
        eval_examples: Examples | None = None,
        eval_desirable: np.ndarray | Sequence[bool] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.desirable = torch.as_tensor(desirable, dtype=torch.bool)
        held = 0 if eval_examples is None else eval_examples.n_records
        given = [] if eval_desirable is None else eval_desirable
        self.eval_desirable = torch.as_tensor(given, dtype=torch.bool)
        wanted = [examples.n_records, held]
        if [len(self.desirable), len(self.eval_desirable)] != wanted:
            raise ValueError(f"labels must be one a record: {wanted[0]}, and {wanted[1]} held out")
        if mismatched is not None and mismatched.n_records != examples.n_records:
            raise ValueError("mismatched must have a record for each one that trains")
        self._follow(model, config, examples, examples.n_records, reference, eval_examples, dtype)
        self.mismatched = mismatched
        if mismatched is not None:
            self._of_mismatched = -record_nll(reference, mismatched, dtype=dtype)[0]

    def _work(self, units: np.ndarray) -> _Work:
        baseline = None
        if self.mismatched is not None:
            log_p = -record_nll(self.model, self.mismatched.of_records(units), dtype=self.dtype)[0]
            baseline = (log_p - self._of_mismatched[units]).mean()
        labels = self.desirable[units]
        return self._differentiate(
            units, lambda ratios: self._losses(ratios, labels, baseline).mean()
        )

    def _losses(
        self, log_ratios: torch.Tensor, labels: torch.Tensor, baseline: torch.Tensor | None
    ) -> torch.Tensor:
        config = self.config
        return kto_loss(
            log_ratios,
            labels,
            log_ratios.mean() if baseline is None else baseline,
            config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )

    def _judge(self, log_ratios: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        labels = self.eval_desirable
        return self._losses(log_ratios, labels, None), ((log_ratios > 0) == labels).double()


def ratio(sums: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor | None = None) -> Ratio:
    """sum w s / sum w c over records, with the standard error of a ratio clustered by record.

    Args:
        sums: (R,) of each record's targets; counts: (R,) targets; weights: (R,) or None for 1.
    Source: Cochran 1977, Sampling techniques, section 6.4.
    """
    sums, counts = sums.to(torch.float64), counts.to(torch.float64)
    w = torch.ones_like(sums) if weights is None else weights.to(torch.float64)
    total, n = float((w * counts).sum()), len(sums)
    if not total:
        return _NOTHING
    mean = float((w * sums).sum()) / total
    if n < 2:
        return Ratio(mean, math.nan)
    error = math.sqrt(n / (n - 1) * float((w * (sums - mean * counts)).square().sum())) / total
    return Ratio(mean, error)


def record_nll(
    model: GPT, examples: Examples, *, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each record's counted targets, and their number.

    Returns: (R,) float64 nats; (R,) int64.
    """
    nats, counts, _ = _measure(model, examples, None, dtype)
    return nats, counts


@torch.no_grad()
def _measure(
    model: GPT, examples: Examples, reference: GPT | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of each record: nats, targets, and KL to a reference where there is one."""
    was_training = model.training
    model.eval()
    device = model.token_weight.device
    nats = torch.zeros(examples.n_records, dtype=torch.float64)
    kl = None if reference is None else torch.zeros_like(nats)
    for part in micro_batches(examples.lengths, _most_tokens(model)):
        batch = examples.batch(part).to(device)
        records = torch.from_numpy(examples.records[part])
        with machine.autocast(device, dtype):
            logits = model(batch.tokens)[0]
            theirs = None if reference is None else reference.eval()(batch.tokens)[0]
        nats.index_add_(0, records, row_nll(logits, batch.targets).cpu().to(torch.float64))
        if kl is not None and theirs is not None:
            each = token_kl(logits, theirs, batch.targets != IGNORED).sum(1)
            kl.index_add_(0, records, each.cpu().to(torch.float64))
    model.train(was_training)
    return nats, torch.from_numpy(examples.record_counts.copy()), kl


def _most_tokens(model: GPT) -> int:
    """Tokens of a micro-batch whose logits fit."""
    kind = model.token_weight.device.type
    logit_bytes = _MOST_LOGIT_BYTES.get(kind, _MOST_LOGIT_BYTES_ELSEWHERE)
    fit = logit_bytes // (4 * model.config.vocab_size)
    return max(1, min(_MOST_TOKENS.get(kind, _MOST_TOKENS_ELSEWHERE), fit))


def _checked_weights(
    weights: torch.Tensor | Sequence[float], examples: Examples, name: str
) -> np.ndarray:
    values = torch.as_tensor(weights, dtype=torch.float64).detach().cpu().numpy()
    if values.shape != (examples.n_records,):
        raise ValueError(f"{name} {values.shape} must be ({examples.n_records},): one a record")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(
            f"{name} must be finite and not negative: a negative weight rewards unlikelihood "
            f"without end (use the KTO objective against bad texts)"
        )
    return values


def _checked_pairs(pairs: np.ndarray, n_records: int) -> np.ndarray:
    values = np.asarray(pairs, dtype=np.int64)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"pairs {values.shape} must be (n, 2): the better record first")
    if len(values) and not 0 <= values.min() <= values.max() < n_records:
        raise ValueError(f"pairs name records outside 0 to {n_records - 1}")
    return values


def _quotient(total: float, count: float) -> float:
    return total / count if count else math.nan
