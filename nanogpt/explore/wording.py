"""Findings in plain words: what goes with what, with numbers that anyone can check in the data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nanogpt.explore.crossfit import crossed
from nanogpt.explore.fields import Field, FieldClasses, as_numbers, number_text
from nanogpt.explore.records import Records, Value

_LONGEST = 60
_LEAST_TOGETHER = 5


@dataclass(frozen=True)
class Columns:
    """The columns of all records, for sentences.

    Attributes:
        fields: those that are used. classes: of each, None for a text.
        codes: (n, F) of the classes.
    """

    records: Records
    fields: Sequence[Field]
    classes: Sequence[FieldClasses | None]
    codes: np.ndarray

    @cached_property
    def _numbers(self) -> dict[int, np.ndarray]:
        return {}

    @cached_property
    def keys(self) -> list[tuple[Value, ...]]:
        """What each record says in the fields that are used."""
        columns = [self.records.column(field.name) for field in self.fields]
        return list(zip(*columns, strict=True))

    @cached_property
    def first_of_each(self) -> np.ndarray:
        """Rows without those that repeat an earlier one."""
        seen: set[tuple[Value, ...]] = set()
        rows = []
        for row, key in enumerate(self.keys):
            if key not in seen:
                seen.add(key)
                rows.append(row)
        return np.array(rows, np.int64)

    def numbers(self, place: int) -> np.ndarray:
        """(n,) of a number or date; NaN where there is none."""
        if place not in self._numbers:
            field = self.fields[place]
            self._numbers[place] = as_numbers(self.records.column(field.name), field.kind)
        return self._numbers[place]

    def is_number(self, place: int) -> bool:
        return self.fields[place].kind in ("number", "date")

    def name(self, place: int) -> str:
        return self.fields[place].name

    def label(self, place: int, code: int) -> str:
        classes = self.classes[place]
        assert classes is not None
        return short(classes.label(code))

    def value(self, place: int, row: int) -> str:
        return shown(self.records.column(self.name(place))[row])

    def table(self, a: int, b: int) -> np.ndarray:
        """(K_a, K_b) how often two classes stand in one record."""
        shape = tuple(self.classes[place].n_classes for place in (a, b))  # type: ignore[union-attr]
        return crossed(self.codes[:, a], self.codes[:, b], shape)  # type: ignore[arg-type]


def short(text: str, most: int = _LONGEST) -> str:
    """A text in one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def shown(value: Value) -> str:
    """A value as a sentence shows it."""
    if value is None:
        return "(missing)"
    return short(value) if value.strip() else "(empty)"


def percent(part: float) -> str:
    """A share with as many digits as it needs."""
    if 0 < part < 0.0095 or 0.9905 < part < 1:
        return f"{part:.1%}"
    return f"{part:.0%}"


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, of pairs without NaN; NaN for fewer than three."""
    both = ~(np.isnan(x) | np.isnan(y))
    if both.sum() < 3:
        return float("nan")
    ranks = [_ranks(values[both]) for values in (x, y)]
    if min(np.std(ranks[0]), np.std(ranks[1])) == 0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def associations(columns: Columns, a: int, b: int, most: int = 5) -> list[dict[str, object]]:
    """The classes of two fields that stand together most beyond chance, strongest first.

    Returns: dicts of a_value, b_value, together (records), share (of b's class among a's), overall.
    """
    table = columns.table(a, b).astype(np.float64)
    n = table.sum()
    of_a, of_b = table.sum(axis=1, keepdims=True), table.sum(axis=0, keepdims=True)
    expected = of_a * of_b / n
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(table > 0, table * np.log2(table / expected), -np.inf)
    gain[table < min(_LEAST_TOGETHER, n / 20)] = -np.inf
    for place, axis in ((a, 0), (b, 1)):  # what is neither a value nor missing comes last
        other = columns.classes[place].other  # type: ignore[union-attr]
        gain[(other, slice(None)) if axis == 0 else (slice(None), other)] -= 1e6
    found = []
    for flat in np.argsort(-gain, axis=None, kind="stable")[:most]:
        i, j = np.unravel_index(flat, gain.shape)
        if not gain[i, j] > 0:
            break
        found.append(
            {
                "a_value": columns.label(a, int(i)),
                "b_value": columns.label(b, int(j)),
                "together": int(table[i, j]),
                "share": float(table[i, j] / of_a[i, 0]),
                "overall": float(of_b[0, j] / n),
            }
        )
    return found


def dependency_in_words(columns: Columns, a: int, b: int) -> str:
    """How b goes with a, by the plainest statistic that shows it."""
    name_a, name_b = columns.name(a), columns.name(b)
    if columns.is_number(a) and columns.is_number(b):
        rho = rank_correlation(columns.numbers(a), columns.numbers(b))
        if abs(rho) >= 0.15:
            way = "rises" if rho > 0 else "falls"
            return f"{name_b} {way} with {name_a} (rank correlation {rho:.2f})"
        n = int((~np.isnan(columns.numbers(a) + columns.numbers(b))).sum())
        if abs(rho) >= 2 / np.sqrt(max(1, n)):
            way = "rises" if rho > 0 else "falls"
            return f"{name_b} {way} a little with {name_a} (rank correlation {rho:.2f})"
        return f"{name_b} goes with {name_a}, though neither rises nor falls with it" + _example(
            columns, a, b
        )
    if columns.is_number(a):
        a, b, name_a, name_b = b, a, name_b, name_a
    if columns.is_number(b):
        sentence = _medians(columns, a, b)
        if sentence:
            return sentence
    return f"{name_b} goes with {name_a}" + _example(columns, a, b)


def _example(columns: Columns, a: int, b: int) -> str:
    found = associations(columns, a, b, 1)
    if not found:
        return ""
    best = found[0]
    return (
        f": {columns.name(b)} is {best['b_value']} in {percent(float(best['share']))} of the "  # type: ignore[arg-type]
        f"records where {columns.name(a)} is {best['a_value']}, "
        f"and in {percent(float(best['overall']))} of all"  # type: ignore[arg-type]
    )


def _medians(columns: Columns, a: int, b: int) -> str:
    """The class of a whose b differs most: its median beside that of the others."""
    numbers = columns.numbers(b)
    known = ~np.isnan(numbers)
    order = np.full(len(numbers), np.nan)
    if known.sum() < 10:
        return ""
    order[known] = _ranks(numbers[known]) / known.sum()
    best: tuple[float, int] | None = None
    classes = columns.classes[a]
    assert classes is not None
    for code in range(classes.n_classes):
        inside = known & (columns.codes[:, a] == code)
        if code == classes.other or inside.sum() < _LEAST_TOGETHER:
            continue
        shift = abs(float(order[inside].mean()) - 0.5) * np.sqrt(inside.sum())
        if best is None or shift > best[0]:
            best = (shift, code)
    if best is None:
        return ""
    inside = known & (columns.codes[:, a] == best[1])
    rest = known & ~inside
    if not rest.any():
        return ""
    here, there = float(np.median(numbers[inside])), float(np.median(numbers[rest]))
    if here == there:
        return ""
    kind = columns.fields[b].kind
    way = "larger" if here > there else "smaller"
    if kind == "date":
        way = "later" if here > there else "earlier"
    return (
        f"{columns.name(b)} is {way} where {columns.name(a)} is {columns.label(a, best[1])}: "
        f"median {number_text(here, kind)} against {number_text(there, kind)} elsewhere"
    )


def mapping_in_words(columns: Columns, a: int, b: int, most: int = 4) -> str:
    """Which value of b stands beside each value of a: "no = 0, yes = 1"."""
    pairs = Counter(
        (x, y)
        for x, y in zip(
            columns.records.column(columns.name(a)),
            columns.records.column(columns.name(b)),
            strict=True,
        )
        if x is not None
    )
    seen: dict[Value, tuple[int, Value]] = {}
    for (x, y), count in pairs.items():
        if x not in seen or count > seen[x][0]:
            seen[x] = (count, y)
    ranked = sorted(seen.items(), key=lambda item: (-item[1][0], item[0] or ""))
    words = ", ".join(f"{shown(x)} = {shown(y)}" for x, (_, y) in ranked[:most])
    return words + (", …" if len(ranked) > most else "")


def rows_in_words(lines: Sequence[int], most: int = 5) -> str:
    """ "line 3", or "lines 3, 8 and 12"."""
    numbers = [f"{line:,}" for line in lines[:most]]
    if len(lines) > most:
        return f"lines {', '.join(numbers)} and {len(lines) - most:,} more"
    if len(numbers) == 1:
        return f"line {numbers[0]}"
    return f"lines {', '.join(numbers[:-1])} and {numbers[-1]}"
