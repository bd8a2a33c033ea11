"""Records as token examples that never mix.

A record is the special token, its prompt if it has one, its completion, and the special token. The
loss counts the completion and the last token. What is longer than the context is cut into windows
that follow each other and count every target once. Everything lies in flat arrays, so that ten
million tokens are a few of them.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from nanogpt.errors import InputError
from nanogpt.reward_data import RewardRecord, record_groups
from nanogpt.tokenizer import Tokenizer, UnknownCharacterError

IGNORED = -100  # the target that does not count
_MOST_PADDING = 0.1
# A micro-batch of fewer tokens is not worth being split to save padding.
_LEAST_TOKENS = 1024


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right.

    Attributes:
        tokens: (B, T) int64.
        targets: (B, T) int64; -100 where a target does not count.
        records: (B,) int64, the record of each row.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    records: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.tokens.to(device), self.targets.to(device), self.records.to(device))


@dataclass(frozen=True)
class Examples:
    """Windows of records. Example i has inputs tokens[start : start + length], and the tokens one
    further on are its targets.

    Attributes:
        tokens: (n,) uint16 or uint32, all records one after the other.
        starts, lengths: (E,) int64; lengths are in targets, 1 to the context.
        first_counted: (E,) int64, of a window's targets the first that counts.
        records: (E,) int64, ascending: whose window it is.
        n_records: R.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    first_counted: np.ndarray
    records: np.ndarray
    n_records: int

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def counts(self) -> np.ndarray:
        """(E,) int64: targets of each example that count."""
        return self.lengths - self.first_counted

    @cached_property
    def record_counts(self) -> np.ndarray:
        """(R,) int64: targets of each record that count."""
        counts = np.bincount(self.records, weights=self.counts, minlength=self.n_records)
        return counts.astype(np.int64)

    @cached_property
    def first_examples(self) -> np.ndarray:
        """(R + 1,) int64: examples of record r are first_examples[r] to first_examples[r + 1]."""
        return np.searchsorted(self.records, np.arange(self.n_records + 1))

    @property
    def n_targets(self) -> int:
        """Targets that count."""
        return int(self.counts.sum())

    def of_records(self, chosen: Sequence[int] | np.ndarray) -> "Examples":
        """The examples of some records, which are numbered anew in the order given."""
        records = np.asarray(chosen, dtype=np.int64)
        keep = self.examples_of(records)
        first = self.first_examples
        numbers = np.repeat(np.arange(len(records)), first[records + 1] - first[records])
        return replace(
            self,
            starts=self.starts[keep],
            lengths=self.lengths[keep],
            first_counted=self.first_counted[keep],
            records=numbers,
            n_records=len(records),
        )

    def examples_of(self, records: np.ndarray) -> np.ndarray:
        """Numbers of the examples of some records, record by record."""
        first = self.first_examples
        begin, sizes = first[records], first[records + 1] - first[records]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(begin, sizes) + within

    def batch(self, chosen: np.ndarray) -> Batch:
        """Some examples, right-padded to the longest of them."""
        starts, lengths = self.starts[chosen], self.lengths[chosen]
        places = np.arange(int(lengths.max()) + 1)
        at = np.minimum(starts[:, None] + places, (starts + lengths)[:, None])
        ids = self.tokens[at].astype(np.int64)  # (B, T + 1)
        target = places[:-1]
        counted = (target >= self.first_counted[chosen][:, None]) & (target < lengths[:, None])
        return Batch(
            torch.from_numpy(ids[:, :-1]),
            torch.from_numpy(np.where(counted, ids[:, 1:], IGNORED)),
            torch.from_numpy(self.records[chosen]),
        )


def encode_records(
    records: Sequence[RewardRecord], tokenizer: Tokenizer, block_size: int
) -> Examples:
    """Records as examples of at most `block_size` targets. The reward is not among the tokens.

    A prompt is encoded apart from its completion, as it is when the model is asked to go on.
    Windows that hold nothing but prompt are left out.

    Raises: InputError naming the line of a text that the vocabulary cannot spell.
    """
    end = np.array([tokenizer.end_of_text_id], dtype=tokenizer.dtype)
    pieces, sizes, prompts = [], [], []
    for record in records:
        try:
            prompt = tokenizer.encode_array(record.prompt) if record.prompt else end[:0]
            completion = tokenizer.encode_array(record.completion)
        except UnknownCharacterError as error:
            where = f"line {record.line:,}: " if record.line else ""
            raise InputError(
                f"{where}the character {error.character!r} (U+{ord(error.character):04X}) is not "
                f"in the model's vocabulary"
            ) from None
        pieces += [end, prompt, completion, end]
        sizes.append(len(prompt) + len(completion) + 2)
        prompts.append(len(prompt))
    tokens = np.concatenate(pieces) if pieces else end[:0]
    return _cut(tokens, np.array(sizes, np.int64), np.array(prompts, np.int64), block_size)


def _cut(tokens: np.ndarray, sizes: np.ndarray, prompts: np.ndarray, block: int) -> Examples:
    """Windows of records of `sizes` tokens, of which the first prompts + 1 are given."""
    targets = sizes - 1
    windows = -(-targets // block)
    record = np.repeat(np.arange(len(sizes)), windows)
    offset = (np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)) * block
    length = np.minimum(block, targets[record] - offset)
    first = np.maximum(0, prompts[record] - offset)
    keep = first < length
    starts = (np.cumsum(sizes) - sizes)[record] + offset
    return Examples(tokens, starts[keep], length[keep], first[keep], record[keep], len(sizes))


def micro_batches(lengths: np.ndarray, most_tokens: int) -> list[np.ndarray]:
    """Cut a batch into parts of similar lengths, longest first.

    A part has at most `most_tokens` tokens, padding included (or one example), and at most a tenth
    of padding unless it is small.

    Args:
        lengths: (B,) of the examples.
    Returns: places in `lengths`, each once.
    """
    order = np.argsort(-lengths, kind="stable")
    parts: list[np.ndarray] = []
    first = filled = 0
    for place, length in enumerate(lengths[order].tolist()):
        width = int(lengths[order[first]])
        area = (place - first + 1) * width
        padding = 1 - (filled + length) / area
        if place > first and (
            area > most_tokens or (padding > _MOST_PADDING and area > _LEAST_TOKENS)
        ):
            parts.append(order[first:place])
            first, filled = place, 0
        filled += length
    if len(order):
        parts.append(order[first:])
    return parts


def mismatched_records(records: Sequence[RewardRecord], seed: int) -> list[RewardRecord]:
    """The same prompts, each with the completion of another record, on a circle that the seed
    draws: what KTO's baseline is measured on."""
    circle = np.random.default_rng((seed, len(records))).permutation(len(records))
    other = np.empty(len(records), dtype=np.int64)
    other[circle] = np.roll(circle, 1)
    return [
        replace(record, completion=records[place].completion)
        for record, place in zip(records, other.tolist(), strict=True)
    ]


def split_records(
    records: Sequence[RewardRecord], val_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Records to train on and records held out, ascending; a function of the seed.

    Records of one text, one prompt or one group stay on one side, so that nothing held out has
    been seen. At least one record trains; nothing is held out where all belong together.
    """
    n = len(records)
    wanted = min(n - 1, max(1, round(val_fraction * n))) if val_fraction > 0 else 0
    cluster = _clusters(records)
    _, cluster, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
    held = np.zeros(len(sizes), dtype=bool)
    taken = 0
    for one in np.random.default_rng((seed, n)).permutation(len(sizes)).tolist():
        if taken + sizes[one] <= wanted:
            held[one] = True
            taken += int(sizes[one])
    return np.flatnonzero(~held[cluster]), np.flatnonzero(held[cluster])


def _clusters(records: Sequence[RewardRecord]) -> np.ndarray:
    """(R,): records that share a text or a group, directly or through others, share a number."""
    parent = list(range(len(records)))

    def root(of: int) -> int:
        while parent[of] != of:
            parent[of] = parent[parent[of]]
            of = parent[of]
        return of

    groups = record_groups(records)
    seen: dict[Hashable, int] = {}
    for place, record in enumerate(records):
        keys: list[Hashable] = [("text", record.text)]
        if groups is not None:
            keys.append(("group", groups[place]))
        for key in keys:
            parent[root(place)] = root(seen.setdefault(key, place))
    return np.array([root(place) for place in range(len(records))], dtype=np.int64)
