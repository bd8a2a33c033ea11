"""Records as tokens, and models that learn them.

A record is the special token, its fields in some order, and the special token. A field is its
name, one token, and its value: one token for a class, several for a text. Training shows every
record in eight orders drawn at random, so that the model knows any field given any others.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanogpt.config import GPTConfig
from nanogpt.explore.fields import CODED, Field, FieldClasses, classes_from_dict, fit_classes
from nanogpt.explore.records import Records, Value
from nanogpt.kernels import linear_cross_entropy
from nanogpt.model import GPT
from nanogpt.recipe import scheduled_rate
from nanogpt.records import micro_batches
from nanogpt.tokenizer import RS, US, BPETokenizer, RecordTokenizer
from nanogpt.trainer import make_optimizer, seed_dropout

SUB = "\x1a"  # marks what is no value: twice another value, once a missing one
ORDERS = 8
"""Field orders in which an epoch shows every record."""
NAME, PADDING = -1, -2  # targets that belong to no field's value
_LONGEST_CONTEXT = 256
_LEAST_VOCABULARY, _MOST_VOCABULARY, _LETTERS_FOR_TOKEN = 300, 2048, 400
_STEPS, _LEAST_BATCH, _MOST_BATCH = 700, 8, 256
# GPT-2's 0.02 is made for wide models and long training; a short one of width 64 stalls there.
_EMBEDDING_STD, _NEIGHBOURING_BINS = 0.15, 1.5
_STEP_TOKENS, _HEAD_WIDTH = 16_384, 32
_LEARNING_RATE, _WEIGHT_DECAY, _DROPOUT = 4e-3, 0.1, 0.0


class Encoder:
    """The fields of records as tokens, fitted on training rows alone.

    Attributes:
        fields: those that are used, in the records' order.
        classes: of each of them, None for a text.
        tokenizer: its schema describes the fields.
        name_ids: (F,) the token of each name.
        class_ids: of each field (K,) the tokens of its classes; empty for a text.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        classes: Sequence[FieldClasses | None],
        tokenizer: RecordTokenizer,
    ) -> None:
        self.fields, self.classes, self.tokenizer = list(fields), list(classes), tokenizer
        self.end = tokenizer.end_of_text_id
        self.name_ids = np.array(tokenizer.name_ids, np.int64)
        self.class_ids = [
            np.array([] if each is None else list(ids.values()), np.int64)
            for each, ids in zip(classes, tokenizer.value_ids, strict=True)
        ]

    @classmethod
    def fit(cls, fields: Sequence[Field], records: Records) -> "Encoder":
        """Classes and vocabulary from training rows.

        Args:
            fields: those to use; constants and ids are left out by the caller.
        """
        columns = [records.column(field.name) for field in fields]
        classes = [
            fit_classes(field, column) if field.kind in CODED else None
            for field, column in zip(fields, columns, strict=True)
        ]
        texts = [
            value
            for each, column in zip(classes, columns, strict=True)
            if each is None
            for value in column
            if value
        ]
        base = None
        if texts or None in classes:
            size = 256 + sum(map(len, texts)) // _LETTERS_FOR_TOKEN
            size = min(_MOST_VOCABULARY, max(_LEAST_VOCABULARY, size))
            base = BPETokenizer.train(iter(texts or [" "]), size)
        described = [
            each or FieldClasses(field) for field, each in zip(fields, classes, strict=True)
        ]
        pieces = [(_safe(each.field.name), _class_texts(each)) for each in described]
        schema = {"fields": [each.as_dict() for each in described]}
        return cls(fields, classes, RecordTokenizer(pieces, base, schema))

    @classmethod
    def of(cls, tokenizer: RecordTokenizer) -> "Encoder":
        """The encoder that a model file carries.

        Raises: ValueError where the schema is damaged.
        """
        try:
            found = [classes_from_dict(entry) for entry in tokenizer.schema["fields"]]
            classes = [None if each.field.kind == "text" else each for each in found]
            return cls([each.field for each in found], classes, tokenizer)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError("the description of the fields is damaged") from None

    @property
    def n_fields(self) -> int:
        return len(self.fields)

    @property
    def n_coded(self) -> int:
        """Fields whose values are classes."""
        return sum(each is not None for each in self.classes)

    def place(self, name: str) -> int:
        """The number of a field. Raises: KeyError for one that is not used."""
        for place, field in enumerate(self.fields):
            if field.name == name:
                return place
        raise KeyError(name)

    def text_ids(self, place: int, value: Value) -> np.ndarray:
        """The tokens of a text field's value and its terminator."""
        if value is None:
            return np.array([self.tokenizer.value_ids[place][SUB]], np.int64)
        assert self.tokenizer.base is not None
        ids = self.tokenizer.base.encode_array(value).astype(np.int64)
        return np.append(ids, self.tokenizer.separator_id)

    def encode(self, records: Records) -> "Encoded":
        """Records as classes and tokens; fields that they lack are missing."""
        n = len(records)
        codes = np.full((n, self.n_fields), -1, dtype=np.int32)
        ids = np.zeros((n, self.n_fields), dtype=np.int32)
        texts: dict[int, list[np.ndarray]] = {}
        for place, (field, each) in enumerate(zip(self.fields, self.classes, strict=True)):
            known = field.name in records.names
            column = records.column(field.name) if known else [None] * n
            if each is None:
                texts[place] = [self.text_ids(place, value) for value in column]
            else:
                codes[:, place] = each.codes(column)
                ids[:, place] = self.class_ids[place][codes[:, place]]
        return Encoded(self, codes, ids, texts)


def _safe(text: str) -> str:
    """Text without the characters that separate and mark."""
    for character in (US, RS, SUB):
        if character in text:
            text = text.replace(character, f"\\x{ord(character):02x}")
    return text.encode("utf-8", "replace").decode()


def _class_texts(classes: FieldClasses) -> list[str]:
    """The text of each class, all different; of a text field, of the missing value alone."""
    if classes.field.kind == "text":
        return [SUB]
    own = [_safe(classes.label(code)) for code in range(classes.n_own)]
    if len(set(own)) < len(own):
        own = [f"{text} ({code})" for code, text in enumerate(own)]
    return [*own, SUB + SUB, SUB]


@dataclass(frozen=True)
class Sequences:
    """Windows of records side by side, padded on the right.

    Attributes:
        tokens: (B, T) int64 inputs.
        targets: (B, T) int64, the tokens that follow.
        cells: (B, T) int64, the field whose value a target belongs to; NAME for names and the last
            token, PADDING where there is none.
        records: (B,) int64, the place in the batch of the record that a window is of.
    """

    tokens: np.ndarray
    targets: np.ndarray
    cells: np.ndarray
    records: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """Records as an encoder sees them.

    Attributes:
        codes: (n, F) int32 classes; -1 for a text.
        ids: (n, F) int32 tokens of the classes.
        texts: of each text field, the tokens of every record's text with the terminator.
    """

    encoder: Encoder
    codes: np.ndarray
    ids: np.ndarray
    texts: dict[int, list[np.ndarray]]

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: np.ndarray) -> "Encoded":
        texts = {place: [each[row] for row in rows.tolist()] for place, each in self.texts.items()}
        return Encoded(self.encoder, self.codes[rows], self.ids[rows], texts)

    def lengths(self) -> np.ndarray:
        """(n,) tokens of each record, both special tokens included."""
        total = np.full(len(self), 2 + 2 * self.encoder.n_fields - len(self.texts), np.int64)
        for each in self.texts.values():
            total += np.array([len(ids) for ids in each], np.int64)
        return total

    def sequences(
        self, rows: np.ndarray, orders: np.ndarray, block_size: int, *, ending: bool = True
    ) -> Sequences:
        """Records in given field orders, cut into windows of at most `block_size` inputs.

        Args:
            rows: (B,) which records.
            orders: (B, f) their fields, in order; not all of them need to be there.
            ending: whether the special token ends them.
        """
        if self.texts and np.isin(orders, list(self.texts)).any():
            return self._ragged(rows, orders, block_size, ending)
        encoder = self.encoder
        count, width = orders.shape
        tokens = np.full((count, 2 * width + 2), encoder.end, np.int64)
        tokens[:, 1:-1:2] = encoder.name_ids[orders]
        tokens[:, 2:-1:2] = self.ids[rows[:, None], orders]
        cells = np.full((count, 2 * width + 1), NAME, np.int64)
        cells[:, 1::2] = orders
        if not ending:
            tokens, cells = tokens[:, :-1], cells[:, :-1]
        return _windows(tokens, cells, block_size)

    def _ragged(
        self, rows: np.ndarray, orders: np.ndarray, block_size: int, ending: bool
    ) -> Sequences:
        encoder = self.encoder
        inputs, targets, cells, records = [], [], [], []
        for place, (row, order) in enumerate(zip(rows.tolist(), orders.tolist(), strict=True)):
            parts, of = [np.array([encoder.end])], []
            for field in order:
                value = (
                    self.texts[field][row] if field in self.texts else self.ids[row, field, None]
                )
                parts += [encoder.name_ids[field, None], value]
                of += [np.array([NAME]), np.full(len(value), field)]
            if ending:
                parts.append(np.array([encoder.end]))
                of.append(np.array([NAME]))
            tokens, cell = np.concatenate(parts), np.concatenate(of)
            for first in range(0, len(cell), block_size):
                part = slice(first, first + block_size)
                inputs.append(tokens[:-1][part])
                targets.append(tokens[1:][part])
                cells.append(cell[part])
                records.append(place)
        return Sequences(
            _padded(inputs, 0),
            _padded(targets, 0),
            _padded(cells, PADDING),
            np.array(records, np.int64),
        )


def _windows(tokens: np.ndarray, cells: np.ndarray, block_size: int) -> Sequences:
    count, length = cells.shape
    if length <= block_size:
        return Sequences(tokens[:, :-1], tokens[:, 1:], cells, np.arange(count))
    inputs, targets, of, records = [], [], [], []
    for first in range(0, length, block_size):
        part = slice(first, first + block_size)
        inputs += list(tokens[:, :-1][:, part])
        targets += list(tokens[:, 1:][:, part])
        of += list(cells[:, part])
        records.append(np.arange(count))
    return Sequences(
        _padded(inputs, 0), _padded(targets, 0), _padded(of, PADDING), np.concatenate(records)
    )


def _padded(parts: Sequence[np.ndarray], filling: int) -> np.ndarray:
    width = max(map(len, parts))
    out = np.full((len(parts), width), filling, np.int64)
    for row, part in enumerate(parts):
        out[row, : len(part)] = part
    return out


def random_orders(rng: np.random.Generator, count: int, n_fields: int) -> np.ndarray:
    """(count, n_fields) int64: an order of the fields for each of `count` records."""
    return np.argsort(rng.random((count, n_fields)), axis=1)


@dataclass(frozen=True)
class LearningPlan:
    """How a model is trained on records.

    Attributes:
        views: times that an epoch shows a record.
        batch_size: records of an optimizer step.
    """

    shape: GPTConfig
    epochs: int
    views: int
    batch_size: int
    learning_rate: float = _LEARNING_RATE
    weight_decay: float = _WEIGHT_DECAY

    def steps(self, n: int) -> int:
        """Optimizer steps for n records."""
        return self.epochs * self.views * -(-n // self.batch_size)


def width_and_heads(texts: bool, *, n_head: int | None, n_embd: int | None) -> tuple[int, int]:
    """Those asked for, or what suits records with free text or without.

    On a CPU attention of so short a sequence takes half the time with heads twice as wide.
    """
    width = n_embd or (128 if texts else 64)
    heads = max(1, width // _HEAD_WIDTH)
    return width, n_head or (heads if width % heads == 0 else 1)


def make_plan(
    encoded: Encoded,
    *,
    epochs: int,
    batch_size: int | None,
    n_layer: int | None = None,
    n_head: int | None = None,
    n_embd: int | None = None,
) -> LearningPlan:
    """A plan for records of this size. Raises: ValueError where the shape is impossible."""
    n_fields = encoded.encoder.n_fields
    views = ORDERS if not encoded.texts else min(ORDERS, math.factorial(min(n_fields, 4)))
    shows = len(encoded) * views * epochs
    if batch_size is None:
        batch_size = 1 << max(0, round(math.log2(max(1, shows / _STEPS))))
        batch_size = min(_MOST_BATCH, max(_LEAST_BATCH, batch_size))
    longest = int(encoded.lengths().max(initial=2)) - 1
    width, heads = width_and_heads(bool(encoded.texts), n_head=n_head, n_embd=n_embd)
    shape = GPTConfig(
        vocab_size=encoded.encoder.tokenizer.vocab_size,
        block_size=max(8, min(_LONGEST_CONTEXT, longest)),
        n_layer=n_layer or 2,
        n_head=heads,
        n_embd=width,
        dropout=_DROPOUT,
    )
    return LearningPlan(shape, epochs, views, batch_size)


def train(
    encoded: Encoded,
    plan: LearningPlan,
    seed: tuple[int, ...],
    *,
    initial: Mapping[str, torch.Tensor] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda tokens: None,
) -> GPT:
    """A model of the records.

    Args:
        encoded: the training rows.
        seed: of weights, batches and orders.
        initial: weights to begin with.
        progress: called with the tokens of every step.
    Returns: the model in evaluation mode, with the encoder's tokenizer.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(int(rng.integers(2**62)))
    model = GPT(plan.shape)
    if initial is not None:
        model.load_state_dict(dict(initial), strict=False)
    else:
        _initialise_embedding(model, encoded.encoder)
    model.tokenizer = encoded.encoder.tokenizer
    model.to(device).train()
    optimizer = make_optimizer(model, plan.learning_rate, plan.weight_decay, (0.9, 0.99))
    total = plan.steps(len(encoded))
    warmup = min(100, total // 20)
    for step, (rows, with_names) in enumerate(_batches(len(encoded), plan, rng)):
        rate = scheduled_rate(step, total, warmup, plan.learning_rate, plan.learning_rate / 10)
        for group in optimizer.param_groups:
            group["lr"] = rate
        orders = random_orders(rng, len(rows), encoded.encoder.n_fields)
        batch = encoded.sequences(rows, orders, plan.shape.block_size)
        counted = batch.cells > PADDING if with_names else batch.cells > NAME
        n_targets = int(counted.sum())
        lengths = (batch.cells != PADDING).sum(axis=1)
        for index, part in enumerate(micro_batches(lengths, _STEP_TOKENS)):
            width = int(lengths[part].max())
            if plan.shape.dropout:
                seed_dropout(seed[0], step, index)
            tokens = torch.from_numpy(batch.tokens[part, :width]).to(device)
            keep = torch.from_numpy(counted[part, :width]).to(device)
            targets = torch.from_numpy(batch.targets[part, :width]).to(device)[keep]
            hidden = model.hidden_states(tokens)[keep]  # (N, C)
            loss = linear_cross_entropy(hidden, model.token_weight, targets)
            (loss * (len(targets) / n_targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress(int(lengths.sum()))
    return model.eval()


@torch.no_grad()
def _initialise_embedding(model: GPT, encoder: Encoder) -> None:
    """Values begin far enough apart, and neighbouring bins of a number close to each other."""
    weight = model.token_weight
    weight.normal_(0, _EMBEDDING_STD)
    for classes, ids in zip(encoder.classes, encoder.class_ids, strict=True):
        if classes is not None and classes.is_number:
            bins = torch.arange(classes.n_own, dtype=torch.float32)
            distance = (bins[:, None] - bins[None, :]) / _NEIGHBOURING_BINS
            kernel = torch.exp(-0.5 * distance**2)
            kernel /= kernel.norm(dim=1, keepdim=True)
            places = torch.from_numpy(ids[: classes.n_own])
            weight[places] = kernel @ weight[places]


def _batches(
    n: int, plan: LearningPlan, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, bool]]:
    """Rows of every step, and whether the model also learns the names in it.

    The names' order is drawn at random, so that there is little to learn; one view in eight is
    enough for a model that can write whole records.
    """
    for _ in range(plan.epochs):
        for view in range(plan.views):
            order = rng.permutation(n)
            for first in range(0, n, plan.batch_size):
                yield order[first : first + plan.batch_size], view == plan.views - 1
