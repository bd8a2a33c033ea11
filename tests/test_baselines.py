"""The baselines: properly normalised, and the figures that known texts give."""

import math
import zlib

import numpy as np
import pytest

from nanogpt.baselines import (
    gzip_bits_per_byte,
    ngram_bits_per_byte,
    ngram_probabilities,
    text_baselines,
)


def reference_text() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("context", [b"abra", b"cada", b"zzzz", b"xxab"])
def test_probabilities_of_all_bytes_sum_to_one(order, context):
    train = b"abracadabra abracadabra alakazam " * 3 + context
    total = sum(ngram_probabilities(train, bytes([w]), order)[0] for w in range(256))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_a_unigram_model_by_hand():
    """Order 1 of "aab": counts a 2, b 1; D1 = 1 - 2 y, y = 1/3; D2 = 2 - 3 y = 1."""
    d1, d2 = 1 - 2 / 3, 1.0
    mass = (d1 + d2) / 3
    want = [(2 - d2) / 3 + mass / 256, (1 - d1) / 3 + mass / 256, mass / 256]
    got = [ngram_probabilities(b"aab", w, 1)[0] for w in (b"a", b"b", b"z")]
    assert got == pytest.approx(want)


def test_lower_orders_count_different_bytes_before():
    """In "San Francisco" fashion: c always follows b, so alone it is a rare byte."""
    train = b"abcabcabcabcadaeaf" * 4
    p_c, p_a = (ngram_probabilities(train + b"~", w, 2)[0] for w in (b"c", b"a"))
    assert p_c < p_a / 2


def test_the_context_of_the_first_byte_is_the_end_of_training():
    train = b"xyxyxyxyxyxyxyxyxyxy"
    assert ngram_probabilities(train, b"x", 3)[0] > 0.8
    assert ngram_probabilities(train, b"y", 3)[0] < 0.1


def test_random_bytes_cost_eight_bits_and_a_constant_almost_none():
    noise = np.random.default_rng(0).integers(0, 256, 60_000, dtype=np.uint8).tobytes()
    assert ngram_bits_per_byte(noise[:50_000], noise[50_000:]) == pytest.approx(8, abs=0.2)
    assert gzip_bits_per_byte(noise[:50_000], noise[50_000:]) == pytest.approx(8, abs=0.1)
    assert ngram_bits_per_byte(b"a" * 5000, b"a" * 1000) < 0.01


def test_an_unseen_byte_is_finite():
    assert math.isfinite(ngram_bits_per_byte(b"aaaaaaaa", b"\xff\x00"))


def test_longer_contexts_help_on_real_text():
    text = reference_text()
    train, val = text[:400_000], text[400_000:440_000]
    by_order = [ngram_bits_per_byte(train, val, order) for order in (1, 2, 3, 5)]
    assert by_order == sorted(by_order, reverse=True)
    assert 1.5 < by_order[-1] < 3.0 < 4.0 < by_order[0]


def test_gzip_is_deflate_with_the_training_text_at_hand():
    text = reference_text()
    val = text[400_000:440_000]
    alone = 8 * len(zlib.compress(val, 9)) / len(val)
    assert gzip_bits_per_byte(b"", val) == pytest.approx(alone, abs=0.01)
    assert gzip_bits_per_byte(text[:400_000], val) < alone
    assert gzip_bits_per_byte(val, val[-20_000:]) < 0.2


def test_both_baselines_of_a_text():
    text = reference_text()
    found = text_baselines(text[:50_000], text[50_000:60_000])
    assert set(found) == {"order-5 n-gram", "gzip -9"}
    assert found["order-5 n-gram"] < found["gzip -9"]
    assert text_baselines(b"abc", b"") == text_baselines(b"", b"abc") == {}


def test_tinyshakespeare_has_its_figures(data_folder):
    raw = (data_folder / "tinyshakespeare.txt").read_bytes()
    cut = len(raw) * 9 // 10
    found = text_baselines(raw[:cut], raw[cut:])
    assert found["order-5 n-gram"] == pytest.approx(2.2532, abs=1e-3)
    assert found["gzip -9"] == pytest.approx(3.0999, abs=0.02)
