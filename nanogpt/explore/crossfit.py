"""Cross-fitting: every record is scored by a model that has not seen it.

Each fold has an encoder fitted on its training rows and a model trained on them; its test rows are
the others. What is computed here comes fold by fold and is put together row by row.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nanogpt.explore.learning import Encoded, Encoder
from nanogpt.explore.scoring import Progress, Scorer
from nanogpt.explore.significance import exceedance_p, merged_p, permutation_test

MOST_TESTED = 4000
"""Records of a fold that a permutation test uses."""
_TEMPERATURES = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)
_CONTAMINATIONS = (0.0005, 0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.02)
_LEAST_NUMBERS = 100
_LEVELS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_TOLERANCE = 2.0  # nats
_NEARLY_SURE, _DEPENDS = 0.9, 1e-3
_MISPLACED = 3 * np.log(2)  # nats by which the rest of its record makes a value less likely


@dataclass(frozen=True)
class Fold:
    """A model and what it may be asked about.

    Attributes:
        encoded: all records, as this fold's encoder sees them.
        train, test: rows that the model has seen and rows that it has not, ascending.
        first: (n,) bool, records that repeat no earlier one; None where all are different.
    """

    scorer: Scorer
    encoded: Encoded
    train: np.ndarray
    test: np.ndarray
    first: np.ndarray | None = None

    @property
    def encoder(self) -> Encoder:
        return self.scorer.encoder

    @cached_property
    def test_encoded(self) -> Encoded:
        return self.encoded.take(self.test)

    @cached_property
    def tested(self) -> np.ndarray:
        """Places in `test` of the records that permutation tests use: copies count once."""
        places = np.arange(len(self.test))
        if self.first is not None:
            places = places[self.first[self.test]]
        n = len(places)
        if n <= MOST_TESTED:
            return places
        return np.sort(np.random.default_rng(n).choice(places, MOST_TESTED, replace=False))

    def shares(self, place: int) -> np.ndarray:
        """(K,) shares of a field's classes among the training rows, half a record added to each."""
        counts = np.bincount(
            self.encoded.codes[self.train, place], minlength=len(self.encoder.class_ids[place])
        )
        return (counts + 0.5) / (counts.sum() + 0.5 * len(counts))


def assign_folds(
    n: int, folds: int, seed: int, keys: Sequence[Hashable] | None = None
) -> np.ndarray:
    """(n,) the fold that tests each record, in equal parts drawn with the seed.

    Args:
        keys: of each record; equal ones come into one fold, so that no copy is trained on.
    """
    if keys is None:
        keys = range(n)
    places: dict[Hashable, int] = {}
    of = np.array([places.setdefault(key, len(places)) for key in keys], np.int64)
    count = len(places)
    return np.random.default_rng((seed, count, folds)).permutation(np.arange(count) % folds)[of]


@dataclass(frozen=True)
class CellTests:
    """How well the values of one field fit the rest of their records.

    Attributes:
        p: (n,) the chance of a value as improbable as this one in a record that is in order.
        bits: (n,) surprisal of the value given the rest.
        gain_bits: (n,) how many bits fewer the likeliest value would take.
        expected: (n,) int, class of the likeliest value, in the codes of the row's fold.
        expected_p: (n,) its probability.
        temperature, contamination: of the fit; the part of values that stand in a wrong place.
        unigram_bits: (n,) surprisal by the field's shares in the training rows.
        correct: (n,) whether the likeliest class is the right one.
        joint_p: of the test that the field depends on the rest at all.
    """

    p: np.ndarray
    bits: np.ndarray
    gain_bits: np.ndarray
    expected: np.ndarray
    expected_p: np.ndarray
    temperature: float
    contamination: float
    unigram_bits: np.ndarray
    correct: np.ndarray
    joint_p: float


def test_cells(
    folds: Sequence[Fold],
    place: int,
    n: int,
    *,
    n_orders: int,
    seed: int,
    progress: Progress,
) -> CellTests:
    """Every value of a coded field against P(value | rest of its record)."""
    given = [
        fold.scorer.given_rest(
            fold.test_encoded, place, n_orders=n_orders, seed=(seed, number), progress=progress
        )
        for number, fold in enumerate(folds)
    ]
    observed = [fold.test_encoded.codes[:, place] for fold in folds]
    shares = [fold.shares(place) for fold in folds]
    floors = [_unseen_floor(fold, place) for fold in folds]
    logs = [np.log(np.maximum(p, 1e-12)) for p in given]
    columns = {
        name: np.zeros(n)
        for name in ("p", "bits", "gain_bits", "expected", "expected_p", "unigram", "correct")
    }
    joint = []
    for number, fold in enumerate(folds):
        some = fold.tested
        rng = np.random.default_rng((seed, 1, place, number))
        joint.append(permutation_test(logs[number][some], observed[number][some], rng).p)
    joint_p = merged_p(joint)
    fits = []
    for number, fold in enumerate(folds):
        others = [k for k in range(len(folds)) if k != number] or [0]
        fit = _fit_mixture(
            [logs[k] for k in others], [observed[k] for k in others], [shares[k] for k in others]
        )
        if joint_p > _DEPENDS:  # where nothing is expected, nothing is out of its place
            fit = _Mixture(fit.plain, 0.0, fit.plain)
        inflation = _inflation(
            np.concatenate([fit.tails(logs[k], observed[k], shares[k], floors[k]) for k in others]),
            fit.contamination,
        )
        fits.append(fit)
        rows, codes, log_p = fold.test, observed[number], logs[number]
        at = np.arange(len(rows))
        tails = fit.tails(log_p, codes, shares[number], floors[number])
        columns["p"][rows] = np.minimum(1.0, tails * inflation)
        columns["bits"][rows] = -log_p[at, codes] / np.log(2)
        columns["gain_bits"][rows] = (log_p.max(axis=1) - log_p[at, codes]) / np.log(2)
        columns["expected"][rows] = log_p.argmax(axis=1)
        columns["expected_p"][rows] = given[number].max(axis=1)
        columns["unigram"][rows] = -np.log2(shares[number][codes])
        columns["correct"][rows] = log_p.argmax(axis=1) == codes
    return CellTests(
        p=columns["p"],
        bits=columns["bits"],
        gain_bits=columns["gain_bits"],
        expected=columns["expected"].astype(np.int64),
        expected_p=columns["expected_p"],
        temperature=float(np.median([fit.temperature for fit in fits])),
        contamination=float(np.median([fit.contamination for fit in fits])),
        unigram_bits=columns["unigram"],
        correct=columns["correct"].astype(bool),
        joint_p=joint_p,
    )


def _unseen_floor(fold: Fold, place: int) -> np.ndarray:
    """(K,) least probability of each class: one record more than was seen, for an unseen class.

    How often a new value comes is not to be learnt from training rows that have none.
    """
    counts = np.bincount(
        fold.encoded.codes[fold.train, place], minlength=len(fold.encoder.class_ids[place])
    )
    return np.where(counts == 0, 1.0 / (len(fold.train) + 1), 0.0)


def _sharpened(log_p: np.ndarray, temperature: float) -> np.ndarray:
    scaled = log_p / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    p = np.exp(scaled)
    return p / p.sum(axis=1, keepdims=True)


def _tails(
    log_p: np.ndarray, codes: np.ndarray, temperature: float, floor: np.ndarray
) -> np.ndarray:
    """(n,) sum of P(v) over the classes v that are no more probable than the observed one."""
    p = np.maximum(_sharpened(log_p, temperature), floor)
    at = p[np.arange(len(codes)), codes]
    return np.where(p <= at[:, None] * (1 + 1e-9), p, 0.0).sum(axis=1)


@dataclass(frozen=True)
class _Mixture:
    """What the values of a field are in records that are in order, and how many stand elsewhere.

    Attributes:
        temperature: of the distributions where one value is nearly sure; what else is met there is
            misplaced.
        contamination: the part of misplaced values.
        plain: the temperature, 1 or more, of the other distributions.
    """

    temperature: float
    contamination: float
    plain: float

    def tails(
        self, log_p: np.ndarray, codes: np.ndarray, shares: np.ndarray, floor: np.ndarray
    ) -> np.ndarray:
        """(n,) chance of values as improbable as the observed ones.

        Args:
            log_p: (n, K) given the rest of each record. shares: (K,) of all records.
        """
        sure = log_p.max(axis=1) >= np.log(_NEARLY_SURE)
        seen = log_p[np.arange(len(codes)), codes]
        elsewhere = seen <= np.log(shares[codes]) - _MISPLACED  # a rare value alone is none
        sharp = _tails(log_p, codes, self.temperature, floor)
        return np.where(sure & elsewhere, sharp, _tails(log_p, codes, self.plain, floor))


def _fit_mixture(
    logs: Sequence[np.ndarray], codes: Sequence[np.ndarray], shares: Sequence[np.ndarray]
) -> "_Mixture":
    """Temperature and contamination of held-out values: (1 - e) p_T(v | rest) + e share(v).

    A model that has met misplaced values expects some more of them, spread as the field's values
    are. As much of that as the held-out values allow counts as misplaced: of all mixtures that make
    them at most `_TOLERANCE` nats less likely than the best one, the sharpest is taken, and what
    is left is what records in order look like. Where none does, e is 0 and T no less than 1.
    """
    plain: list[tuple[float, float]] = []
    mixed: list[tuple[float, float, float]] = []
    unigram = np.concatenate([share[c] for share, c in zip(shares, codes, strict=True)])
    for temperature in _TEMPERATURES:
        parts = [_sharpened(log_p, temperature) for log_p in logs]
        likely = np.concatenate(
            [p[np.arange(len(c)), c] for p, c in zip(parts, codes, strict=True)]
        )
        likely = np.maximum(likely, 1e-300)
        plain.append((float(np.log(likely).sum()), temperature))
        for part in _CONTAMINATIONS:
            value = float(np.log((1 - part) * likely + part * unigram).sum())
            mixed.append((value, temperature, part))
    best_plain = max(plain)
    enough = max(best_plain, max(mixed)[:2])[0] - _TOLERANCE
    temperature = min(t for value, t, _ in [*mixed, (*best_plain, 0.0)] if value >= enough)
    plainest = max(1.0, best_plain[1])
    if temperature < 1:
        _, part = max((value, part) for value, t, part in mixed if t == temperature)
        return _Mixture(temperature, part, plainest)
    return _Mixture(plainest, 0.0, plainest)


def _inflation(tails: np.ndarray, contamination: float) -> float:
    """What tails are multiplied by so that small ones are no commoner than they say."""
    n = len(tails)
    worst = 1.0
    for level in _LEVELS:
        if n * level >= 10:
            found = float((tails <= level).mean()) - contamination
            worst = max(worst, (found - 2 * np.sqrt(level * (1 - level) / n)) / level)
    return worst


@dataclass(frozen=True)
class PairTests:
    """What fields tell about each other, on records that the models have not seen.

    Attributes:
        bits: (F, F) information about field b given by field a, bits a record; NaN where not tried.
        entropy_bits: (F,) of each field by its shares.
        p: (F, F) symmetric; NaN where not tried.
        accuracy: (F, F) how often b is guessed from a by what the training rows say; NaN.
        majority: (F,) how often b is guessed by its most frequent class.
    """

    bits: np.ndarray
    entropy_bits: np.ndarray
    p: np.ndarray
    accuracy: np.ndarray
    majority: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """(F, F) of b's entropy, 0 to 1."""
        with np.errstate(invalid="ignore", divide="ignore"):
            part = self.bits / np.maximum(self.entropy_bits, 1e-9)
        return np.clip(part, 0.0, 1.0)


def test_pairs(folds: Sequence[Fold], *, seed: int, progress: Progress) -> PairTests:
    """Every two fields by the pointwise information of the models: log p(b | a) - log p(b)."""
    encoder = folds[0].encoder
    width = encoder.n_fields
    coded = [place for place, each in enumerate(encoder.classes) if each is not None]
    texts = [place for place, each in enumerate(encoder.classes) if each is None]
    bits, accuracy = np.zeros((width, width)), np.zeros((width, width))
    entropy, majority = np.zeros(width), np.zeros(width)
    p_values: dict[tuple[int, int], list[float]] = {}
    n = sum(len(fold.tested) for fold in folds)
    for number, fold in enumerate(folds):
        some = fold.tested
        codes = fold.test_encoded.codes[some]
        rows = np.arange(len(some))
        tables = fold.scorer.pair_tables(progress)
        information: dict[tuple[int, int], np.ndarray] = {}
        for b in coded:
            shares = fold.shares(b)
            entropy[b] += -np.log2(shares[codes[:, b]]).sum() / n
            majority[b] += (codes[:, b] == shares.argmax()).sum() / n
            log_marginal = np.log2(np.maximum(fold.scorer.marginal(b), 1e-12))
            for a in coded:
                if a == b:
                    continue
                table = np.log2(np.maximum(tables[a, b], 1e-12)) - log_marginal
                information[a, b] = table
                bits[a, b] += table[codes[:, a], codes[:, b]].sum() / n
                guess = _lookup(fold, a, b)
                accuracy[a, b] += (guess[codes[:, a]] == codes[:, b]).sum() / n
            for a in texts:
                given = fold.scorer.distribution(
                    fold.test_encoded, some, np.full((len(some), 1), a), b, progress
                )
                gain = np.log2(np.maximum(given, 1e-12)) - log_marginal
                bits[a, b] += gain[rows, codes[:, b]].sum() / n
                accuracy[a, b] += (given.argmax(axis=1) == codes[:, b]).sum() / n
                rng = np.random.default_rng((seed, 3, number, a, b))
                p_values.setdefault((a, b), []).append(permutation_test(gain, codes[:, b], rng).p)
        for a in coded:
            for b in coded:
                if a < b:
                    both = information[a, b] + information[b, a].T
                    rng = np.random.default_rng((seed, 2, number, a, b))
                    found = permutation_test(both, codes[:, b], rng, rows=codes[:, a])
                    p_values.setdefault((a, b), []).append(found.p)
    p = np.full((width, width), np.nan)
    for (a, b), values in p_values.items():
        p[a, b] = p[b, a] = merged_p(values)
    untried = np.ones((width, width), bool)
    for a in range(width):
        for b in coded:
            untried[a, b] = a == b
    bits[untried] = np.nan
    accuracy[untried] = np.nan
    return PairTests(bits, entropy, p, accuracy, majority)


def _lookup(fold: Fold, a: int, b: int) -> np.ndarray:
    """(K_a,) the most frequent class of b beside each class of a, among the training rows."""
    return crossed(
        fold.encoded.codes[fold.train, a],
        fold.encoded.codes[fold.train, b],
        (len(fold.encoder.class_ids[a]), len(fold.encoder.class_ids[b])),
    ).argmax(axis=1)


def test_extremes(folds: Sequence[Fold], numbers: np.ndarray) -> np.ndarray:
    """(n,) p of numbers as far out, on either side, by the tails of the training rows.

    Args:
        numbers: (n,) NaN where there is none, whose p is 1.
    """
    p = np.ones(len(numbers))
    for fold in folds:
        reference = numbers[fold.train]
        reference = reference[np.isfinite(reference)]
        rows = fold.test[np.isfinite(numbers[fold.test])]
        if len(reference) < _LEAST_NUMBERS or not len(rows):
            continue
        sides = [exceedance_p(sign * reference, sign * numbers[rows]) for sign in (1.0, -1.0)]
        p[rows] = np.minimum(1.0, 2 * np.minimum(*sides))
    return p


def crossed(a: np.ndarray, b: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(K_a, K_b) int64, how often two classes stand in one record."""
    return np.bincount(a.astype(np.int64) * shape[1] + b, minlength=shape[0] * shape[1]).reshape(
        shape
    )


def test_order(
    folds: Sequence[Fold], place: int, blocks: np.ndarray, seed: int
) -> tuple[float, float]:
    """Whether a field changes along an order: p, and bits a record that the block tells.

    Args:
        blocks: (n,) int, the part of the order that each record is in.
    """
    n_blocks = int(blocks.max()) + 1
    p_values, total, count = [], 0.0, 0
    for number, fold in enumerate(folds):
        width = len(fold.encoder.class_ids[place])
        seen = crossed(blocks[fold.train], fold.encoded.codes[fold.train, place], (n_blocks, width))
        shares = fold.shares(place)
        # Each block's shares are drawn towards those of all records by the weight of ten.
        given = (seen + 10 * shares) / (seen.sum(axis=1, keepdims=True) + 10)
        table = np.log2(given) - np.log2(shares)
        rows = fold.test[fold.tested]
        codes = fold.encoded.codes[rows, place]
        rng = np.random.default_rng((seed, 4, place, number))
        p_values.append(permutation_test(table, codes, rng, rows=blocks[rows]).p)
        total += float(table[blocks[rows], codes].sum())
        count += len(rows)
    return merged_p(p_values), total / count
