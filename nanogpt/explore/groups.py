"""Groups of records by the states of a model, and whether they hold for what they did not see.

States of the records that the model was trained on are cut into groups. Whether a group is real is
judged on other records: each is put into a group by all of its fields but one, and the group must
then tell something about the field that was left out, for three fields at least. Were the fields
independent of each other, it could tell nothing. Of texts, the first half decides the group and
the words of the second half judge.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanogpt.explore.crossfit import Fold, crossed
from nanogpt.explore.scoring import Progress, centred
from nanogpt.explore.significance import permutation_test
from nanogpt.explore.terms import words

_MOST_GROUPS, _LEAST_MEMBERS = 8, 12
_MOST_CLUSTERED = 20_000
_LEAST_FIELDS = 3
_ITERATIONS, _RESTARTS = 60, 4
_LEAST_WORD_COUNT, _MOST_WORDS = 5, 5000


@dataclass(frozen=True)
class Groups:
    """Groups of the records.

    Attributes:
        labels: (n,) int, the group of every record.
        p: (k,) whether each group is one, on records that did not make it.
        bits: (k,) what belonging to it tells about a member, in bits a record.
        n: records that judged.
        field_p: (k, F) of each field that was left out; 1 where it was not tried.
    """

    labels: np.ndarray
    p: np.ndarray
    bits: np.ndarray
    n: int
    field_p: np.ndarray


def k_means(x: np.ndarray, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Spherical k-means of unit vectors: (n,) labels, and (k, C) unit centres.

    Source: Dhillon and Modha 2001, Concept decompositions for large sparse text data; first
        centres as in k-means++.
    """
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for _ in range(_RESTARTS):
        centres = _first_centres(x, k, rng)
        labels = np.full(len(x), -1)
        for _ in range(_ITERATIONS):
            nearest = (x @ centres.T).argmax(axis=1)
            if (nearest == labels).all():
                break
            labels = nearest
            sums = np.zeros_like(centres)
            np.add.at(sums, labels, x)
            norms = np.linalg.norm(sums, axis=1, keepdims=True)
            centres = np.where(norms > 1e-9, sums / np.maximum(norms, 1e-9), centres)
        value = float((x * centres[labels]).sum())
        if best is None or value > best[0] + 1e-9:
            best = (value, labels, centres)
    assert best is not None
    return best[1], best[2]


def _first_centres(x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    chosen = [int(rng.integers(len(x)))]
    distance = np.full(len(x), np.inf)
    for _ in range(k - 1):
        distance = np.minimum(distance, np.maximum(0.0, 1 - x @ x[chosen[-1]]))
        total = float(distance.sum())
        if total <= 0:
            chosen.append(int(rng.integers(len(x))))
        else:
            chosen.append(int(rng.choice(len(x), p=distance / total)))
    return x[chosen].copy()


def _number_of_groups(n: int) -> int:
    return max(2, min(_MOST_GROUPS, n // _LEAST_MEMBERS))


def _sample(rows: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))


def table_groups(
    fold: Fold, places: Sequence[int], *, seed: int, progress: Progress
) -> Groups | None:
    """Groups of records with coded fields.

    Args:
        fold: its training rows make the groups, its test rows judge.
        places: the fields that may set groups apart: coded, and none that repeats another.
    Returns: None where there are too few fields or records.
    """
    if len(places) < _LEAST_FIELDS or len(fold.train) < 2 * _LEAST_MEMBERS:
        return None
    rng = np.random.default_rng((seed, 5))
    made_of = _sample(fold.train, _MOST_CLUSTERED, rng)
    states = fold.scorer.states(
        fold.encoded.take(made_of), n_orders=2, seed=(seed, 6), progress=progress
    )
    k = _number_of_groups(len(made_of))
    labels, _ = k_means(centred(states, 0), k, rng)
    sizes = np.bincount(labels, minlength=k)
    prior = np.log2((sizes + 1) / (sizes.sum() + k))
    tables = []  # of each field (k, K): how much likelier each class is in each group, in bits
    for place in places:
        shares = fold.shares(place)
        seen = crossed(labels, fold.encoded.codes[made_of, place], (k, len(shares)))
        given = (seen + 10 * shares) / (seen.sum(axis=1, keepdims=True) + 10)
        tables.append(np.log2(given) - np.log2(shares))

    def evidence(rows: np.ndarray) -> np.ndarray:
        """(F, B, k) bits for each group by each field."""
        return np.stack(
            [
                table[:, fold.encoded.codes[rows, place]].T
                for table, place in zip(tables, places, strict=True)
            ]
        )

    judging = fold.test[fold.tested]
    bits_of = evidence(judging)
    total = bits_of.sum(axis=0) + prior
    field_p = np.ones((k, fold.encoder.n_fields))
    told, members = np.zeros(k), np.zeros(k)
    for number, (table, place) in enumerate(zip(tables, places, strict=True)):
        group = (total - bits_of[number]).argmax(axis=1)  # without this field
        codes = fold.encoded.codes[judging, place]
        for g in range(k):
            scores = np.stack([np.zeros(table.shape[1]), table[g]])
            inside = (group == g).astype(np.int64)
            if not inside.any():
                continue
            draw = np.random.default_rng((seed, 7, place, g))
            field_p[g, place] = permutation_test(scores, codes, draw, rows=inside).p
            told[g] += float((table[g][codes] * inside).sum())
            members[g] += inside.sum() / len(places)
    tried = np.sort(field_p[:, list(places)], axis=1)
    p = np.minimum(1.0, (len(places) - _LEAST_FIELDS + 1) * tried[:, _LEAST_FIELDS - 1])
    all_rows = np.arange(len(fold.encoded))
    final = np.concatenate(
        [
            (evidence(part).sum(axis=0) + prior).argmax(axis=1)
            for part in np.array_split(all_rows, max(1, len(all_rows) // 10_000))
        ]
    )
    return Groups(final, p, told / np.maximum(members, 1), len(judging), field_p)


def text_groups(
    fold: Fold, place: int, texts: Sequence[str], *, seed: int, progress: Progress
) -> Groups | None:
    """Groups of records by a text field.

    Args:
        place: the field. texts: (n,) its values, "" where there is none.
    Returns: None where there are too few records or words.
    """
    if len(fold.train) < 2 * _LEAST_MEMBERS:
        return None
    rng = np.random.default_rng((seed, 8))
    made_of = _sample(fold.train, _MOST_CLUSTERED, rng)
    judging = fold.test[fold.tested]

    def states(rows: np.ndarray, first_half: bool) -> np.ndarray:
        encoded = fold.encoded.take(rows)
        if first_half:
            ids = encoded.texts[place]
            encoded.texts[place] = [each[: max(1, len(each) // 2)] for each in ids]
        return fold.scorer.states_of(encoded, np.array([place]), progress)

    own = states(made_of, False)
    mean = own.mean(axis=0)
    k = _number_of_groups(len(made_of))
    labels, centres = k_means(centred(own, 0), k, rng)
    counts = [Counter[str]() for _ in range(k)]
    for row, label in zip(made_of.tolist(), labels.tolist(), strict=True):
        counts[label].update(words(texts[row]))
    overall = sum(counts, Counter[str]())
    known = [w for w, c in overall.most_common(_MOST_WORDS) if c >= _LEAST_WORD_COUNT]
    if not known:
        return None
    index = {word: number for number, word in enumerate(known)}
    seen = np.array([[count[word] for word in known] for count in counts], dtype=np.float64)
    shares = seen.sum(axis=0) / seen.sum()
    given = (seen + 200 * shares) / (seen.sum(axis=1, keepdims=True) + 200)
    table = np.log2(given) - np.log2(shares)  # (k, W)

    half = states(judging, True) - mean
    group = (half @ centres.T).argmax(axis=1)
    told = np.zeros((len(judging), k))
    for number, row in enumerate(judging.tolist()):
        text = texts[row]
        rest = [index[w] for w in words(text[_middle(text) :]) if w in index]
        told[number] = table[:, rest].sum(axis=1)
    p, bits = np.ones(k), np.zeros(k)
    for g in range(k):
        inside = group == g
        if inside.any():
            scores = np.stack([np.zeros(len(judging)), told[:, g]], axis=1)
            draw = np.random.default_rng((seed, 9, g))
            p[g] = permutation_test(scores, inside.astype(np.int64), draw).p
            bits[g] = float(told[inside, g].mean())
    n = len(fold.encoded)
    everything = [
        ((states(part, False) - mean) @ centres.T).argmax(axis=1)
        for part in np.array_split(np.arange(n), max(1, n // 4096))
    ]
    return Groups(
        np.concatenate(everything), p, bits, len(judging), np.ones((k, fold.encoder.n_fields))
    )


def _middle(text: str) -> int:
    """Where the second half of a text begins: after a space."""
    at = text.find(" ", len(text) // 2)
    return len(text) // 2 if at < 0 else at


def plane(states: np.ndarray) -> np.ndarray:
    """(n, 2) the two directions in which centred states vary most, scaled to their spread."""
    x = states - states.mean(axis=0)
    _, _, directions = np.linalg.svd(x, full_matrices=False)
    flat = x @ directions[:2].T
    if flat.shape[1] < 2:
        flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    return flat / max(1e-9, float(np.abs(flat).max()))
