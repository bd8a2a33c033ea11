"""Groups of records by the states of a model, and whether they hold for what they did not see.

Fields that have something to do with each other are taken together. States that the model has for
records that it was trained on are cut into groups; these begin a latent class analysis, which
says which group each record fits best and how many groups there are, by records that were kept
apart. Whether a group is real is judged on records that neither the model nor the groups have
seen: each is put into a group by all of its fields but one, and the group must then tell
something about the field that was left out, for three fields at least. Were the fields
independent of each other, it could tell nothing; nor could it, for three, were they so but for
some pairs. Of texts, the first half decides the group and the words of the second half judge.

Source: Lazarsfeld and Henry 1968, Latent structure analysis; Benjamini and Heller 2008, Screening
for partial conjunction hypotheses.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanogpt.explore.crossfit import Fold
from nanogpt.explore.scoring import Progress, centred
from nanogpt.explore.significance import permutation_test
from nanogpt.explore.terms import words

_MOST_GROUPS, _LEAST_MEMBERS, _LEAST_TEXTS = 8, 12, 40
_MOST_CLUSTERED = 20_000
_LEAST_FIELDS = 3
_NUMBERS = (2, 3, 4, 6, 8)
_STEPS = 40
_ITERATIONS, _RESTARTS = 60, 4
_LEAST_WORD_COUNT, _MOST_WORDS = 5, 5000


@dataclass(frozen=True)
class Groups:
    """Groups of the records.

    Attributes:
        members: k arrays of rows, ascending; of one part of the fields, or of the texts, they do
            not overlap.
        p: (k,) whether each group is one, on records that did not make it.
        bits: (k,) what belonging to it tells about a member, in bits a record; of texts, how
            many bits better its second half fits than that of the others.
        n: records that judged.
        field_p: (k, F) of each field that was left out; 1 where it was not tried.
    """

    members: list[np.ndarray]
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


def _sample(rows: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))


def related_parts(places: Sequence[int], related: np.ndarray) -> list[list[int]]:
    """Fields that hang together by related pairs, three and more at a time, in their order.

    Args:
        places: the fields. related: (F, F) bool, symmetric.
    """
    left, parts = list(places), []
    while left:
        part, edge = [], [left.pop(0)]
        while edge:
            part.append(edge.pop())
            new = [place for place in left if related[part[-1], place]]
            edge += new
            left = [place for place in left if place not in new]
        if len(part) >= _LEAST_FIELDS:
            parts.append(sorted(part))
    return parts


@dataclass(frozen=True)
class _Classes:
    """A latent class model of some fields, beside the model in which they are independent.

    Attributes:
        tables: of each field (k, K) bits for each class by each of its values.
        prior: (k,) log2 of the classes' shares.
    """

    tables: list[np.ndarray]
    prior: np.ndarray

    def evidence(self, codes: np.ndarray) -> np.ndarray:
        """(f, n, k) bits for each class by each field. Args: codes: (n, f)."""
        return np.stack([table[:, codes[:, f]].T for f, table in enumerate(self.tables)])

    def gain(self, codes: np.ndarray) -> float:
        """Bits a record by which it is likelier than under independence."""
        total = self.evidence(codes).sum(axis=0) + self.prior
        return float(np.logaddexp2.reduce(total, axis=1).mean())

    def members(self, codes: np.ndarray) -> np.ndarray:
        """(n, k) how much of each record belongs to each class; rows sum to 1."""
        total = self.evidence(codes).sum(axis=0) + self.prior
        return np.exp2(total - np.logaddexp2.reduce(total, axis=1)[:, None])


def _fit_classes(codes: np.ndarray, shares: Sequence[np.ndarray], belong: np.ndarray) -> _Classes:
    """The M step: tables from how much each record belongs to each class, (n, k)."""
    weight = belong.sum(axis=0)
    tables = []
    for f, share in enumerate(shares):
        seen = np.stack(
            [np.bincount(codes[:, f], weights=part, minlength=len(share)) for part in belong.T]
        )
        # Each group's shares are drawn towards those of all records by the weight of ten.
        given = (seen + 10 * share) / (seen.sum(axis=1, keepdims=True) + 10)
        tables.append(np.log2(given) - np.log2(share))
    return _Classes(tables, np.log2((weight + 1) / (weight.sum() + len(weight))))


def _latent_classes(
    codes: np.ndarray, shares: Sequence[np.ndarray], labels: np.ndarray, k: int
) -> _Classes:
    """Expectation maximisation that begins with hard labels."""
    found = _fit_classes(codes, shares, np.eye(k)[labels])
    for _ in range(_STEPS):
        found = _fit_classes(codes, shares, found.members(codes))
    return found


def table_groups(
    fold: Fold, parts: Sequence[Sequence[int]], *, seed: int, progress: Progress
) -> Groups | None:
    """Groups of records with coded fields.

    Args:
        fold: its training rows make the groups, its test rows judge.
        parts: fields that may set groups apart, of `related_parts`.
    Returns: None where there are too few fields or records, or no groups.
    """
    if len(fold.train) < 4 * _LEAST_MEMBERS:
        return None
    found = [
        _groups_of_part(fold, list(part), seed=seed, progress=progress)
        for part in parts
        if len(part) >= _LEAST_FIELDS
    ]
    whole = [each for each in found if each is not None]
    if not whole:
        return None
    return Groups(
        [rows for each in whole for rows in each.members],
        np.concatenate([each.p for each in whole]),
        np.concatenate([each.bits for each in whole]),
        whole[0].n,
        np.concatenate([each.field_p for each in whole]),
    )


def _groups_of_part(fold: Fold, part: list[int], *, seed: int, progress: Progress) -> Groups | None:
    rng = np.random.default_rng((seed, 5, *part))
    made_of = rng.permutation(_sample(fold.train, _MOST_CLUSTERED, rng))
    orders = (rng.permutation(part), rng.permutation(part))
    encoded = fold.encoded.take(made_of)
    states = np.mean([fold.scorer.states_of(encoded, order, progress) for order in orders], axis=0)
    states = centred(states, 0)
    codes = fold.encoded.codes[:, part]
    shares = [fold.shares(place) for place in part]
    kept = max(1, len(made_of) // 5)
    apart, rest = made_of[:kept], made_of[kept:]
    best: tuple[float, _Classes] | None = None
    for k in _NUMBERS:
        if k * _LEAST_MEMBERS > len(rest):
            break
        labels, _ = k_means(states[kept:], k, rng)
        classes = _latent_classes(codes[rest], shares, labels, k)
        gain = classes.gain(codes[apart])
        if gain > 0 and (best is None or gain > best[0]):
            best = gain, classes
    if best is None:
        return None
    classes = best[1]
    k = len(classes.prior)
    judging = fold.test[fold.tested]
    bits_of = classes.evidence(codes[judging])
    total = bits_of.sum(axis=0) + classes.prior
    field_p = np.ones((k, fold.encoder.n_fields))
    told, members = np.zeros(k), np.zeros(k)
    for f, place in enumerate(part):
        table = classes.tables[f]
        group = (total - bits_of[f]).argmax(axis=1)  # without this field
        of = codes[judging, f]
        for g in range(k):
            inside = (group == g).astype(np.int64)
            if not inside.any() or inside.all():
                continue
            scores = np.stack([np.zeros(table.shape[1]), table[g]])
            draw = np.random.default_rng((seed, 7, place, g))
            field_p[g, place] = permutation_test(scores, of, draw, rows=inside).p
            told[g] += float((table[g][of] * inside).sum())
            members[g] += inside.sum() / len(part)
    tried = np.sort(field_p[:, part], axis=1)
    p = np.minimum(1.0, (len(part) - _LEAST_FIELDS + 1) * tried[:, _LEAST_FIELDS - 1])
    rows = np.arange(len(fold.encoded))
    labels = np.concatenate(
        [
            classes.members(codes[some]).argmax(axis=1)
            for some in np.array_split(rows, 1 + len(rows) // 10_000)
        ]
    )
    return Groups(
        [np.flatnonzero(labels == g) for g in range(k)], p, told / np.maximum(members, 1),
        len(judging), field_p,
    )  # fmt: skip


def text_groups(
    fold: Fold, texts: Mapping[int, Sequence[str]], *, seed: int, progress: Progress
) -> Groups | None:
    """Groups of records by their text fields.

    Args:
        texts: of each text field (n,) values, "" where there is none.
    Returns: None where there are too few records or words.
    """
    if len(fold.train) < 2 * _LEAST_MEMBERS:
        return None
    rng = np.random.default_rng((seed, 8))
    made_of = _sample(fold.train, _MOST_CLUSTERED, rng)
    judging = fold.test[fold.tested]
    places = np.array(sorted(texts), np.int64)

    def states(rows: np.ndarray, first_half: bool) -> np.ndarray:
        encoded = fold.encoded.take(rows)
        if first_half:
            for place in texts:
                ids = encoded.texts[place]
                encoded.texts[place] = [each[: max(1, len(each) // 2)] for each in ids]
        orders = {tuple(places.tolist()), tuple(places[::-1].tolist())}
        parts = [fold.scorer.states_of(encoded, np.array(o), progress) for o in sorted(orders)]
        return np.mean(parts, axis=0)

    def words_of(row: int, second_half: bool) -> list[str]:
        found = []
        for column in texts.values():
            text = column[row]
            found += words(text[_middle(text) :] if second_half else text)
        return found

    own = states(made_of, False)
    mean = own.mean(axis=0)
    k = max(2, min(_MOST_GROUPS, len(made_of) // _LEAST_TEXTS))
    labels, centres = k_means(centred(own, 0), k, rng)
    counts = [Counter[str]() for _ in range(k)]
    for row, label in zip(made_of.tolist(), labels.tolist(), strict=True):
        counts[label].update(words_of(row, False))
    overall = sum(counts, Counter[str]())
    known = [w for w, c in overall.most_common(_MOST_WORDS) if c >= _LEAST_WORD_COUNT]
    if not known:
        return None
    index = {word: number for number, word in enumerate(known)}
    seen = np.array([[count[word] for word in known] for count in counts], dtype=np.float64)
    shares = seen.sum(axis=0) / seen.sum()
    given = (seen + 200 * shares) / (seen.sum(axis=1, keepdims=True) + 200)
    table = np.log2(given) - np.log2(shares)  # (k, W)

    group = ((states(judging, True) - mean) @ centres.T).argmax(axis=1)
    told = np.zeros((len(judging), k))
    for number, row in enumerate(judging.tolist()):
        rest = [index[w] for w in words_of(row, True) if w in index]
        told[number] = table[:, rest].sum(axis=1)
    p, bits = np.ones(k), np.zeros(k)
    for g in range(k):
        inside = group == g
        if inside.any() and not inside.all():
            scores = np.stack([np.zeros(len(judging)), told[:, g]], axis=1)
            draw = np.random.default_rng((seed, 9, g))
            p[g] = permutation_test(scores, inside.astype(np.int64), draw).p
            # Words depend on each other, so that their sum alone is too large or too small.
            bits[g] = float(told[inside, g].mean() - told[~inside, g].mean())
    n = len(fold.encoded)
    everything = [
        ((states(part, False) - mean) @ centres.T).argmax(axis=1)
        for part in np.array_split(np.arange(n), max(1, n // 4096))
    ]
    belongs = np.concatenate(everything)
    members = [np.flatnonzero(belongs == g) for g in range(k)]
    return Groups(members, p, bits, len(judging), np.ones((k, fold.encoder.n_fields)))


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
