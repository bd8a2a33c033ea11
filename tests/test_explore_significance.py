"""How sure findings are: p-values against enumeration and simulation, false discovery rates."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.explore.significance import (
    benjamini_hochberg,
    conformal_p,
    exceedance_p,
    false_discovery_rates,
    gamma_tail,
    merged_p,
    permutation_test,
)


def at_most(rate, n):
    """A rate and three standard errors of it in n trials."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / n)


def all_sums(scores, classes, rows=None):
    """The statistic of every assignment of the classes."""
    rows = np.arange(len(classes)) if rows is None else rows
    dealt = np.array(list(itertools.permutations(classes)))
    return scores[rows, dealt].sum(axis=1)


# Permutation tests.

CASES = {
    "a class for each row": (7, list(range(7)), None),
    "classes that repeat": (3, [0, 0, 1, 1, 2, 2, 2], None),
    "rows that repeat": (3, [0, 1, 1, 2, 2, 2], np.array([0, 0, 1, 1, 1, 3])),
    "two rows": (2, [0, 1], None),
}


@pytest.mark.parametrize(("width", "classes", "rows"), CASES.values(), ids=CASES)
def test_moments_are_those_of_all_permutations(width, classes, rows):
    rng = np.random.default_rng(1)
    scores = rng.lognormal(size=(len(classes), width))
    found = permutation_test(scores, np.array(classes), rng, rows=rows, n_resamples=9)
    sums = all_sums(scores, classes, rows)
    assert found.mean == pytest.approx(sums.mean(), rel=1e-12)
    assert found.deviation == pytest.approx(sums.std(), rel=1e-10)
    places = np.arange(len(classes)) if rows is None else rows
    assert found.statistic == pytest.approx(scores[places, classes].sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("width", "classes", "rows"), list(CASES.values())[:3], ids=list(CASES)[:3]
)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.97])
def test_p_is_the_share_of_permutations_that_reach_the_statistic(width, classes, rows, share):
    rng = np.random.default_rng(2)
    scores = rng.exponential(size=(len(classes), width))
    sums = all_sums(scores, classes, rows)
    order = np.argsort(-sums, kind="stable")
    dealt = list(itertools.permutations(classes))[order[int(share * len(sums))]]
    places = np.arange(len(classes)) if rows is None else rows
    exact = (sums >= scores[places, dealt].sum() - 1e-9).mean()
    found = permutation_test(scores, np.array(dealt), rng, rows=rows, n_resamples=4999)
    assert found.p == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / 4999) + 2e-4)


def test_the_largest_sum_has_a_p_near_its_only_assignment():
    """Only one of 5,040: fewer than ten resamples reach it, and the tail speaks."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        scores = rng.normal(size=(7, 7))
        best = list(itertools.permutations(range(7)))[all_sums(scores, range(7)).argmax()]
        p = permutation_test(scores, np.array(best), rng).p
        assert 1 / (5 * 5040) < p <= 0.005


@pytest.mark.parametrize("rows", [None, np.array([0, 0, 1, 2, 2, 2, 3])], ids=["rows", "repeat"])
def test_the_tail_is_as_skewed_as_all_permutations(rows, monkeypatch):
    """One large score: the skewness is that of the exact sums, whatever was drawn."""
    given = []
    monkeypatch.setattr(
        "nanogpt.explore.significance.gamma_tail", lambda z, skew: given.append(skew) or 1.0
    )
    scores = np.random.default_rng(20).normal(scale=0.05, size=(7, 2))
    scores[3, 1] = 1.0
    classes = np.array([1, 0, 0, 0, 0, 0, 0])
    permutation_test(scores, classes, np.random.default_rng(21), rows=rows, n_resamples=9)
    sums = all_sums(scores, classes, rows)
    expected = ((sums - sums.mean()) ** 3).mean() / sums.std() ** 3
    assert expected > 1.5
    assert given == pytest.approx([expected], rel=1e-9)


def test_equal_sums_count_as_reached():
    scores = np.array([[0.0, 1.0]] * 3 + [[0.0, 0.0]] * 3)
    classes = np.array([1, 1, 0, 0, 0, 1])  # two of three: 10 of the 20 assignments
    found = permutation_test(scores, classes, np.random.default_rng(4), n_resamples=4999)
    assert found.p == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize(
    ("scores", "classes"),
    [
        (np.zeros((0, 2)), np.zeros(0, int)),
        (np.array([[3.0, 5.0]]), np.array([1])),
        (np.ones((9, 2)), np.arange(9) % 2),
        (np.arange(9.0)[:, None] * np.ones(2), np.arange(9) % 2),
        (np.tile([1e9, 0.1], (9, 1)), np.arange(9) % 2),
        (np.random.default_rng(0).normal(size=(9, 2)), np.zeros(9, int)),
    ],
    ids=["no rows", "one row", "constant", "rows only", "classes only", "one class"],
)
def test_where_nothing_can_differ_p_is_one(scores, classes):
    assert permutation_test(scores, classes, np.random.default_rng(0)).p == 1.0


def test_the_same_generator_gives_the_same_p():
    rng = np.random.default_rng(5)
    scores, classes = rng.normal(size=(40, 3)), rng.integers(0, 3, 40)
    first, second = (permutation_test(scores, classes, np.random.default_rng(6)) for _ in range(2))
    assert first == second


def test_resamples_in_several_pieces_are_the_same_test(monkeypatch):
    rng = np.random.default_rng(7)
    scores, classes = rng.normal(size=(40, 3)), rng.integers(0, 3, 40)
    whole = permutation_test(scores, classes, np.random.default_rng(8), n_resamples=100)
    monkeypatch.setattr("nanogpt.explore.significance._CHUNK", 40 * 7)
    assert permutation_test(scores, classes, np.random.default_rng(8), n_resamples=100) == whole


def draw_lognormal(rng, shape):
    return rng.lognormal(sigma=1.5, size=shape)


def draw_heavy(rng, shape):
    return rng.standard_t(2, size=shape)


@pytest.mark.parametrize("draw", [draw_lognormal, draw_heavy])
@pytest.mark.parametrize("few", [False, True], ids=["halves", "a few"])
def test_chance_is_not_found_more_often_than_p_says(draw, few):
    """Independent classes, and skewed or heavy scores: p is uniform or larger, in its tail too."""
    rng = np.random.default_rng(9)
    classes = (np.arange(50) < (4 if few else 25)).astype(int)
    p = np.array(
        [
            permutation_test(draw(rng, (50, 2)), rng.permutation(classes), rng, n_resamples=199).p
            for _ in range(3000)
        ]
    )
    for level in (0.5, 0.2, 0.05, 0.01, 0.001):
        assert (p <= level).mean() <= at_most(level, len(p)), level
    assert (p <= 0.05).mean() >= 0.03  # nor is it blind
    assert p.min() > 1e-6


@pytest.mark.parametrize("other", [0.0, -50.0], ids=["one", "and its opposite"])
def test_one_huge_score_is_no_proof(other):
    """A row whose score outweighs all others has its class by chance in 2 of 2,000 cases."""
    rng = np.random.default_rng(10)
    scores = rng.normal(scale=0.1, size=(2000, 2))
    scores[0, 1], scores[5, 1] = 50.0, other
    classes = (np.arange(2000) < 2).astype(int)
    for _ in range(8):
        assert permutation_test(scores, classes, rng, n_resamples=199).p > 1e-4


def test_what_is_true_is_found_far_beyond_the_resamples():
    rng = np.random.default_rng(11)
    classes = rng.integers(0, 2, 300)
    scores = rng.normal(size=(300, 2))
    scores[np.arange(300), classes] += 1.0
    assert permutation_test(scores, classes, rng).p < 1e-12


@pytest.mark.parametrize("z", [-3.0, -1.0, 0.0, 0.5, 2.0, 5.0, 10.0])
def test_gamma_tail_where_it_is_known(z):
    normal = 0.5 * math.erfc(z / math.sqrt(2))
    assert gamma_tail(z, 0.0) == pytest.approx(normal, rel=1e-12)
    assert gamma_tail(z, -0.7) == pytest.approx(normal, rel=1e-12)
    assert gamma_tail(z, 2.0) == pytest.approx(math.exp(-(1 + z)) if z > -1 else 1.0, rel=1e-10)
    # Shape 4, with Erlang's sum.
    x = 4 + 2 * z
    erlang = math.exp(-x) * sum(x**k / math.factorial(k) for k in range(4)) if x > 0 else 1.0
    assert gamma_tail(z, 1.0) == pytest.approx(erlang, rel=1e-10)


def test_gamma_tail_joins_the_normal_and_grows_with_skewness():
    for z in (2.0, 4.0, 6.0):
        assert gamma_tail(z, 1.01e-3) == pytest.approx(gamma_tail(z, 0.99e-3), rel=0.05)
        tails = [gamma_tail(z, skew) for skew in (0.0, 0.01, 0.1, 0.5, 1.0, 1.5)]
        assert tails == sorted(tails)
        assert tails[0] < tails[-1]


def test_merged_p():
    assert merged_p([0.01]) == 0.01
    assert merged_p([0.2, 0.01, 0.9]) == pytest.approx(0.03)
    assert merged_p([0.6, 0.7]) == 1.0
    assert merged_p([]) == 1.0  # nothing was tried


# Conformal p-values.


def test_e10_conformal_false_positives():
    """E10: 199 of a reference, level .05: a twentieth of the new ones, on average exactly."""
    rng = np.random.default_rng(12)
    rates, smallest = [], 1.0
    for _ in range(200):
        p = conformal_p(rng.normal(size=199), rng.normal(size=500))
        rates.append((p <= 0.05).mean())
        smallest = min(smallest, p.min())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.005)
    assert smallest == 1 / 200


def test_conformal_p_counts_ties_as_reached():
    p = conformal_p(np.array([1.0, 2.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0, 2.5, 3.0, 4.0]))
    assert p.tolist() == pytest.approx([1.0, 1.0, 0.8, 0.4, 0.4, 0.2])
    assert conformal_p(np.zeros(0), np.array([7.0])).tolist() == [1.0]
    assert conformal_p(np.array([0.0, np.inf]), np.array([np.inf])).tolist() == [2 / 3]


# Exceedances.

TAILS = {
    "exponential": lambda rng, n: rng.exponential(size=n),
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.uniform(size=n),
    "lognormal": lambda rng, n: rng.lognormal(sigma=1.5, size=n),
    "t of 3": lambda rng, n: rng.standard_t(3, size=n),
    "rounded": lambda rng, n: np.round(rng.exponential(size=n)),
}


@pytest.mark.parametrize("draw", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("n", [250, 2000])
def test_exceedances_are_as_rare_as_they_say(draw, n):
    rng = np.random.default_rng(13)
    rates = np.array(
        [(exceedance_p(draw(rng, n), draw(rng, 2000)) <= 1e-3).mean() for _ in range(100)]
    )
    assert rates.mean() <= 1e-3 + 3 * rates.std() / math.sqrt(len(rates)) + 1e-4


@pytest.mark.parametrize("draw", [TAILS["exponential"], TAILS["normal"], TAILS["uniform"]])
def test_a_gross_outlier_has_a_tiny_p(draw):
    rng = np.random.default_rng(14)
    p = exceedance_p(draw(rng, 2000), np.array([0.0, 60.0, np.inf]))
    assert p[1] < 1e-6
    assert p[2] < 1e-100
    assert p[0] > 0.4


@pytest.mark.parametrize(
    "reference",
    [
        np.random.default_rng(15).exponential(size=199),
        np.zeros(500),
        np.full(500, np.inf),
        np.full(500, -np.inf),
        np.zeros(0),
        np.r_[np.full(490, -np.inf), np.arange(10.0)],
    ],
    ids=["small", "constant", "infinite", "minus infinite", "empty", "few finite"],
)
def test_without_a_tail_to_go_by_p_is_the_conformal_one(reference):
    scores = np.array([-np.inf, -1.0, 0.0, 1.0, 5.0, 1e6, np.inf])
    assert exceedance_p(reference, scores).tolist() == conformal_p(reference, scores).tolist()


def test_infinite_scores_are_no_rarer_than_in_the_reference():
    rng = np.random.default_rng(16)
    finite = rng.normal(size=390)
    reference = np.r_[finite, np.full(10, np.inf)]
    p = exceedance_p(reference, np.array([-np.inf, 0.0, finite.max(), np.inf]))
    assert p[0] == 1.0
    assert p[1] == pytest.approx(0.5, abs=0.1)
    assert p[3] == pytest.approx(p[2], rel=0.1)
    assert p[3] > 0.01


@pytest.mark.parametrize("short", [0.0, 4.9, 4.99999])
def test_a_tail_with_an_end_has_a_p(short):
    """Excesses that are nearly all alike; their fitted shape is far below zero."""
    reference = np.r_[np.zeros(200), np.full(11, 5.0), short]
    p = exceedance_p(reference, np.array([5.0, 6.0, 1000.0]))
    assert np.isfinite(p).all()
    assert (np.diff(p) <= 0).all()
    assert p[0] >= 11 / 213


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12),
    st.lists(st.floats(allow_nan=False), min_size=1, max_size=12),
    st.integers(200, 400),
)
def test_exceedances_are_probabilities_that_fall_with_the_score(often, scores, n):
    reference = np.r_[np.resize(often, n), scores[0]]
    p = exceedance_p(reference, np.sort([*often, *scores]))
    assert ((p > 0) & (p <= 1)).all()
    assert (np.diff(p) <= 1e-12).all()


# False discovery rates.


def test_benjamini_hochberg_by_hand():
    p = np.array([0.6, 0.01, 0.03, 0.04, 0.005])
    # Ranked .005 .01 .03 .04 .6, times 5 / rank: .025 .025 .05 .05 .6.
    assert benjamini_hochberg(p).tolist() == pytest.approx([0.6, 0.025, 0.05, 0.05, 0.025])
    assert benjamini_hochberg(np.array([0.9, 0.8])).tolist() == pytest.approx([0.9, 0.9])
    assert benjamini_hochberg(np.zeros(0)).tolist() == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_one_family_is_benjamini_hochberg_from_its_definition(p):
    """q <= alpha exactly where the step-up procedure at alpha rejects."""
    q = false_discovery_rates({"one": np.array(p)})["one"]
    ranked = np.sort(p)
    for alpha in (0.01, 0.05, 0.2, 0.7):
        within = np.flatnonzero(ranked <= alpha * np.arange(1, len(p) + 1) / len(p) + 1e-12)
        highest = ranked[within[-1]] if len(within) else -1.0
        assert ((q <= alpha + 1e-9) == (np.array(p) <= highest)).all()


def test_a_small_family_is_not_drowned_by_a_large_one():
    rng = np.random.default_rng(17)
    few = np.array([1e-4, 0.003, *rng.uniform(size=8)])
    many = rng.uniform(size=100_000)
    together = false_discovery_rates({"few": few, "many": many})["few"]
    # Two families: each has half of the level, as if alone and tried twice.
    assert together[0] == pytest.approx(2 * benjamini_hochberg(few)[0])
    assert together[:2].max() <= 0.05
    assert benjamini_hochberg(np.r_[few, many])[:2].min() > 0.5


def test_the_order_of_families_does_not_matter_and_q_goes_to_its_own():
    rng = np.random.default_rng(18)
    families = {name: rng.uniform(size=n) ** 3 for name, n in (("a", 5), ("b", 200), ("c", 31))}
    found = false_discovery_rates(families)
    turned = false_discovery_rates(dict(reversed(families.items())))
    for name, p in families.items():
        assert found[name].tolist() == pytest.approx(turned[name].tolist(), rel=1e-12)
        order = np.argsort(p)
        assert (np.diff(found[name][order]) >= -1e-15).all()
        assert (found[name] <= 1).all()


def test_empty_families_are_no_families():
    p = np.array([0.01, 0.2, 0.5])
    found = false_discovery_rates({"none": np.zeros(0), "some": p, "nor": np.zeros(0)})
    assert found["some"].tolist() == benjamini_hochberg(p).tolist()
    assert found["none"].tolist() == found["nor"].tolist() == []
    assert {k: v.tolist() for k, v in false_discovery_rates({"x": np.zeros(0)}).items()} == {
        "x": []
    }
    assert false_discovery_rates({}) == {}


@pytest.mark.parametrize("n_true", [0, 6])
def test_no_more_than_alpha_of_the_findings_are_false(n_true):
    """Simulated: a few true ones in the small family, none in the large one."""
    rng = np.random.default_rng(19)
    false_share, found_true = [], []
    for _ in range(1000):
        small, large = rng.uniform(size=20), rng.uniform(size=1000)
        small[:n_true] = rng.uniform(size=n_true) * 1e-4
        q = false_discovery_rates({"small": small, "large": large})
        hits = int((q["small"] <= 0.1).sum() + (q["large"] <= 0.1).sum())
        right = int((q["small"][:n_true] <= 0.1).sum())
        false_share.append((hits - right) / max(1, hits))
        found_true.append(right)
    assert np.mean(false_share) <= 0.1 + 3 * np.std(false_share) / math.sqrt(1000)
    assert np.mean(false_share) >= 0.04  # the level is used
    assert np.mean(found_true) == pytest.approx(n_true, abs=0.01)
