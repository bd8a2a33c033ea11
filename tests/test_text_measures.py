"""Measures of texts: by hand, against slow definitions, at the edges."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.text_measures import (
    distinct_n,
    duplicate_rate,
    longest_common_substring,
    self_overlap,
    term_rate,
    whole_words,
)


def test_distinct_n_is_the_share_of_different_grams_within_texts():
    texts = ["The cat. The dog!", "the CAT"]
    assert distinct_n(texts, 1) == 3 / 6
    # the cat, cat the, the dog, and the cat again; "dog the" would cross from text to text.
    assert distinct_n(texts, 2) == 3 / 4
    assert distinct_n(texts, 3) == 1
    assert math.isnan(distinct_n(["one two"], 3))
    assert math.isnan(distinct_n([], 1))
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n(texts, 0)


def test_the_duplicate_rate_counts_what_stood_there_before():
    assert duplicate_rate(["a", "b", "a", "a"]) == 0.5
    assert duplicate_rate(["a", "A"]) == 0
    assert duplicate_rate([]) == 0


def test_self_overlap_is_the_share_of_phrases_that_another_text_has():
    assert self_overlap(["a b c d", "A b, c d", "w x y z"]) == pytest.approx(2 / 3)
    assert self_overlap(["a b c d e", "b c d e f", "q"]) == pytest.approx(0.5)
    # A phrase that a text repeats for itself is no overlap with another.
    assert self_overlap(["a b a b a b", "w x y z"], n=2) == 0
    assert math.isnan(self_overlap(["too short"]))


def test_term_rates_are_ratios_with_errors_over_texts():
    found = [Counter(king=2, queen=1), Counter(), Counter(queen=1), Counter()]
    rate = term_rate(found, [10, 20, 5, 5])
    assert rate.per_1000_tokens == pytest.approx(1000 * 4 / 40)
    assert rate.per_text == pytest.approx(3 / 4)
    # By hand: residuals 3 - 1, 0 - 2, 1 - 0.5, 0 - 0.5 over a mean of 10 tokens.
    deviation = math.sqrt((4 + 4 + 0.25 + 0.25) / 3)
    assert rate.per_1000_tokens_se == pytest.approx(1000 * deviation / 2 / 10)
    assert rate.per_text_se == pytest.approx(math.sqrt((2 * 0.75**2 + 0.25**2 + 1.25**2) / 3) / 2)
    assert math.isnan(term_rate([Counter(king=1)], [4]).per_text_se)
    with pytest.raises(ValueError, match="1 texts and 2 lengths"):
        term_rate([Counter(king=1)], [1, 2])


def test_the_error_of_a_term_rate_is_the_spread_of_repeated_samples():
    rng = random.Random(5)

    def sample():
        texts = [rng.choices("xyz", k=rng.randint(1, 30)) for _ in range(60)]
        return term_rate([Counter(x=text.count("x")) for text in texts], list(map(len, texts)))

    rates = [sample() for _ in range(400)]
    values = [rate.per_1000_tokens for rate in rates]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    claimed = sum(rate.per_1000_tokens_se for rate in rates) / len(rates)
    assert claimed == pytest.approx(spread, rel=0.15)


def test_words_that_an_edge_cuts_are_left_out():
    assert whole_words("ral gene the", "gene") == " gene the"
    assert whole_words("ral gene the", "gene ", cut_off=True) == "ral gene "
    assert whole_words("rapy", "the", cut_off=True) == ""
    assert whole_words("gene.", "", cut_off=True) == "gene."
    assert whole_words("", "x", cut_off=True) == ""


def slow_longest(texts, corpus):
    pieces = {
        text[i:j] for text in texts for i in range(len(text)) for j in range(i, len(text) + 1)
    }
    return max((len(piece) for piece in pieces if piece in corpus), default=0)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("abc", max_size=14), max_size=4), st.text("abcd", max_size=60))
def test_the_longest_common_substring_is_the_slow_definition(texts, corpus):
    assert longest_common_substring(texts, corpus) == slow_longest(texts, corpus)


def test_the_longest_common_substring_of_a_large_corpus_is_quick_and_exact():
    rng = random.Random(1)
    corpus = "".join(rng.choices("abcdefgh \n€", k=400_000))
    copied = corpus[123_456 : 123_456 + 77]
    texts = ["".join(rng.choices("abcdefgh", k=100)) for _ in range(100)] + ["€" + copied + "€"]
    found = longest_common_substring(texts, corpus)
    assert 77 <= found <= 79
    assert longest_common_substring([copied], corpus) == 77
    # Two texts that together spell a piece of the corpus hold half of it each.
    assert longest_common_substring([copied[:40], copied[40:]], corpus) == 40
