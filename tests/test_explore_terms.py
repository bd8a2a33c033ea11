"""Words, key terms and duplicates: published values, planted truths, brute force."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.explore.duplicates import (
    NearRows,
    exact_duplicates,
    near_duplicate_rows,
    near_duplicate_texts,
)
from nanogpt.explore.terms import (
    fightin_words,
    g_squared,
    key_terms,
    language_model_scores,
    pointwise_kl,
    words,
)

# Words.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t…—!? 🙂 ", []),
        ("The quick, BROWN fox.", ["the", "quick", "brown", "fox"]),
        ("don't Don’t 'quoted' dogs'", ["don't", "don't", "quoted", "dogs"]),
        ("rock'n'roll", ["rock'n'roll"]),
        ("1,234.50 3.14. 2,5 10", ["1,234.50", "3.14", "2,5", "10"]),
        ("-5 +7% $9 1/2", ["5", "7", "9", "1", "2"]),
        ("user_id _x x1 camelCase", ["user_id", "_x", "x1", "camelcase"]),
        ("v2.1 2nd", ["v2", "1", "2", "nd"]),
        ("ERR-404: disk/dev full", ["err", "404", "disk", "dev", "full"]),
        ("Straße ÉTÉ Ελλάς жизнь", ["straße", "été", "ελλάς", "жизнь"]),
        ("e\u0301te\u0301", ["\u00e9t\u00e9"]),
        ("q\u0307x y", ["q\u0307x", "y"]),
        ("\u0130stanbul", ["i\u0307stanbul"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("தமிழ், ไทยนี้", ["தமிழ்", "ไทยนี้"]),
        ("日本語 テスト", ["日本語", "テスト"]),
        ("a\x00b\ud800c", ["a", "b", "c"]),
    ],
)  # fmt: skip
def test_words(text, expected):
    assert words(text) == expected


# Key terms.

LEFT = "the quick brown fox jumps over the lazy pig"
RIGHT = "the lazy purple pig jumps over the lazier donkey"


def counts(text):
    return {word: text.split().count(word) for word in text.split()}


def test_e12_fightin_words_as_published():
    """The example of the fightin_words package, with its prior of .05."""
    z = fightin_words(counts(LEFT), counts(RIGHT), 0.05)
    known = 0.6894227887
    expected = {
        **dict.fromkeys(["donkey", "lazier", "purple"], -known),
        **dict.fromkeys(["fox", "brown", "quick"], known),
        **dict.fromkeys(["the", "jumps", "lazy", "over", "pig"], 0.0),
    }
    assert z == pytest.approx(expected, abs=1e-9)
    swapped = fightin_words(counts(RIGHT), counts(LEFT), 0.05)
    assert swapped == pytest.approx({word: -value for word, value in z.items()}, abs=1e-12)


def test_fightin_words_with_a_prior_for_each_term():
    z = fightin_words({"a": 3, "b": 1}, {"a": 1, "b": 3}, {"a": 1.0, "b": 2.0})
    # a: log(4 / 3) - log(2 / 5), over sqrt(1/4 + 1/2).
    delta = math.log(4 / 3) - math.log(2 / 5)
    assert z["a"] == pytest.approx(delta / math.sqrt(0.75))
    assert z["b"] == pytest.approx(-delta / math.sqrt(1 / 3 + 1 / 5))


def test_fightin_words_without_words():
    assert fightin_words({}, {}) == {}
    assert fightin_words({"only": 4}, {"only": 9}) == {"only": 0.0}
    assert fightin_words({"a": 5, "b": 5}, {})["a"] == pytest.approx(0.0)


def test_e13_g_squared():
    assert g_squared(10, 100, 0, 100) == pytest.approx(20 * math.log(2), abs=1e-9)
    assert g_squared(0, 100, 10, 100) == pytest.approx(13.862944, abs=1e-6)
    assert g_squared(5, 100, 5, 100) == 0.0
    assert g_squared(1, 10, 10, 100) == pytest.approx(0.0, abs=1e-12)
    assert g_squared(0, 10, 0, 10) == 0.0


def test_e13_pointwise_kl():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    found = pointwise_kl(p, q)
    assert found == pytest.approx([0.346574, 0.0, -0.173287], abs=1e-6)
    assert found.sum() == pytest.approx(0.173287, abs=1e-6)
    assert pointwise_kl([0.0, 1.0], [0.0, 1.0]).tolist() == [0.0, 0.0]
    assert pointwise_kl([1.0], [0.0]).tolist() == [math.inf]


def test_language_model_scores_are_means_over_occurrences():
    found = language_model_scores(
        ["cell", "the", "cell", "the"], [-1.0, -2.0, -3.0, -2.0], np.array([-4.0, -2.0, -5.0, -2.5])
    )
    assert found == {"cell": 2.5, "the": 0.25}
    assert language_model_scores([], [], []) == {}
    with pytest.raises(ValueError, match="shorter"):
        language_model_scores(["a", "b"], [0.0], [0.0, 0.0])


def make_records(n, seed, extra=()):
    rng = random.Random(seed)
    common = [f"w{i}" for i in range(40)]
    return [["the", *rng.choices(common, k=12), *extra] for _ in range(n)]


def test_a_planted_term_is_first_and_one_of_all_records_is_not():
    subset = make_records(60, 1)
    for record in subset[:45]:
        record.append("planted")
    background = make_records(400, 2)
    background[0].append("planted")
    found = key_terms(subset, background, k=100)
    best = found[0]
    assert best.term == "planted"
    assert (best.count, best.share, best.background_share) == (45, 0.75, 1 / 400)
    assert best.q < 1e-6
    the = next(term for term in found if term.term == "the")
    assert abs(the.z) < 1
    assert the.q > 0.5
    assert the.share == the.background_share == 1.0
    zs = [term.z for term in found]
    assert zs == sorted(zs, reverse=True)
    assert len(found) == 42
    assert key_terms(subset, background, k=3) == found[:3]
    assert best.g2 == max(term.g2 for term in found)
    assert best.pointwise_kl == max(term.pointwise_kl for term in found)


def test_one_long_record_counts_once():
    subset, background = make_records(30, 3), make_records(30, 4)
    shouted = [[*subset[0], *["once"] * 1000], *subset[1:]]
    said = [[*subset[0], "once"], *subset[1:]]
    assert key_terms(shouted, background) == key_terms(said, background)
    term = next(term for term in key_terms(shouted, background, k=99) if term.term == "once")
    assert term.count == 1
    assert term.z < 2


def test_terms_of_no_records():
    some = make_records(5, 5)
    assert key_terms([], some) == key_terms(some, []) == key_terms([], []) == []
    assert key_terms([[], []], some) == []
    assert [term.term for term in key_terms([["a"], ["a"]], [[], []])] == ["a"]


def test_terms_of_records_that_do_not_differ_are_not_sure():
    """Of 40 terms by chance alone, hardly ever is one found at .05."""
    found = [
        min(term.q for term in key_terms(make_records(50, seed), make_records(200, 1000 + seed)))
        for seed in range(60)
    ]
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)


def test_the_order_of_records_does_not_matter():
    subset, background = make_records(30, 6, ["x"]), make_records(50, 7)
    assert key_terms(subset[::-1], background[::-1]) == key_terms(subset, background)


# Duplicates.


def test_exact_duplicates():
    keys = ["b", "a", "c", "a", "b", "a"]
    assert exact_duplicates(keys) == [[0, 4], [1, 3, 5]]
    assert exact_duplicates([("a", None), ("a", ""), ("a", None)]) == [[0, 2]]
    assert exact_duplicates([]) == exact_duplicates(["x"]) == []


def brute_near_rows(table):
    """Straight from the definition; table: rows of codes."""
    found = []
    for field in range(len(table[0]) if table else 0):
        by_rest = {}
        for row, record in enumerate(table):
            rest = record[:field] + record[field + 1 :]
            by_rest.setdefault(rest, {}).setdefault(record[field], row)
        found += [
            NearRows(tuple(sorted(firsts.values())), field)
            for firsts in by_rest.values()
            if len(firsts) > 1
        ]
    return found


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 4).flatmap(
        lambda width: st.lists(st.tuples(*[st.integers(0, 3)] * width), min_size=1, max_size=25)
    )
)
def test_near_duplicate_rows_are_those_of_brute_force(table):
    columns = [np.array(column) for column in zip(*table, strict=True)]
    found = near_duplicate_rows(columns)
    assert sorted(found, key=repr) == sorted(brute_near_rows(table), key=repr)


def test_near_duplicate_rows_of_little():
    assert near_duplicate_rows([]) == near_duplicate_rows([np.arange(3)]) == []
    assert near_duplicate_rows([np.zeros(0, int)] * 3) == []
    same = [np.zeros(4, int)] * 3
    assert near_duplicate_rows(same) == []  # they are exact duplicates


def make_text(seed, n=60):
    rng = random.Random(seed)
    return [f"word{rng.randrange(5000)}" for _ in range(n)]


def changed(text, places, seed):
    rng = random.Random(seed)
    copy = list(text)
    for place in places:
        copy[place] = f"other{rng.randrange(10**9)}"
    return copy


def shingles(text, size=3):
    return {tuple(text[at : at + size]) for at in range(len(text) - size + 1)}


def similarity(a, b):
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def groups_of(found, texts):
    """The texts of each group, whatever their order."""
    return {frozenset(texts[row] for row in each.rows) for each in found}


def test_near_duplicate_texts_are_pairs_above_the_threshold():
    """200 pairs a little above .8 and 200 a little below; a pair is missed once in 10,000."""
    texts, expected = [], {}
    for seed in range(400):
        one = make_text(seed)
        other = changed(one, [5, 30] if seed % 2 == 0 else [5, 30, 50], seed)
        if similarity(one, other) >= 0.8:
            expected[len(texts), len(texts) + 1] = similarity(one, other)
        else:
            assert similarity(one, other) > 0.7
        texts += [" ".join(one), " ".join(other)]
    assert len(expected) == 200
    found = near_duplicate_texts(texts)
    assert {each.rows: each.similarity for each in found} == pytest.approx(expected)


def test_a_threshold_of_ones_own():
    one = make_text(0)
    texts = [" ".join(one), " ".join(changed(one, [10], 1)), " ".join(make_text(2))]
    alike = similarity(texts[0].split(), texts[1].split())
    assert 0.8 < alike < 0.95
    assert near_duplicate_texts(texts, 0.95) == []
    assert [each.rows for each in near_duplicate_texts(texts, alike)] == [(0, 1)]


def test_case_punctuation_and_spaces_do_not_count():
    texts = ["Hello, World: it's me!", "unlike", "hello   world\nit’s ME", "HELLO (world) it's me?"]
    (found,) = near_duplicate_texts(texts)
    assert (found.rows, found.similarity) == ((0, 2, 3), 1.0)


@pytest.mark.parametrize("texts", [[], [""], ["", "", " ", "...", "!?", "🙂", "🙂"]])
def test_texts_without_words_are_no_duplicates(texts):
    assert near_duplicate_texts(texts) == []


def test_short_texts_are_compared_by_letters():
    network = "telecommunications network unavailable"
    texts = ["yes", "yes", "yea", "no", network, f"{network}s", "network", "available"]
    found = near_duplicate_texts(texts)
    assert [each.rows for each in found] == [(0, 1), (4, 5)]
    assert found[1].similarity == pytest.approx(34 / 35)


@pytest.mark.parametrize("n", [3, 180])
def test_many_equal_texts_are_one_group_beside_their_like(n):
    """More than are compared one by one: nobody is left out."""
    one = make_text(1)
    near, far = " ".join(changed(one, [30], 2)), " ".join(make_text(3))
    texts = [*[" ".join(one)] * n, far, near, " ".join(one).upper()]
    (found,) = near_duplicate_texts(texts)
    assert found.rows == (*range(n), n + 1, n + 2)
    assert found.similarity == pytest.approx(similarity(one, near.split()))


def test_many_unequal_texts_of_one_form_are_one_group():
    form = make_text(4, 80)
    texts = [" ".join([*form[:79], f"number{i}"]) for i in range(130)]
    (found,) = near_duplicate_texts(texts)
    assert found.rows == tuple(range(130))


def test_the_order_of_texts_does_not_matter():
    texts = []
    for seed in range(25):
        one = make_text(seed)
        texts += [" ".join(changed(one, [place], place)) for place in (3, 20, 40)][: 1 + seed % 3]
    expected = groups_of(near_duplicate_texts(texts), texts)
    assert len(expected) > 10
    for seed in range(5):
        shuffled = random.Random(seed).sample(texts, len(texts))
        found = near_duplicate_texts(shuffled)
        assert groups_of(found, shuffled) == expected
        assert [each.rows[0] for each in found] == sorted(each.rows[0] for each in found)


def test_a_chain_is_one_group_with_its_least_similarity():
    """Each is like the next one; the last is less like the first."""
    chain = [make_text(5, 100)]
    for place in range(10, 60, 10):
        chain.append(changed(chain[-1], [place], place))
    assert min(similarity(a, b) for a, b in itertools.pairwise(chain)) >= 0.9
    (found,) = near_duplicate_texts([" ".join(each) for each in chain])
    assert found.rows == tuple(range(6))
    assert found.similarity == pytest.approx(similarity(chain[0], chain[-1]))
    assert found.similarity < 0.8
