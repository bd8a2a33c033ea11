"""A reward model on the model's own frozen weights, for steering while it writes.

A small head predicts, from the hidden state of the very pass that makes the logits, what the reward
of the text will be for every next token at once:

    f(h, x) = <v, h> + <W h, e_x> + b_x + c

h is the last hidden state before the token x, and e_x its embedding. So all candidates of a step
cost one small matrix product, and no second pass. It is fitted on every prefix of rewarded texts,
because a model of finished texts alone knows nothing of beginnings.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from nanogpt import metadata
from nanogpt.checkpoint import write_atomically
from nanogpt.decoding import window_start
from nanogpt.errors import InputError, UsageError
from nanogpt.judge import auroc, correlation
from nanogpt.model import GPT, evaluating
from nanogpt.records import IGNORED, Examples, encode_records, split_records
from nanogpt.reward_data import RewardRecord
from nanogpt.rewards import PrefixReward, RewardState
from nanogpt.tokenizer import Tokenizer

_FORMAT = "nanogpt-reward-model-1"
_KEY = "nanogpt_reward_model"
_LEAST_RECORDS = 20
# Hidden states of the records are kept for all epochs where they fit into this many bytes.
_KEPT_BYTES = 2**31
_SCORED_AT_ONCE = 64


class RewardHead(nn.Module):
    """f(h, x) = <v, h> + <W h, e_x> + b_x + c, all zero at first.

    Args:
        n_embd: C.
        vocab_size: V.
    """

    def __init__(self, n_embd: int, vocab_size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(n_embd))
        self.mix = nn.Parameter(torch.zeros(n_embd, n_embd))
        self.token = nn.Parameter(torch.zeros(vocab_size))
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(
        self, hidden: torch.Tensor, tokens: torch.Tensor, token_weight: torch.Tensor
    ) -> torch.Tensor:
        """f of some tokens: hidden (…, C), tokens (…) int64, token_weight (V, C) -> (…)."""
        of_token = (F.linear(hidden, self.mix) * token_weight[tokens]).sum(-1)
        return hidden @ self.value + of_token + self.token[tokens] + self.offset

    def candidates(self, hidden: torch.Tensor, token_weight: torch.Tensor) -> torch.Tensor:
        """f of all tokens: hidden (B, C), token_weight (V, C) -> (B, V)."""
        of_token = F.linear(F.linear(hidden, self.mix), token_weight)
        return (hidden @ self.value)[:, None] + of_token + self.token + self.offset


@dataclass(frozen=True)
class RewardModelQuality:
    """How well a reward model predicts texts that it was not fitted on.

    Attributes:
        n_fitted, n_held_out: records.
        epochs: passes over the records until the best one.
        loss: on held-out texts, over all prefixes, later ones weighing more.
        loss_of_constant: the same of the best constant prediction on the fitted texts.
        correlation, auroc: at the end of held-out texts, of predictions and rewards; the second is
            the chance that a text of more than the mean reward scores above one of less.
        correlation_at_half, auroc_at_half: the same with half of each text seen.
    """

    n_fitted: int
    n_held_out: int
    epochs: int
    loss: float
    loss_of_constant: float
    correlation: float
    auroc: float
    correlation_at_half: float
    auroc_at_half: float


class RewardModel(PrefixReward):
    """Predicts the reward of a text from its beginning; a `Reward` of decoding.

    Args:
        model: the GPT whose hidden states it reads; it writes with this model alone.
        head: a fitted head.
        low, high: the range of the rewards that it was fitted on; predictions stay within.
        two_valued: whether the head's values are log-odds of `high`; else they are rewards in
            standard deviations, of which `mean` and `deviation` are the unit.
        quality: on held-out texts, or None.
        weights_sha256: of the model's weights when it was fitted.
    """

    scores_all = True
    reads_hidden = True

    def __init__(
        self,
        model: GPT,
        head: RewardHead,
        *,
        low: float,
        high: float,
        two_valued: bool,
        mean: float,
        deviation: float,
        quality: RewardModelQuality | None = None,
        weights_sha256: str = "",
    ) -> None:
        self.__name__ = "reward_model"
        self.model, self.head = model, head
        self.low, self.high, self.two_valued = low, high, two_valued
        self.mean, self.deviation, self.quality = mean, deviation, quality
        self.weights_sha256 = weights_sha256 or weights_digest(model)
        self._seen = _versions(model)

    def predicted(self, f: torch.Tensor) -> torch.Tensor:
        """Rewards, float64, from the head's values."""
        f = f.to(torch.float64)
        if self.two_valued:
            return self.low + (self.high - self.low) * f.sigmoid()
        return (self.mean + self.deviation * f).clamp(self.low, self.high)

    def check_model(self, model: Any) -> None:
        if model is self.model and _versions(model) == self._seen:
            return
        if weights_digest(model) != self.weights_sha256:
            raise ValueError("the reward model was fitted on other weights than this model's")

    def begin(self, prompt: torch.Tensor) -> RewardState:
        return _HeadState(self, len(prompt), prompt.device)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.values(tokens, 0, ()).to(torch.float32)

    def values(
        self, texts: torch.Tensor, prompt_length: int, owners: Sequence[int]
    ) -> torch.Tensor:
        """Predictions for ids (N, T), T at least 2, as decoding sees them: (N,) float64."""
        del prompt_length, owners  # a prompt is part of what the model reads
        length = texts.shape[1]
        if length < 2:
            raise ValueError("a reward model reads the token before the last: two ids at least")
        start = window_start(length - 1, self.model.config.block_size)
        with torch.inference_mode(), evaluating(self.model):
            hidden = self.model.next_hidden(texts[:, start:-1])
            f = self.head(hidden, texts[:, -1], self.model.token_weight)
        return self.predicted(f)

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> torch.Tensor:
        """Predicted rewards of finished texts, (n,) float64.

        Raises: InputError for a character that the vocabulary lacks.
        """
        before = [""] * len(texts) if prompts is None else prompts
        pairs = zip(texts, before, strict=True)
        records = [RewardRecord(text, 0.0, prompt) for text, prompt in pairs]
        examples = encode_records(records, _tokenizer(self.model), self.model.config.block_size)
        scores = torch.zeros(len(texts), dtype=torch.float64)
        order = np.argsort(examples.lengths, kind="stable")
        for chosen in np.array_split(order, max(1, -(-len(order) // _SCORED_AT_ONCE))):
            part = _read(self.model, examples, chosen)
            with torch.inference_mode():
                f = self.head(part.hidden, part.tokens, self.model.token_weight)
            scores[part.records[part.last].cpu()] = self.predicted(f[part.last]).cpu()
        return scores

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the head to a .safetensors file; the model itself is not in it.

        Raises: UsageError for another ending; OSError where the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise UsageError(f"{path}: a reward model is a .safetensors file")
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.head.state_dict().items()}
        content = {
            "format": _FORMAT,
            "weights_sha256": self.weights_sha256,
            "head_sha256": metadata.tensor_digest(tensors),
            "low": self.low,
            "high": self.high,
            "two_valued": self.two_valued,
            "mean": self.mean,
            "deviation": self.deviation,
            "quality": None if self.quality is None else asdict(self.quality),
        }
        content["sha256"] = hashlib.sha256(metadata.canonical_json(content)).hexdigest()
        raw = safetensors.torch.save(tensors, {_KEY: metadata.canonical_json(content).decode()})
        write_atomically(path, lambda file: file.write(raw))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: GPT) -> "RewardModel":
        """Read a head for the model that it was fitted on.

        Raises: InputError where the file is missing, damaged or none of ours, or belongs to other
            weights than the model's.
        """
        tensors, content = _read_file(Path(path))
        if content["weights_sha256"] != weights_digest(model):
            raise InputError(f"{path} was fitted on other weights than this model's")
        head = RewardHead(model.config.n_embd, model.config.vocab_size)
        head.load_state_dict(tensors)
        quality = content["quality"]
        return cls(
            model,
            head.to(model.token_weight.device),
            quality=None if quality is None else RewardModelQuality(**quality),
            **{name: content[name] for name in _PLAIN},
        )


_PLAIN = ("low", "high", "two_valued", "mean", "deviation", "weights_sha256")


class _HeadState(RewardState):
    """Predictions of the step under way, and of the texts before it."""

    def __init__(self, reward: RewardModel, rows: int, device: torch.device) -> None:
        self.reward = reward
        self.value = torch.zeros(rows, dtype=torch.float64, device=device)
        self.predictions: torch.Tensor | None = None

    def see(self, hidden: torch.Tensor) -> None:
        with torch.no_grad():
            f = self.reward.head.candidates(hidden, self.reward.model.token_weight)
        self.predictions = self.reward.predicted(f)  # (B, V)

    def candidates(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        if self.predictions is None:
            raise ValueError("a reward model reads hidden states; this decoding gives none")
        steps = self.predictions - self.value[:, None]
        return steps if ids is None else steps.gather(1, ids)

    def advance(self, tokens: torch.Tensor) -> None:
        assert self.predictions is not None
        self.value = self.predictions.gather(1, tokens[:, None])[:, 0]

    def select(self, rows: torch.Tensor) -> None:
        self.value = self.value[rows]
        if self.predictions is not None:
            self.predictions = self.predictions[rows]


def fit_reward_model(
    model: GPT,
    records: Sequence[RewardRecord | tuple[str, float]],
    *,
    val_fraction: float = 0.1,
    epochs: int = 20,
    patience: int = 3,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> RewardModel:
    """Fit a reward model on rewarded texts; the model itself stays as it is.

    Every prefix of a record predicts the record's reward r. Prefix t of n has the weight
    t / (n (n + 1) / 2), so that every record counts once and later prefixes more. Two-valued
    rewards are fitted by logistic regression, others by least squares in standard deviations. Both
    are convex in the head. The passes end once the held-out loss has not improved for `patience` of
    them, and the best head is kept.

    Args:
        model: with a tokenizer.
        records: (text, reward) pairs or RewardRecords, 20 at least.
        val_fraction: of the records, held out; records of one text stay together.
        epochs: passes at most.
        batch_size: records side by side, padded on the right and never mixed.
        learning_rate, weight_decay: of AdamW.
        seed: of the split and of the order.
        progress: is told the epoch, from 1, and the held-out loss.
    Raises: ValueError for arguments out of range, too few records, equal or not finite rewards, or
        a model without a tokenizer; InputError for a text that its vocabulary lacks.
    Source: Deng and Raffel 2023, RAD (arXiv:2310.09520), section 2 (loss on all prefixes); Troshin
        et al. 2024, ARM (arXiv:2407.04615) (all candidates from one state).
    """
    rows = [r if isinstance(r, RewardRecord) else RewardRecord(r[0], float(r[1])) for r in records]
    target = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    _check(model, target, val_fraction, epochs, patience, batch_size, learning_rate, weight_decay)
    rest, held = split_records(rows, val_fraction, seed)
    if len(held) < 2:
        raise ValueError("nothing can be held out, because all records belong together")
    examples = encode_records(rows, _tokenizer(model), model.config.block_size)
    low, high = float(target.min()), float(target.max())
    two_valued = len(target.unique()) == 2
    of_rest = target[torch.from_numpy(rest)]
    mean, deviation = float(of_rest.mean()), float(of_rest.std(unbiased=False)) or 1.0
    scaled = (target - low) / (high - low) if two_valued else (target - mean) / deviation
    scaled = scaled.float().to(model.token_weight.device)
    head = RewardHead(model.config.n_embd, model.config.vocab_size).to(scaled.device)
    fitted = RewardModel(
        model, head, low=low, high=high, two_valued=two_valued, mean=mean, deviation=deviation
    )
    shuffled = np.random.default_rng((seed, len(rows)))
    training = _Prefixes(model, examples.of_records(rest), scaled[torch.from_numpy(rest)],
                         batch_size, shuffled)  # fmt: skip
    heldout = _Prefixes(model, examples.of_records(held), scaled[torch.from_numpy(held)],
                        batch_size, None)  # fmt: skip
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    best_loss, best_epoch = heldout.loss(fitted), 0
    best = {name: value.clone() for name, value in head.state_dict().items()}
    for epoch in range(1, epochs + 1):
        for part, goal in training:
            optimizer.zero_grad()
            loss = _losses(fitted, part, goal).sum() / batch_size
            loss.backward()
            optimizer.step()
        loss_now = heldout.loss(fitted)
        if progress is not None:
            progress(epoch, loss_now)
        if loss_now < best_loss:
            best_loss, best_epoch = loss_now, epoch
            best = {name: value.clone() for name, value in head.state_dict().items()}
        elif epoch - best_epoch >= patience:
            break
    head.load_state_dict(best)
    head.requires_grad_(False)
    fitted.quality = _quality(
        fitted, heldout, target[torch.from_numpy(held)], len(rest), best_epoch
    )
    return fitted


@dataclass(frozen=True)
class _Part:
    """Some prefixes: hidden state before the last token, that token, whose, and how far along.

    hidden (n, C), tokens (n,), records (n,); weights (n,), which add up to 1 over a record; half
    and last (n,) bool, whether half the record has just been read, or all.
    """

    hidden: torch.Tensor
    tokens: torch.Tensor
    records: torch.Tensor
    weights: torch.Tensor
    half: torch.Tensor
    last: torch.Tensor


def _read(model: GPT, examples: Examples, chosen: np.ndarray) -> _Part:
    """One pass of the model over some examples, side by side."""
    batch = examples.batch(chosen).to(model.token_weight.device)
    with torch.inference_mode(), evaluating(model):
        hidden = model.hidden_states(batch.tokens)  # (B, T, C)
    counted = batch.targets != IGNORED
    # The number of a target within its record: windows of a record follow each other.
    before = np.cumsum(examples.counts) - examples.counts
    first = examples.first_examples[examples.records[chosen]]
    offset = torch.from_numpy(before[chosen] - before[first]).to(counted.device)
    number = offset[:, None] + counted.cumsum(1)
    total = torch.from_numpy(examples.record_counts).to(counted.device)
    owner = batch.records[:, None].expand_as(counted)[counted]
    n, t = total[owner], number[counted]
    weights = 2 * t.double() / (n * (n + 1)).double()
    return _Part(
        hidden[counted].float(),
        batch.targets[counted],
        owner,
        weights.float(),
        t == (n + 1) // 2,
        t == n,
    )


class _Prefixes:
    """Parts of some records with their goals, in an order drawn anew for every pass.

    Which records are side by side is settled once, so that their hidden states can be kept.
    """

    def __init__(
        self,
        model: GPT,
        examples: Examples,
        goals: torch.Tensor,
        batch_size: int,
        shuffled: np.random.Generator | None,
    ) -> None:
        self.model, self.examples, self.goals, self.shuffled = model, examples, goals, shuffled
        order = np.arange(len(examples))
        if shuffled is not None:
            shuffled.shuffle(order)
        order = order[np.argsort(examples.lengths[order], kind="stable")]
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self.keeps = examples.n_targets * model.config.n_embd * 4 <= _KEPT_BYTES
        self.kept: dict[int, _Part] = {}

    def __iter__(self) -> Iterator[tuple[_Part, torch.Tensor]]:
        order = np.arange(len(self.batches))
        if self.shuffled is not None:
            self.shuffled.shuffle(order)
        for place in order.tolist():
            part = self.kept.get(place)
            if part is None:
                part = _read(self.model, self.examples, self.batches[place])
                if self.keeps:
                    self.kept[place] = part
            yield part, self.goals[part.records]

    def loss(self, fitted: RewardModel) -> float:
        """Mean over the records."""
        with torch.no_grad():
            total = sum(float(_losses(fitted, *both).sum()) for both in self)
        return total / self.examples.n_records


def _losses(fitted: RewardModel, part: _Part, goals: torch.Tensor) -> torch.Tensor:
    """(n,): weighted losses, which add up to a record's."""
    f = fitted.head(part.hidden, part.tokens, fitted.model.token_weight.detach())
    if fitted.two_valued:
        each = F.binary_cross_entropy_with_logits(f, goals, reduction="none")
    else:
        each = (f - goals).square()
    return each * part.weights


@torch.no_grad()
def _quality(
    fitted: RewardModel, heldout: _Prefixes, target: torch.Tensor, n_fitted: int, epochs: int
) -> RewardModelQuality:
    n = heldout.examples.n_records
    at_end = torch.zeros(n, dtype=torch.float64)
    at_half = torch.zeros(n, dtype=torch.float64)
    for part, _ in heldout:
        f = fitted.head(part.hidden, part.tokens, fitted.model.token_weight)
        predicted, owner = fitted.predicted(f).cpu(), part.records.cpu()
        for at, mask in ((at_end, part.last.cpu()), (at_half, part.half.cpu())):
            at[owner[mask]] = predicted[mask]
    above = target > target.mean()
    return RewardModelQuality(
        n_fitted,
        n,
        epochs,
        heldout.loss(fitted),
        heldout.loss(_constant(fitted)),
        correlation(at_end, target),
        auroc(at_end, above),
        correlation(at_half, target),
        auroc(at_half, above),
    )


def _constant(fitted: RewardModel) -> RewardModel:
    """The model that predicts the mean reward of the fitted records, whatever it reads."""
    head = RewardHead(fitted.model.config.n_embd, fitted.model.config.vocab_size)
    if fitted.two_valued:  # for least squares it is zero already
        share = (fitted.mean - fitted.low) / (fitted.high - fitted.low)
        share = min(max(share, 1e-6), 1 - 1e-6)  # one of the two may be held out as a whole
        head.offset.data.fill_(math.log(share) - math.log1p(-share))
    plain = {name: getattr(fitted, name) for name in _PLAIN}
    return RewardModel(fitted.model, head.to(fitted.model.token_weight.device), **plain)


def _versions(model: GPT) -> list[tuple[int, int]]:
    """Where the weights are and how often they have changed, as torch counts it."""
    return [
        (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
        for weight in model.parameters()
    ]


def weights_digest(model: GPT) -> str:
    """SHA-256 (hex) of a model's weights, as its file has it."""
    tensors = {k: v for k, v in model.state_dict().items() if k != metadata.KEY}
    return metadata.tensor_digest(tensors)


def _tokenizer(model: GPT) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("a reward model needs the model's tokenizer: load it with nanogpt.load")
    return model.tokenizer


def _check(
    model: GPT,
    target: torch.Tensor,
    val_fraction: float,
    epochs: int,
    patience: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
) -> None:
    _tokenizer(model)
    if len(target) < _LEAST_RECORDS:
        raise ValueError(f"a reward model needs {_LEAST_RECORDS} records, not {len(target)}")
    if not bool(target.isfinite().all()):
        raise ValueError("a reward is not finite")
    if bool((target == target[0]).all()):
        raise ValueError("all rewards are equal, so there is nothing to learn from them")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be above 0 and below 1, not {val_fraction}")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate must be above 0, not {learning_rate}")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay must be at least 0, not {weight_decay}")
    for name, value in (("epochs", epochs), ("patience", patience), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and content of a file, verified."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or no .safetensors file: {error}") from None
    if text is None:
        raise InputError(f"{path} is no reward model")
    try:
        content = metadata.from_bytes(text.encode())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    unsealed = {name: value for name, value in content.items() if name != "sha256"}
    if content.get("sha256") != hashlib.sha256(metadata.canonical_json(unsealed)).hexdigest():
        raise InputError(f"{path} is damaged: its metadata does not match its SHA-256")
    if content["format"] != _FORMAT:
        raise InputError(f"{path} has the format {content['format']!r}, not {_FORMAT!r}")
    if content["head_sha256"] != metadata.tensor_digest(tensors):
        raise InputError(f"{path} is damaged: its weights do not match their SHA-256")
    return tensors, content
