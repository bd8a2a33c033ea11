"""From the tests to the findings: everything that is tried, judged together, strongest first."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanogpt.explore.crossfit import (
    CellTests,
    Fold,
    PairTests,
    test_cells,
    test_extremes,
    test_order,
    test_pairs,
)
from nanogpt.explore.duplicates import (
    exact_duplicates,
    near_duplicate_rows,
    near_duplicate_texts,
)
from nanogpt.explore.fields import Field, number_text, why_set_aside
from nanogpt.explore.findings import Finding
from nanogpt.explore.groups import Groups, related_parts, table_groups, text_groups
from nanogpt.explore.scoring import Progress, Surprisal
from nanogpt.explore.significance import (
    benjamini_hochberg,
    exceedance_p,
    false_discovery_rates,
)
from nanogpt.explore.terms import KeyTerm, key_terms, words
from nanogpt.explore.wording import (
    Columns,
    associations,
    dependency_in_words,
    mapping_in_words,
    percent,
    rows_in_words,
    short,
)

BLOCKS = 8
_EIGHTHS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "last")
_MISSING_MOVES = 0.15
_GIVEN_AWAY = 0.98  # of the values guessed, by a leak
_LEFT_WRONG = 0.1  # of the mistakes that guessing the commonest value makes
_LARGEST = 1e100  # whose square is no overflow
_NEARLY_ALL, _ROUNDING = 0.99, 1e-3  # of numbers that are one another in other units
_MOST_UNUSUAL, _MOST_ROWS = 100, 1000
_JOINT_SHARE, _JOINT_BITS = 0.15, 0.1
_LEAST_FOR_GROUPS = 60
_RELATED, _LEAST_BITS = 0.05, 0.5
_ALIKE = 0.5  # of the bits that two fields are off by


@dataclass(frozen=True)
class Results:
    """What was computed about the records; `findings` puts it into words.

    Attributes:
        folds: models and what they have not seen.
        cells: of each coded field, by its place.
        drift: of each coded field: p, and bits a record.
        surprisal: of the records, each by a model that has not seen it.
        record_z_p: (n,) p of a typicality as high as this; 1 where there are no texts.
        extremes: of each number (n,) p of values as far out.
        duplicates, near: rows that repeat each other, and p of each row of theirs.
        groups: of the records, by fields or by texts; None where none were looked for.
        q: of every family of tests.
    """

    folds: list[Fold]
    columns: Columns
    coded: list[int]
    texts: list[int]
    pairs: PairTests
    cells: dict[int, CellTests]
    drift: dict[int, tuple[float, float]]
    surprisal: Surprisal
    record_z_p: np.ndarray
    extremes: dict[int, np.ndarray]
    duplicates: list[tuple[list[int], float]]
    near: list[tuple[list[int], str, float]]
    repeats: dict[int, int]
    groups: Groups | None
    q: dict[str, np.ndarray]


class _ValueBits:
    """Bits of the very values: those of their classes, and of each value within its class.

    The latter count in a field of its own alone: those of one that another gives away come with it.

    How often a value comes that was met once is told by how many were met twice, copies of whole
    records apart (Good 1953, The population frequencies of species): a number with many digits is
    much rarer than one in n.
    """

    def __init__(self, columns: Columns, surprisal: Surprisal, own: Sequence[int]) -> None:
        self.class_bits, self.own = surprisal.field_bits, own
        self.first = np.zeros(len(columns.records), bool)
        self.first[columns.first_of_each] = True
        self.n = int(self.first.sum())
        self.codes: dict[int, np.ndarray] = {}
        self.counts: dict[int, np.ndarray] = {}
        self.in_class: dict[int, np.ndarray] = {}
        for place in own:
            column = columns.records.column(columns.name(place))
            codes = np.unique([value or "" for value in column], return_inverse=True)[1]
            classes = columns.codes[:, place]
            self.codes[place] = codes
            self.counts[place] = np.bincount(codes[self.first], minlength=int(codes.max()) + 1)
            self.in_class[place] = np.bincount(classes)[classes] / len(classes)

    def of(self, rows: Sequence[int]) -> np.ndarray:
        """(rows, F) bits of records that are like each other, which count as one for the others."""
        bits = self.class_bits[list(rows)].copy()
        for place in self.own:
            codes, counts = self.codes[place][list(rows)], self.counts[place]
            of_group = np.unique(codes, return_inverse=True)[1]
            again = np.bincount(of_group, weights=self.first[list(rows)])[of_group] - 1
            left = counts[codes] - np.maximum(again, 0)
            rare = min(1.0, 2 * ((counts == 2).sum() + 1) / ((counts == 1).sum() + 1))
            frequency = np.where(left > 1, left, rare) / self.n
            within = self.in_class[place][list(rows)] / frequency
            bits[:, place] += np.log2(np.maximum(1.0, within))
        return bits


def repeated_fields(columns: Columns, pairs: PairTests, coded: Sequence[int]) -> dict[int, int]:
    """Fields that repeat an earlier one, and which: either gives the other away."""
    found: dict[int, int] = {}
    for b in coded:
        for a in coded:
            free = a < b and a not in found and b not in found
            if free and gives_away(columns, pairs, a, b) and gives_away(columns, pairs, b, a):
                found[b] = a
    return found


def gives_away(columns: Columns, pairs: PairTests, a: int, b: int) -> bool:
    """Whether a value of b is guessed from that of a, nearly always and far better than without."""
    if same_line(columns, a, b):
        return True
    accuracy, majority = pairs.accuracy[a, b], pairs.majority[b]
    return bool(
        accuracy >= _GIVEN_AWAY and 1 - accuracy <= _LEFT_WRONG * (1 - majority) and majority < 1
    )


def same_line(columns: Columns, a: int, b: int) -> tuple[float, float] | None:
    """(slope, intercept) where two numbers are the same in other units."""
    if columns.fields[a].kind != "number" or columns.fields[b].kind != "number":
        return None
    x, y = columns.numbers(a), columns.numbers(b)
    known = [np.abs(each) < _LARGEST for each in (x, y)]
    both = known[0] & known[1]
    if both.sum() < 10 or (known[0] != known[1]).mean() > 1 - _NEARLY_ALL:
        return None
    if np.std(x[both]) == 0 or np.std(y[both]) == 0:
        return None
    slope, _ = np.polyfit(x[both] - x[both].mean(), y[both], 1)
    intercept = y[both].mean() - slope * x[both].mean()
    off = np.abs(y[both] - slope * x[both] - intercept)
    # Rounded to some digits, and not merely close to each other.
    if not np.quantile(off, _NEARLY_ALL) <= _ROUNDING * np.std(y[both]):
        return None
    return float(slope), float(intercept)


def investigate(
    folds: list[Fold],
    columns: Columns,
    surprisal: Surprisal,
    z_reference: Sequence[np.ndarray],
    *,
    n_orders: int,
    seed: int,
    progress: Progress,
) -> Results:
    """Everything that is looked for, with q-values over all of it."""
    n = len(columns.records)
    coded = [place for place, each in enumerate(columns.classes) if each is not None]
    texts = [place for place, each in enumerate(columns.classes) if each is None]
    pairs = test_pairs(folds, seed=seed, progress=progress)
    cells = {
        place: test_cells(folds, place, n, n_orders=n_orders, seed=seed, progress=progress)
        for place in (coded if len(columns.fields) > 1 else [])
    }
    blocks = np.arange(n) * BLOCKS // n
    drift = {place: test_order(folds, place, blocks, seed) for place in coded}
    repeats = repeated_fields(columns, pairs, coded)
    own = _own_fields(columns, pairs, coded, repeats)
    record_p = np.ones(n)
    if texts:
        for fold, reference in zip(folds, z_reference, strict=True):
            record_p[fold.test] = exceedance_p(reference, surprisal.z[fold.test])
    extremes = {
        place: test_extremes(folds, columns.numbers(place))
        for place in coded
        if columns.is_number(place)
    }
    duplicates = _duplicates(columns, surprisal, own)
    near = _near_duplicates(columns, surprisal, own, texts, duplicates)
    groups: Groups | None = None
    if n >= _LEAST_FOR_GROUPS:
        parts = related_parts(own, _related(pairs))
        groups = table_groups(folds[0], parts, seed=seed, progress=progress)
        if groups is None and texts:
            written = {
                place: [value or "" for value in columns.records.column(columns.name(place))]
                for place in texts
            }
            groups = text_groups(folds[0], written, seed=seed, progress=progress)
    upper = [(a, b) for a in range(len(columns.fields)) for b in range(a + 1, len(columns.fields))]
    tried = [pair for pair in upper if not np.isnan(pairs.p[pair])]
    families = {
        "pairs": np.array([pairs.p[pair] for pair in tried]),
        "joint": np.array([cells[place].joint_p for place in cells]),
        "order": np.array([drift[place][0] for place in coded]),
        "cells": np.concatenate([cells[place].p for place in cells] or [np.zeros(0)]),
        "records": record_p if texts else np.zeros(0),
        "extremes": np.concatenate([*extremes.values(), np.zeros(0)]),
        "duplicates": _row_family(n, [(rows, p) for rows, p in duplicates]),
        "near": _row_family(n, [(rows, p) for rows, _, p in near]),
        "groups": np.zeros(0) if groups is None else groups.p,
    }
    q = false_discovery_rates(families)
    q["pair_table"] = np.full((len(columns.fields),) * 2, np.nan)
    for (a, b), value in zip(tried, q["pairs"], strict=True):
        q["pair_table"][a, b] = q["pair_table"][b, a] = value
    q["cells"] = q["cells"].reshape(len(cells), n) if cells else np.ones((0, n))
    q["extremes"] = q["extremes"].reshape(len(extremes), n) if extremes else np.ones((0, n))
    return Results(
        folds, columns, coded, texts, pairs, cells, drift, surprisal, record_p, extremes,
        duplicates, near, repeats, groups, q,
    )  # fmt: skip


def _own_fields(
    columns: Columns, pairs: PairTests, coded: Sequence[int], repeats: Collection[int]
) -> list[int]:
    """Fields that no other one gives away."""
    own: list[int] = []
    for place in coded:
        others = [other for other in coded if other != place and other not in repeats]
        if place not in repeats and not any(gives_away(columns, pairs, a, place) for a in others):
            own.append(place)
    return own


def _related(pairs: PairTests) -> np.ndarray:
    """(F, F) bool: pairs that have something to do with each other, taken by themselves."""
    tried = ~np.isnan(pairs.p)
    q = np.ones_like(pairs.p)
    q[tried] = benjamini_hochberg(pairs.p[tried])
    return q <= _RELATED


def _row_family(n: int, groups: Sequence[tuple[list[int], float]]) -> np.ndarray:
    """(n,) one hypothesis for every record: that another one repeats it by more than chance."""
    p = np.ones(n)
    for rows, value in groups:
        p[rows] = value
    return p


def _duplicates(
    columns: Columns, surprisal: Surprisal, own: Sequence[int]
) -> list[tuple[list[int], float]]:
    """Rows that are equal in every field used, and how likely chance alone makes another one."""
    found = exact_duplicates(columns.keys)
    if not found:
        return []
    bits = _ValueBits(columns, surprisal, own)
    n = len(columns.records)
    return [(list(rows), _chance(n, bits.of(rows).sum(axis=1))) for rows in found]


def _chance(n: int, bits: np.ndarray) -> float:
    """That one of n - 1 other records is equal to one of so many bits, at most."""
    return float(min(1.0, (n - 1) * 2.0 ** -float(np.min(bits))))


def _near_duplicates(
    columns: Columns,
    surprisal: Surprisal,
    own: Sequence[int],
    texts: Sequence[int],
    duplicates: Sequence[tuple[list[int], float]],
) -> list[tuple[list[int], str, float]]:
    """Rows that differ in one field alone, or whose texts are alike: rows, how, and chance."""
    n = len(columns.records)
    same = {row: number for number, (rows, _) in enumerate(duplicates) for row in rows}
    found: list[tuple[list[int], str, float]] = []
    if not texts and len(columns.fields) >= 3:
        codes = []
        for field in columns.fields:
            values = [value or "" for value in columns.records.column(field.name)]
            codes.append(np.unique(values, return_inverse=True)[1].astype(np.int64))
        value_bits = _ValueBits(columns, surprisal, own)
        for group in near_duplicate_rows(codes):
            others = np.delete(value_bits.of(group.rows), group.field, axis=1)
            chance = min(1.0, len(columns.fields) * _chance(n, others.sum(axis=1)))
            found.append((list(group.rows), columns.name(group.field), chance))
    elif texts:
        place = max(texts, key=lambda each: surprisal.field_bits[:, each].sum())
        column = [value or "" for value in columns.records.column(columns.name(place))]
        for alike in near_duplicate_texts(column):
            rows = list(alike.rows)
            if len({same.get(row, -1 - row) for row in rows}) > 1:
                # Alike by four fifths: the bits of that part, by chance.
                bits = surprisal.field_bits[rows, place] * alike.similarity
                found.append((rows, columns.name(place), _chance(n, bits)))
    return found


def findings(results: Results, set_aside: Sequence[Field], alpha: float) -> list[Finding]:
    """All findings at level alpha, strongest first, and the plain facts after them."""
    parts: list[list[Finding]] = [
        _field_findings(results, alpha),
        _joint_findings(results, alpha),
        _drift_findings(results, alpha),
        _unusual_findings(results, alpha),
        _repetition_findings(results, alpha, [f.name for f in set_aside if f.kind == "id"]),
        _group_findings(results, alpha),
    ]
    found = sorted(
        (finding for part in parts for finding in part), key=lambda each: -each.evidence_bits
    )
    return [*found, *(_fact(results, field) for field in set_aside)]


def _fact(results: Results, field: Field) -> Finding:
    records = results.columns.records
    n = len(records)
    column = records.column(field.name)
    rows: tuple[int, ...] = ()
    if field.kind == "constant" and field.distinct:
        value = next(each for each in column if each is not None)
        sentence = f"{field.name} is {short(value)!r} in every record: it tells nothing"
    elif field.kind == "constant":
        sentence = f"{field.name} is missing in every record: it tells nothing"
    else:
        sentence = f"{field.name} {why_set_aside(field)}: it was set aside, as names of records are"
        groups = exact_duplicates([row if v is None else v for row, v in enumerate(column)])
        if groups:
            rows = tuple(sorted(row for group in groups for row in group)[:_MOST_ROWS])
            lines = [int(records.lines[row]) for row in groups[0]]
            sentence += f"; {short(str(column[groups[0][0]]))!r} stands on {rows_in_words(lines)}"
    return Finding(field.kind, (field.name,), rows, 0.0, "bits", None, n, sentence, 0.0)


def _field_findings(results: Results, alpha: float) -> list[Finding]:
    """Of pairs: one repeats the other, gives it away, or goes with it."""
    columns, pairs = results.columns, results.pairs
    n = len(columns.records)
    found = []
    for a in range(len(columns.fields)):
        for b in range(a + 1, len(columns.fields)):
            q = results.q["pair_table"][a, b]
            if not q <= alpha:
                continue
            information = np.nanmean([pairs.bits[a, b], pairs.bits[b, a]])
            repeats = results.repeats.get(b) == a
            if not repeats and (a in results.repeats or b in results.repeats):
                continue  # said of the field that it repeats
            if information <= 0 and not repeats:
                continue
            found.append(_pair_finding(results, a, b, float(information), float(q), n))
    return found


def _pair_finding(
    results: Results, a: int, b: int, information: float, q: float, n: int
) -> Finding:
    columns, pairs = results.columns, results.pairs
    forward = a in results.coded and gives_away(columns, pairs, a, b)
    backward = b in results.coded and a in results.coded and gives_away(columns, pairs, b, a)
    share = pairs.share
    details: dict[str, Any] = {
        "bits": {
            f"{columns.name(a)} -> {columns.name(b)}": _known(pairs.bits[a, b]),
            f"{columns.name(b)} -> {columns.name(a)}": _known(pairs.bits[b, a]),
        },
        "share": {
            f"{columns.name(a)} -> {columns.name(b)}": _known(share[a, b]),
            f"{columns.name(b)} -> {columns.name(a)}": _known(share[b, a]),
        },
    }
    if a in results.coded and b in results.coded:
        details["examples"] = associations(columns, a, b)
    also = sorted(
        columns.name(other) for other, first in results.repeats.items() if first in (a, b)
    )
    if forward and backward:
        kind, sentence, fields = "duplicate_fields", _repeat_in_words(columns, a, b), (a, b)
    elif forward or backward:
        kind = "leak"
        fields = (a, b) if forward else (b, a)
        sentence = _leak_in_words(results, *fields)
    elif (dated := _along_a_date(columns, a, b)) is not None:
        kind, fields = "drift", dated
        details["blocks"] = block_values(columns, *dated)
        change = _change_in_words(columns, dated[0], details["blocks"])
        sentence = f"{columns.name(dated[0])} changes along {columns.name(dated[1])}: {change}"
    else:
        kind = "dependency"
        # The field that tells more about the other comes first.
        first = share[a, b] >= share[b, a] or np.isnan(share[b, a])
        fields = (a, b) if first and b in results.coded else (b, a)
        if a in results.coded and b in results.coded:
            sentence = dependency_in_words(columns, *fields)
        else:
            text, other = (a, b) if a in results.texts else (b, a)
            fields = (text, other)
            sentence = (
                f"the text of {columns.name(text)} tells about {columns.name(other)}: it is "
                f"guessed in {percent(pairs.accuracy[text, other])} of the records, against "
                f"{percent(pairs.majority[other])} without"
            )
    if kind == "dependency" and _both_change(results, a, b):
        details["both_change"] = True
        sentence += "; both change along the file too"
    if also and kind != "duplicate_fields":
        details["also"] = also
        sentence += f" (the same goes for {', '.join(also)})"
    return Finding(
        kind,
        tuple(columns.name(each) for each in fields),
        (),
        information,
        "bits a record",
        q,
        n,
        sentence,
        information * n,
        details,
    )


def _both_change(results: Results, a: int, b: int, level: float = 0.05) -> bool:
    """Whether two fields change along the file: that alone may make them go together."""
    if a not in results.coded or b not in results.coded:
        return False
    places = [results.coded.index(each) for each in (a, b)]
    return bool((results.q["order"][places] <= level).all())


def _along_a_date(columns: Columns, a: int, b: int) -> tuple[int, int] | None:
    """(field, date) where just one of two fields is a date, and the other no text."""
    for place, date in ((a, b), (b, a)):
        if columns.fields[date].kind == "date" and columns.fields[place].kind in (
            "number",
            "category",
        ):
            return place, date
    return None


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _repeat_in_words(columns: Columns, a: int, b: int) -> str:
    name_a, name_b = columns.name(a), columns.name(b)
    left, right = columns.records.column(name_a), columns.records.column(name_b)
    if left == right:
        return f"{name_b} repeats {name_a}, value for value"
    line = same_line(columns, a, b)
    if line is not None:
        slope, intercept = line
        plus = f" {'+' if intercept >= 0 else '-'} {abs(intercept):.4g}"
        near_zero = abs(intercept) < 1e-3 * np.nanstd(columns.numbers(b))
        return (
            f"{name_b} repeats {name_a} in another unit: {name_b} = {slope:.4g} · {name_a}"
            f"{'' if near_zero else plus}"
        )
    table = columns.table(a, b)
    agree = float(table.max(axis=1).sum() / table.sum())
    words_ = "in every record" if agree == 1 else f"in {percent(agree)} of the records"
    return (
        f"{name_b} repeats {name_a} under other names ({mapping_in_words(columns, a, b)}): "
        f"either gives the other away, {words_}"
    )


def _leak_in_words(results: Results, a: int, b: int) -> str:
    columns, pairs = results.columns, results.pairs
    mapping = "" if columns.is_number(a) else f" ({mapping_in_words(columns, a, b)})"
    return (
        f"{columns.name(a)} gives {columns.name(b)} away{mapping}: it is guessed right in "
        f"{percent(float(pairs.accuracy[a, b]))} of the records not trained on, against "
        f"{percent(float(pairs.majority[b]))} without"
    )


def _joint_findings(results: Results, alpha: float) -> list[Finding]:
    """Fields that several others together tell about, and none of them alone."""
    columns, pairs = results.columns, results.pairs
    n = len(columns.records)
    found = []
    for number, place in enumerate(results.cells):
        q = float(results.q["joint"][number])
        if q > alpha or place in results.repeats:
            continue
        cells = results.cells[place]
        entropy = float(cells.unigram_bits.mean())
        together = entropy - float(cells.bits.mean())
        alone = float(np.nanmax(pairs.bits[:, place], initial=0.0))
        more = together - max(alone, 0.0)
        if more < max(_JOINT_BITS, _JOINT_SHARE * entropy):
            continue
        chosen, told = _tell_together(results, place)
        if len(chosen) < 2 or told < max(alone, 0.0) + _JOINT_BITS / 2:
            continue
        names = [columns.name(each) for each in chosen]
        sentence = (
            f"{' and '.join(names)} together tell {percent(min(1.0, told / entropy))} of what "
            f"there is to know about {columns.name(place)}; the best field alone tells "
            f"{percent(max(0.0, alone) / entropy)}"
        )
        details = {"told_together": told, "told_alone": alone, "told_by_all": together}
        found.append(
            Finding(
                "joint_dependency", (*names, columns.name(place)), (), more, "bits a record", q, n,
                sentence, more * n, details,
            )
        )  # fmt: skip
    return found


def _tell_together(results: Results, target: int) -> tuple[list[int], float]:
    """Two or three fields that together tell most about one, and how much, held out.

    Pairs are tried whole, as two fields may tell something that neither begins to tell.
    """
    usable = [p for p in results.coded if p != target and p not in results.repeats]
    usable.sort(key=lambda each: -np.nan_to_num(results.pairs.bits[each, target]))
    usable = usable[:12]

    def told(fields: Sequence[int], folds: Sequence[Fold]) -> float:
        total, count = 0.0, 0
        for fold in folds:
            some = fold.tested[:1000]
            orders = np.broadcast_to(np.array(fields), (len(some), len(fields)))
            p = fold.scorer.distribution(fold.test_encoded, some, orders, target)
            codes = fold.test_encoded.codes[some, target]
            shares = fold.shares(target)
            at = np.maximum(p[np.arange(len(some)), codes], 1e-12)
            total += float((np.log2(at) - np.log2(shares[codes])).sum())
            count += len(some)
        return total / max(1, count)

    choosing = results.folds[:1]
    best: tuple[float, list[int]] = (-np.inf, [])
    for number, a in enumerate(usable):
        for b in usable[number + 1 :]:
            best = max(best, (told([a, b], choosing), [a, b]))
    for c in usable:
        if c not in best[1] and len(best[1]) == 2:
            three = told([*best[1], c], choosing)
            if three > best[0] * 1.2 + 0.02:
                best = (three, [*best[1], c])
    # Chosen on the first fold, and told on others.
    return best[1], told(best[1], results.folds[1:3]) if best[1] else 0.0


def _drift_findings(results: Results, alpha: float) -> list[Finding]:
    columns = results.columns
    n = len(columns.records)
    found = []
    for number, place in enumerate(results.coded):
        q = float(results.q["order"][number])
        _, bits = results.drift[place]
        if q > alpha or bits <= 0 or place in results.repeats:
            continue
        name = columns.name(place)
        blocks = block_values(columns, place)
        changes = f"{name} changes along the file: {_change_in_words(columns, place, blocks)}"
        found.append(
            Finding(
                "drift", (name,), (), bits, "bits a record", q, n,
                changes, bits * n, {"blocks": blocks},
            )
        )  # fmt: skip
    return found


def _change_in_words(columns: Columns, place: int, blocks: Mapping[str, Any]) -> str:
    """From where to where, and where else it is lowest or highest."""
    values, labels = blocks["values"], blocks["labels"]
    known = [at for at, value in enumerate(values) if value is not None]
    low, high = (f(known, key=lambda at: values[at]) for f in (min, max))
    extremes = {values[low], values[high]}
    median = blocks["what"] == "median"
    if {values[known[0]], values[known[-1]]} == extremes:
        first, last = labels[known[0]], labels[known[-1]]
        if median:
            return f"its median goes from {first} in the first eighth to {last} in the last"
        return f"{blocks['class']} is {first} of the first eighth and {last} of the last"
    which = [_EIGHTHS[at] for at in (low, high)]
    if median:
        return (
            f"its median is lowest in the {which[0]} eighth, {labels[low]}, and highest in the "
            f"{which[1]}, {labels[high]}"
        )
    return (
        f"{blocks['class']} is rarest in the {which[0]} eighth, {labels[low]}, and commonest in "
        f"the {which[1]}, {labels[high]}"
    )


def block_values(columns: Columns, place: int, date: int | None = None) -> dict[str, Any]:
    """Of each eighth of the file: the median of a number, or the share of the class that moves.

    Args:
        date: a field whose order counts instead of the file's; records without a date are left out.
    """
    n = len(columns.records)
    blocks = np.arange(n) * BLOCKS // n
    if date is not None:
        dates = columns.numbers(date)
        order = np.argsort(dates, kind="stable")[: int((~np.isnan(dates)).sum())]
        blocks = np.full(n, -1)
        blocks[order] = np.arange(len(order)) * BLOCKS // len(order)
    count = int(blocks.max()) + 1
    codes = columns.codes[:, place]
    classes = columns.classes[place]
    assert classes is not None
    gone = [float((codes[blocks == block] == classes.missing).mean()) for block in range(count)]
    if columns.is_number(place) and max(gone) - min(gone) < _MISSING_MOVES:
        numbers = columns.numbers(place)
        values = []
        for block in range(count):
            part = numbers[(blocks == block) & ~np.isnan(numbers)]
            values.append(float(np.median(part)) if len(part) else None)
        kind = columns.fields[place].kind
        labels = ["—" if v is None else number_text(v, kind) for v in values]
        return {"what": "median", "class": None, "values": values, "labels": labels}
    shares = np.stack(
        [np.bincount(codes[blocks == b], minlength=int(codes.max()) + 1) for b in range(count)]
    )
    shares = shares / shares.sum(axis=1, keepdims=True)
    moving = int((shares.max(axis=0) - shares.min(axis=0)).argmax())
    if columns.is_number(place):
        moving = classes.missing
    values = shares[:, moving].tolist()
    return {
        "what": "share",
        "class": columns.label(place, moving),
        "values": values,
        "labels": [percent(value) for value in values],
    }


def guilty_cells(results: Results, alpha: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the field that fits worst in each record, and (n,) the bits that it is off by.

    Of those found at level alpha, if there is one. Where two fields are off alike - each does not
    fit the other - it is the one further right.
    """
    places = list(results.cells)
    gain = np.stack([results.cells[place].gain_bits for place in places])
    if alpha is not None:
        found = results.q["cells"] <= alpha
        gain = np.where(found | ~found.any(axis=0), gain, -1.0)
    worst = gain.max(axis=0)
    close = gain >= _ALIKE * worst
    chosen = len(places) - 1 - np.argmax(close[::-1], axis=0)
    return np.array(places)[chosen], worst


def _unusual_findings(results: Results, alpha: float) -> list[Finding]:
    columns = results.columns
    lines = columns.records.lines
    n = len(columns.records)
    found = []
    row_q = results.q["cells"].min(axis=0, initial=1.0)
    if results.cells:
        guilty, bits = guilty_cells(results, alpha)
        for row in np.flatnonzero(row_q <= alpha).tolist():
            place = int(guilty[row])
            name = columns.name(place)
            expected, probability = expected_value(results, place, row)
            partner = _partner(results, place, row)
            beside = ""
            if partner is not None:
                beside = f" beside {columns.name(partner)} {columns.value(partner, row)!r}"
            sentence = (
                f"line {int(lines[row]):,}: {name} {columns.value(place, row)!r} does not fit"
                f"{beside}; {short(expected)!r} was expected ({percent(probability)})"
            )
            fields = (name,) if partner is None else (name, columns.name(partner))
            details = {
                "value": columns.value(place, row),
                "expected": [[expected, probability]],
                "z": _finite(results.surprisal.z[row]),
            }
            found.append(
                Finding(
                    "unusual", fields, (row,), float(bits[row]), "bits", float(row_q[row]), n,
                    sentence, float(bits[row]), details,
                )
            )  # fmt: skip
    for number, (place, p) in enumerate(results.extremes.items()):
        q = results.q["extremes"][number]
        if place not in results.repeats:
            found += [
                _extreme_finding(results, place, row, float(p[row]), float(q[row]))
                for row in np.flatnonzero(q <= alpha).tolist()
            ]
    if results.texts:
        q = results.q["records"]
        for row in np.flatnonzero(q <= alpha).tolist():
            place = max(results.texts, key=lambda each: results.surprisal.field_bits[row, each])
            excess = float(
                (results.surprisal.field_bits - results.surprisal.expected_bits)[row].sum()
            )
            sentence = (
                f"line {int(lines[row]):,} is written unlike the others: "
                f"{columns.value(place, row)!r} takes {excess:,.0f} bits more than expected"
            )
            found.append(
                Finding(
                    "unusual", (columns.name(place),), (row,), excess, "bits", float(q[row]), n,
                    sentence, excess, {"z": _finite(results.surprisal.z[row])},
                )
            )  # fmt: skip
    found.sort(key=lambda each: -each.evidence_bits)
    return found[:_MOST_UNUSUAL]


def _extreme_finding(results: Results, place: int, row: int, p: float, q: float) -> Finding:
    columns = results.columns
    name, kind = columns.name(place), columns.fields[place].kind
    numbers = np.delete(columns.numbers(place), row)
    low, high = (number_text(float(each), kind) for each in np.nanquantile(numbers, (0.005, 0.995)))
    bits = -float(np.log2(p))
    sentence = (
        f"line {int(columns.records.lines[row]):,}: {name} {columns.value(place, row)} is far out; "
        f"99% of the others lie between {low} and {high}"
    )
    details = {"value": columns.value(place, row), "range": [low, high]}
    return Finding(
        "unusual", (name,), (row,), bits, "bits", q, len(columns.records), sentence, bits, details
    )


def expected_value(results: Results, place: int, row: int) -> tuple[str, float]:
    """The likeliest value of a cell, by the model that has not seen the record."""
    cells = results.cells[place]
    fold = next(fold for fold in results.folds if _holds(fold.test, row))
    classes = fold.encoder.classes[place]
    assert classes is not None
    return classes.label(int(cells.expected[row])), float(cells.expected_p[row])


def _holds(rows: np.ndarray, row: int) -> bool:
    at = int(np.searchsorted(rows, row))
    return at < len(rows) and int(rows[at]) == row


def _partner(results: Results, place: int, row: int) -> int | None:
    """The field whose value speaks most against this one, by pairs."""
    columns = results.columns
    best: tuple[float, int] | None = None
    for other in results.coded:
        if other == place or not results.q["pair_table"][other, place] <= 0.05:
            continue
        table = columns.table(other, place)
        seen = table[columns.codes[row, other]]
        overall = table.sum(axis=0) / table.sum()
        code = columns.codes[row, place]
        given = (seen[code] + overall[code]) / (seen.sum() + 1)
        lift = float(np.log2(given / max(overall[code], 1e-12)))
        if lift < -1 and (best is None or lift < best[0]):
            best = (lift, other)
    return None if best is None else best[1]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _repetition_findings(
    results: Results, alpha: float, identifiers: Sequence[str]
) -> list[Finding]:
    columns = results.columns
    lines, n = columns.records.lines, len(columns.records)
    q = results.q["duplicates"]
    exact = [(rows, p) for rows, p in results.duplicates if q[rows[0]] <= alpha]
    found = []
    if exact:
        rows = sorted(row for group, _ in exact for row in group)
        copies = sum(len(group) - 1 for group, _ in exact)
        evidence = sum(-np.log2(max(p, 1e-300)) for _, p in exact)
        how = f"in all but {', '.join(map(short, identifiers))}" if identifiers else "exactly"
        pairs = "; ".join(
            rows_in_words([int(lines[row]) for row in group], 3) for group, _ in exact[:3]
        )
        sentence = (
            f"{copies:,} record{'s repeat others' if copies != 1 else ' repeats another'} {how}, "
            f"which chance would not do: {pairs}{'; …' if len(exact) > 3 else ''}"
        )
        details = {"groups": [group for group, _ in exact[:_MOST_ROWS]]}
        worst = float(max(q[group[0]] for group, _ in exact))
        names = tuple(field.name for field in columns.fields)
        found.append(
            Finding("duplicates", names, tuple(rows[:_MOST_ROWS]), float(copies), "records", worst,
                    n, sentence, float(evidence), details)
        )  # fmt: skip
    q = results.q["near"]
    near = [(rows, name, p) for rows, name, p in results.near if q[rows[0]] <= alpha]
    if near:
        rows = sorted({row for group, _, _ in near for row in group})
        evidence = sum(-np.log2(max(p, 1e-300)) for _, _, p in near)
        examples = "; ".join(
            f"{rows_in_words([int(lines[row]) for row in group], 3)}, but for {name}"
            if not results.texts
            else rows_in_words([int(lines[row]) for row in group], 3)
            for group, name, _ in near[:3]
        )
        sentence = (
            f"{_many(len(near), 'group')} of records {'are' if len(near) != 1 else 'is'} nearly "
            f"equal: {examples}{'; …' if len(near) > 3 else ''}"
        )
        pairs_of = [[group, name] for group, name, _ in near[:_MOST_ROWS]]
        worst = float(max(q[group[0]] for group, _, _ in near))
        names = tuple(dict.fromkeys(name for _, name, _ in near))
        found.append(
            Finding("near_duplicates", names, tuple(rows[:_MOST_ROWS]), float(len(near)),
                    "groups of records", worst, n, sentence, float(evidence), {"groups": pairs_of})
        )  # fmt: skip
    return found


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def record_terms(
    columns: Columns, rows: np.ndarray | Sequence[int], left_out: Collection[int] = ()
) -> list[list[str]]:
    """What each record's terms are: "field=value" of coded fields, the words of texts.

    Args:
        left_out: fields that repeat others.
    """
    texts = {
        place: columns.records.column(columns.name(place))
        for place, each in enumerate(columns.classes)
        if each is None
    }
    found = []
    for row in rows:
        terms = []
        for place in range(len(columns.fields)):
            if place in left_out:
                continue
            if place in texts:
                terms += words(texts[place][row] or "")
            else:
                label = columns.label(place, int(columns.codes[row, place]))
                terms.append(f"{columns.name(place)}={label}")
        found.append(terms)
    return found


def terms_of(
    columns: Columns,
    inside: np.ndarray,
    left_out: Collection[int] = (),
    k: int = 20,
    most: int = 5000,
) -> list[KeyTerm]:
    """The terms that set some records apart from the rest.

    Args:
        inside: (n,) bool.
    """
    rng = np.random.default_rng(0)
    parts = []
    for chosen in (np.flatnonzero(inside), np.flatnonzero(~inside)):
        if len(chosen) > most:
            chosen = np.sort(rng.choice(chosen, most, replace=False))
        parts.append(record_terms(columns, chosen, left_out))
    return key_terms(parts[0], parts[1], k)


def _group_findings(results: Results, alpha: float) -> list[Finding]:
    groups, columns = results.groups, results.columns
    if groups is None:
        return []
    n = len(columns.records)
    found = []
    for g in np.flatnonzero(results.q["groups"] <= alpha).tolist():
        members = groups.members[g]
        size = len(members)
        if not size or size > n / 2 or groups.bits[g] < _LEAST_BITS:
            continue  # what most records have is no group; that the others lack it is said of these
        inside = np.zeros(n, bool)
        inside[members] = True
        terms = terms_of(columns, inside, results.repeats)
        best = [term for term in terms if term.q <= alpha and term.share > term.background_share]
        if not best:
            continue
        fields = [
            columns.name(place)
            for place in results.coded
            if groups.field_p[g, place] * len(results.coded) <= alpha
        ] or [columns.name(place) for place in results.texts]
        shown_terms = ", ".join(
            f"{term.term} ({percent(term.share)} against {percent(term.background_share)})"
            for term in best[:4]
        )
        sentence = f"{size:,} records ({percent(size / n)}) belong together: {shown_terms}"
        details = {
            "group": g,
            "terms": [[term.term, term.z] for term in best[:20]],
        }
        rows = members[:_MOST_ROWS].tolist()
        found.append(
            Finding("group", tuple(fields), tuple(rows), float(groups.bits[g]), "bits a member",
                    float(results.q["groups"][g]), groups.n, sentence,
                    float(groups.bits[g] * size), details)
        )  # fmt: skip
    return found
