"""Whether weighting helped: models side by side, judged by what none of them has seen.

Every figure comes with a 95 % interval; differences against plain training are taken text by text
where both models see the same texts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nanogpt.decoding import generate
from nanogpt.judge import BagOfWordsJudge
from nanogpt.model import GPT
from nanogpt.offline_rl import record_nll, token_kl
from nanogpt.records import Examples
from nanogpt.text_measures import distinct_n

_Z95 = 1.959963984540054
_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        n: independent values behind it.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: torch.Tensor) -> "Estimate":
        """The mean of independent values (n,), n at least 2; the interval is the normal one."""
        values = values.to(torch.float64)
        half = _Z95 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        mean = float(values.mean())
        return cls(mean, mean - half, mean + half, len(values))

    @classmethod
    def of_difference(cls, ours: torch.Tensor, theirs: torch.Tensor) -> "Estimate":
        """mean(ours) - mean(theirs) of two independent samples, with Welch's variance."""
        ours, theirs = ours.to(torch.float64), theirs.to(torch.float64)
        mean = float(ours.mean() - theirs.mean())
        variance = float(ours.var() / len(ours) + theirs.var() / len(theirs))
        half = _Z95 * math.sqrt(variance)
        return cls(mean, mean - half, mean + half, len(ours) + len(theirs))

    @property
    def outside_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Arm:
    """One model of a comparison.

    Attributes:
        reward: judged rewards of its samples.
        above_plain: its mean judged reward minus plain training's.
        kl_to_plain: exact KL along its own samples, nats a text; None for plain training.
        distinct: different n-grams over all n-grams of its samples, for n = 1, 2, 3.
        length: tokens of a sample.
        nll: held-out nats a token over all records.
        nll_high, nll_low: on records of more, and of less, than the mean reward: this model minus
            plain training, nats a text, paired; None for plain training.
        samples: some texts.
    """

    name: str
    reward: Estimate
    above_plain: Estimate | None
    kl_to_plain: Estimate | None
    distinct: tuple[float, float, float]
    length: float
    nll: float
    nll_high: Estimate | None
    nll_low: Estimate | None
    samples: tuple[str, ...]


def compare(
    models: Mapping[str, GPT],
    judge: BagOfWordsJudge,
    unseen: Examples,
    rewards: torch.Tensor,
    *,
    n_samples: int,
    max_new_tokens: int,
    seed: int,
    prompts: Sequence[str] = (),
    say: Callable[[str], None] = lambda message: None,
) -> list[Arm]:
    """Judge models by their samples and by records that none of them has seen.

    Args:
        models: by name; the first is plain training.
        judge: fitted on other texts than the models.
        unseen: examples of held-out records; `rewards` (records,) are theirs.
        prompts: texts to continue, taken in turn; without any, samples begin as records do.
    """
    plain_name = next(iter(models))
    plain = models[plain_name]
    plain_nll, counts = record_nll(plain, unseen)
    high = rewards > rewards.mean()
    arms: list[Arm] = []
    plain_scores = torch.empty(0)
    for name, model in models.items():
        say(f"{name}: writing {n_samples:,} texts")
        starts, new = write_samples(model, n_samples, max_new_tokens, seed=seed, prompts=prompts)
        tokenizer = model.tokenizer
        assert tokenizer is not None
        texts = [tokenizer.decode(ids) for ids in new]
        scores = judge.score(texts)
        own = model is plain
        nll = plain_nll if own else record_nll(model, unseen)[0]
        if own:
            plain_scores = scores
        arms.append(
            Arm(
                name=name,
                reward=Estimate.of(scores),
                above_plain=None if own else Estimate.of_difference(scores, plain_scores),
                kl_to_plain=None
                if own
                else Estimate.of(sequence_kl(model, plain, starts, new, max_new_tokens)),
                distinct=(distinct_n(texts, 1), distinct_n(texts, 2), distinct_n(texts, 3)),
                length=sum(map(len, new)) / len(new),
                nll=float(nll.sum() / counts.sum()),
                nll_high=None if own else Estimate.of((nll - plain_nll)[high]),
                nll_low=None if own else Estimate.of((nll - plain_nll)[~high]),
                samples=tuple(texts[:5]),
            )
        )
    return arms


def write_samples(
    model: GPT, n: int, max_new_tokens: int, *, seed: int, prompts: Sequence[str] = ()
) -> tuple[list[list[int]], list[list[int]]]:
    """n texts at temperature 1 without filters: the ids they begin with, and the new ids.

    A text ends before its end-of-text token, or after `max_new_tokens`. Row i is a function of
    (seed, i) and its prompt alone.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None
    end = tokenizer.end_of_text_id
    beginnings = [[end, *tokenizer.encode(text)] for text in prompts] or [[end]]
    starts = [beginnings[row % len(beginnings)] for row in range(n)]
    config = model.config
    row_bytes = 2 * 4 * config.n_layer * config.block_size * config.n_embd
    most = max(1, min(256, _CACHE_BYTES // row_bytes))
    new: list[list[int]] = [[] for _ in range(n)]
    # Rows of one batch have prompts of one length.
    by_length: dict[int, list[int]] = {}
    for row, start in enumerate(starts):
        by_length.setdefault(len(start), []).append(row)
    for rows in by_length.values():
        first = 0
        while first < len(rows):
            # Row numbers of a batch must follow each other, because they number the draws.
            last = first + 1
            while (
                last < len(rows)
                and last - first < most
                and rows[last] - rows[first] == last - first
            ):
                last += 1
            batch = rows[first:last]
            tokens = torch.tensor([starts[row] for row in batch], device=model.token_weight.device)
            out = generate(
                model,
                tokens,
                max_new_tokens,
                seed=seed,
                first_row=batch[0],
                eos_token_id=end,
            )
            assert isinstance(out, torch.Tensor)
            for row, ids in zip(batch, out[:, tokens.shape[1] :].tolist(), strict=True):
                new[row] = ids[: ids.index(end)] if end in ids else ids
            first = last
    return starts, new


@torch.inference_mode()
def sequence_kl(
    model: GPT,
    reference: GPT,
    starts: Sequence[Sequence[int]],
    new: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> torch.Tensor:
    """KL(model || reference) of whole texts, estimated along the model's own samples.

    At every step the KL of the next token is exact, over the whole vocabulary; its sum over a
    sample has the sequences' KL as its mean. What lies beyond the context is not counted.

    Args:
        new: without the end-of-text token; a text that is shorter than `max_new_tokens` drew it.
    Returns: (n,) float64, nats.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None
    block, device = model.config.block_size, model.token_weight.device
    out = torch.zeros(len(new), dtype=torch.float64)
    order = sorted(range(len(new)), key=lambda row: len(starts[row]) + len(new[row]))
    for first in range(0, len(order), 32):
        rows = order[first : first + 32]
        texts = [[*starts[row], *new[row]][:block] for row in rows]
        width = max(map(len, texts))
        filled = [text + [tokenizer.end_of_text_id] * (width - len(text)) for text in texts]
        tokens = torch.tensor(filled, device=device)
        mask = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            first_drawn = len(starts[row]) - 1
            drawn = min(len(new[row]) + 1, max_new_tokens)
            mask[i, first_drawn : min(first_drawn + drawn, len(text))] = True
        ours, theirs = model(tokens)[0], reference(tokens)[0]
        out[rows] = (token_kl(ours, theirs) * mask).sum(1).to(torch.float64).cpu()
    return out
