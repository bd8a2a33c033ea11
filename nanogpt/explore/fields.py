"""What kind each field is, and its values as classes that a model can learn.

A category is one class for each frequent value, a number one for each of some quantile bins, and
both have a class for other values and one for missing ones. What the classes are is fitted on
training rows alone. A text stays a text.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from nanogpt.explore.records import Records, Value

KINDS = ("number", "date", "category", "text", "id", "constant")
CODED = ("number", "date", "category")
"""Kinds whose values become classes."""

MISSING_WORDS = frozenset(
    ["na", "n/a", "nan", "null", "none", "nil", "-", "--", "?", "#n/a", "missing"]
)
"""Words that mean a missing value where all the others are numbers or dates."""

_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?\s*")
_DATE = re.compile(
    r"\s*\d{4}-\d{2}(-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:?\d{2})?)?)?\s*"
)
_FEW_NUMBERS = 12
_MOST_CLASSES = 128
_MOST_BINS = 32
_TEXT_WORDS, _TEXT_LENGTH = 3.0, 40
_ID_SHARE, _LEAST_FOR_ID = 0.98, 20


@dataclass(frozen=True)
class Field:
    """A field of the records, and what kind it is.

    Attributes:
        kind: number | date | category | text | id (a different value in every record) | constant.
        missing: records without a value.
        distinct: different values.
        words: values that mean missing here, such as NA among numbers.
        odd: values of another type than the rest, read as "other".
        repeated: records whose value stands in an earlier one.
    """

    name: str
    kind: str
    missing: int
    distinct: int
    words: tuple[str, ...] = ()
    odd: int = 0
    repeated: int = 0


def why_set_aside(field: Field) -> str:
    """What a field is that tells nothing about the others, after its name."""
    if field.kind == "constant":
        if not field.distinct:
            return "is missing in every record"
        return "is the same in every record"
    if field.repeated or field.missing:
        lost = f", and is missing in {field.missing:,}" if field.missing else ""
        present = field.distinct + field.repeated
        return f"has {field.distinct:,} different values in {present:,} records{lost}"
    return "is different in every record"


def describe_fields(records: Records) -> list[Field]:
    """The kind of every field, in their order."""
    return [_describe(name, records.column(name), records.format) for name in records.names]


def _describe(name: str, column: Sequence[Value], format: str) -> Field:
    present = [value for value in column if value is not None]
    counts = Counter(present)
    missing = len(column) - len(present)

    def made(kind: str, words: Sequence[str] = (), odd: int = 0) -> Field:
        lost = sum(counts[word] for word in words)
        distinct = len(counts) - len(words)
        repeated = len(present) - lost - distinct
        return Field(name, kind, missing + lost, distinct, tuple(words), odd, repeated)

    if len(counts) + bool(missing) < 2:
        return made("constant")
    if format == "txt":
        return made("text")
    for kind, pattern in (("number", _NUMBER), ("date", _DATE)):
        words = sorted(word for word in counts if word.strip().lower() in MISSING_WORDS)
        fitting = [
            value
            for value in counts
            if pattern.fullmatch(value) and not math.isnan(_as_number(value, kind))
        ]
        others = len(counts) - len(words) - len(fitting)
        fits = sum(counts[value] for value in fitting)
        rest = len(present) - fits - sum(counts[word] for word in words)
        if not fitting or rest > 0.05 * len(present):
            continue
        if kind == "number" and _are_codes(fitting):
            break  # 00501 is a name of something
        if len(fitting) <= _FEW_NUMBERS:
            break  # so few numbers are names of things
        if kind == "number" and not others and _are_ids(column, counts):
            return made("id")
        return made(kind, words, rest)
    n = len(present)
    if n >= _LEAST_FOR_ID or len(counts) < n:
        length = sum(map(len, present)) / n
        n_words = sum(len(value.split()) for value in present) / n
        wordy = n_words >= _TEXT_WORDS or length > _TEXT_LENGTH
        if wordy and len(counts) > max(20, n // 5):
            return made("text")
        if len(counts) >= _ID_SHARE * n and n >= _LEAST_FOR_ID:
            return made("id")
    return made("category")


def _are_codes(values: Sequence[str]) -> bool:
    """Digits of one length, some of which begin with 0."""
    return (
        len({len(value) for value in values}) == 1
        and all(value.isdigit() for value in values)
        and len(values[0]) > 1
        and any(value[0] == "0" for value in values)
    )


def _are_ids(column: Sequence[Value], counts: Counter[str]) -> bool:
    """Whole numbers, each once, in a row or without gaps: they number the records."""
    n = len(column)
    if n < _LEAST_FOR_ID or len(counts) < n:
        return False
    values = [value.strip() for value in column if value is not None]
    if not all(value.isdigit() for value in values):
        return False
    numbers = np.array([float(value) for value in values])
    steps = np.diff(numbers)
    return bool((steps == 1).all() or numbers.max() - numbers.min() < 1.5 * n)


def as_numbers(column: Sequence[Value], kind: str) -> np.ndarray:
    """(n,) float64 of numbers, or of dates in days since 1970; NaN where there is none."""
    known: dict[Value, float] = {
        value: math.nan if value is None else _as_number(value, kind) for value in set(column)
    }
    return np.array([known[value] for value in column], dtype=np.float64)


def _as_number(value: str, kind: str) -> float:
    if kind == "number":
        # \s matches more than float() ignores.
        number = float(value.strip()) if _NUMBER.fullmatch(value) else math.nan
        return number if math.isfinite(number) else math.nan
    if not _DATE.fullmatch(value):
        return math.nan
    text = value.strip()
    try:
        moment = datetime.fromisoformat(text if len(text) > 7 else text + "-01")
    except ValueError:
        return math.nan
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() / 86_400


def number_text(value: float, kind: str) -> str:
    """A number or date in few characters."""
    if kind == "date":
        moment = datetime.fromtimestamp(value * 86_400, UTC)
        return moment.strftime("%Y-%m-%d" if value == int(value) else "%Y-%m-%d %H:%M")
    if abs(value) < 1e15 and value == int(value):
        return str(int(value))
    return (
        f"{value:.6g}"
        if abs(value) < 1e6
        else f"{value:.1f}"
        if abs(value) < 1e15
        else f"{value:g}"
    )


@dataclass(frozen=True)
class FieldClasses:
    """The classes of one coded field: its values or bins, then OTHER, then MISSING.

    Attributes:
        field: whose classes they are.
        values: of a category, the frequent ones.
        edges: (K - 1,) of a number, ascending; bin k holds edges[k - 1] <= x < edges[k].
        low, high: of a number, the range of the training rows.
    """

    field: Field
    values: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    low: float = math.nan
    high: float = math.nan

    @property
    def is_number(self) -> bool:
        return self.field.kind in ("number", "date")

    @property
    def n_own(self) -> int:
        """Classes without OTHER and MISSING."""
        return len(self.edges) + 1 if self.is_number else len(self.values)

    @property
    def other(self) -> int:
        return self.n_own

    @property
    def missing(self) -> int:
        return self.n_own + 1

    @property
    def n_classes(self) -> int:
        return self.n_own + 2

    def label(self, code: int) -> str:
        """A class in words."""
        if code == self.missing:
            return "(missing)"
        if code == self.other:
            return "(another value)"
        if not self.is_number:
            return self.values[code]
        ends = (self.low, *self.edges, self.high)
        kind = self.field.kind
        return f"{number_text(ends[code], kind)}…{number_text(ends[code + 1], kind)}"

    def codes(self, column: Sequence[Value]) -> np.ndarray:
        """(n,) int32 classes of values."""
        if self.is_number:
            numbers = as_numbers(column, self.field.kind)
            codes = np.searchsorted(np.array(self.edges), numbers, side="right").astype(np.int32)
            for place in np.flatnonzero(np.isnan(numbers)).tolist():
                value = column[place]
                lost = value is None or value.strip().lower() in MISSING_WORDS
                codes[place] = self.missing if lost else self.other
            return codes
        known: dict[Value, int] = {value: code for code, value in enumerate(self.values)}
        known[None] = self.missing
        return np.array([known.get(value, self.other) for value in column], dtype=np.int32)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; `classes_from_dict` is the inverse."""
        return {
            "name": self.field.name,
            "kind": self.field.kind,
            "values": list(self.values),
            "edges": list(self.edges),
            "range": None if math.isnan(self.low) else [self.low, self.high],
        }


def classes_from_dict(content: dict[str, Any]) -> FieldClasses:
    """The inverse of `FieldClasses.as_dict`."""
    low, high = content["range"] or (math.nan, math.nan)
    field = Field(content["name"], content["kind"], 0, 0)
    return FieldClasses(field, tuple(content["values"]), tuple(content["edges"]), low, high)


def fit_classes(field: Field, column: Sequence[Value]) -> FieldClasses:
    """The classes of a coded field, from the values of the training rows alone."""
    if field.kind == "category":
        counts = Counter(value for value in column if value is not None)
        often = [value for value, count in counts.most_common(_MOST_CLASSES) if count > 1]
        return FieldClasses(field, tuple(sorted(often, key=lambda v: (-counts[v], v))))
    numbers = as_numbers(column, field.kind)
    numbers = np.sort(numbers[~np.isnan(numbers)])
    if not len(numbers):
        return FieldClasses(field)
    n_bins = min(_MOST_BINS, max(4, round(len(numbers) ** (1 / 3)) + 2))
    at = np.arange(1, n_bins) * len(numbers) // n_bins
    edges = np.unique(numbers[at])
    edges = edges[edges > numbers[0]]
    return FieldClasses(field, (), tuple(edges.tolist()), float(numbers[0]), float(numbers[-1]))
