"""Records that repeat others: exactly, in all fields but one, or with texts that are alike."""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from nanogpt.explore.terms import words

_SHINGLE, _HASHES, _BANDS = 3, 64, 16
_MOST_IN_BUCKET = 50


@dataclass(frozen=True)
class NearRows:
    """Rows that are equal but for one field.

    Attributes:
        field: the number of the field in which they differ.
    """

    rows: tuple[int, ...]
    field: int


@dataclass(frozen=True)
class AlikeTexts:
    """Texts with many shingles in common.

    Attributes:
        similarity: the least Jaccard similarity of a member with the first one.
    """

    rows: tuple[int, ...]
    similarity: float


def exact_duplicates(keys: Sequence[Hashable]) -> list[list[int]]:
    """Groups of two rows and more with one key, in the order of their first rows."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        places[key].append(row)
    return [rows for rows in places.values() if len(rows) > 1]


def near_duplicate_rows(columns: Sequence[np.ndarray]) -> list[NearRows]:
    """Groups of rows that are equal in all fields but one.

    Args:
        columns: F arrays (n,) of integer codes.
    """
    if len(columns) < 2:
        return []
    rng = np.random.default_rng(0)
    n = len(columns[0])
    hashes = []
    for column in columns:
        # A random number for each value; sums of them are one for equal rows, by chance 2^-64.
        table = rng.integers(0, 2**64, size=int(column.max(initial=0)) + 2, dtype=np.uint64)
        hashes.append(table[column])
    whole = np.zeros(n, np.uint64)
    for each in hashes:
        whole += each
    found = []
    for field, each in enumerate(hashes):
        rest = whole - each
        order = np.argsort(rest, kind="stable")
        ordered = rest[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        ends = np.r_[starts[1:], n]
        for first, last in zip(starts.tolist(), ends.tolist(), strict=True):
            if last - first < 2:
                continue
            rows = np.sort(order[first:last])
            _, one_of_each = np.unique(columns[field][rows], return_index=True)
            if len(one_of_each) > 1:  # else they are exact duplicates
                found.append(NearRows(tuple(np.sort(rows[one_of_each]).tolist()), field))
    return found


def _shingles(text: str) -> frozenset[int]:
    """Numbers of the runs of three words, or of five letters where there are few words."""
    parts: Sequence[str] = words(text)
    size = _SHINGLE
    if len(parts) < 2 * _SHINGLE:
        parts, size = " ".join(parts), 5
    runs = {tuple(parts[at : at + size]) for at in range(max(1, len(parts) - size + 1))}
    joined = (" ".join(run).encode("utf-8", "surrogatepass") for run in runs)
    return frozenset(
        int.from_bytes(hashlib.blake2b(each, digest_size=7).digest(), "little") for each in joined
    )


def near_duplicate_texts(texts: Sequence[str], threshold: float = 0.8) -> list[AlikeTexts]:
    """Groups of texts whose shingles have a Jaccard similarity of `threshold` and more.

    Candidates come from MinHash with bands, and are then compared exactly; texts that are equal
    but for case, punctuation and spaces have similarity 1. Empty texts are left out.
    Source: Broder 1997, On the resemblance and containment of documents.
    """
    rows = [row for row, text in enumerate(texts) if words(text)]
    sets = {row: _shingles(texts[row]) for row in rows}
    parent = {row: row for row in rows}
    first_with: dict[frozenset[int], int] = {}
    for row in rows:
        parent[row] = first_with.setdefault(sets[row], row)
    rng = np.random.default_rng(1)
    # Multiply-shift: the upper half of a 64-bit product that wraps around.
    multiply, add = rng.integers(0, 2**64, size=(2, _HASHES), dtype=np.uint64)
    multiply |= np.uint64(1)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    per_band = _HASHES // _BANDS
    for row in first_with.values():
        values = np.fromiter(sets[row], np.uint64, len(sets[row])) & np.uint64(2**32 - 1)
        signature = ((values[:, None] * multiply + add) >> np.uint64(32)).min(axis=0)
        for band in range(_BANDS):
            part = signature[band * per_band : (band + 1) * per_band]
            buckets[band, part.tobytes()].append(row)

    def root(of: int) -> int:
        while parent[of] != of:
            parent[of] = parent[parent[of]]
            of = parent[of]
        return of

    compared: set[tuple[int, int]] = set()
    for bucket in buckets.values():
        for place, a in enumerate(bucket[:_MOST_IN_BUCKET]):
            for b in bucket[place + 1 :]:
                if (a, b) not in compared and root(a) != root(b):
                    compared.add((a, b))
                    if _jaccard(sets[a], sets[b]) >= threshold:
                        parent[max(root(a), root(b))] = min(root(a), root(b))
    groups: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        groups[root(row)].append(row)
    return [
        AlikeTexts(tuple(g), min(_jaccard(sets[g[0]], sets[row]) for row in g[1:]))
        for g in groups.values()
        if len(g) > 1
    ]


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b)
