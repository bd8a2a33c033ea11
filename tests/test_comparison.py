"""Comparisons: intervals, samples and KL of whole texts."""

import math

import pytest
import torch

from nanogpt import GPT
from nanogpt.comparison import Estimate, sequence_kl, write_samples
from nanogpt.tokenizer import CharTokenizer


def small_model(seed=0, scale=1.0):
    torch.manual_seed(seed)
    tokenizer = CharTokenizer("abc ")
    model = GPT(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=8)
    with torch.no_grad():
        model.token_weight.mul_(scale)
    model.tokenizer = tokenizer
    return model.eval()


def test_an_interval_is_the_normal_one():
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3)
    assert estimate.mean == 3
    assert estimate.high - estimate.mean == pytest.approx(1.959964 * deviation / 2, rel=1e-6)
    assert estimate.n == 4


def test_a_difference_adds_both_variances():
    ours, theirs = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])
    difference = Estimate.of_difference(ours, theirs)
    assert difference.mean == 1
    half = 1.959964 * math.sqrt(2 / 2 + 1 / 3)
    assert difference.high - 1 == pytest.approx(half, rel=1e-6)
    assert not difference.outside_zero
    assert Estimate.of_difference(ours + 10, theirs).outside_zero


def test_intervals_cover_the_mean_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(2000, 50, generator=generator)
    covered = sum(e.low <= 0.5 <= e.high for e in map(Estimate.of, samples)) / 2000
    assert 0.93 < covered < 0.965


def test_samples_do_not_depend_on_their_batch():
    model = small_model(scale=30)
    _, many = write_samples(model, 30, 12, seed=3)
    _, few = write_samples(model, 7, 12, seed=3)
    assert many[:7] == few
    end = model.tokenizer.end_of_text_id
    assert all(end not in ids for ids in many)
    assert {len(ids) for ids in many} != {12}
    prompts = ["ab", "c", "abc"]
    starts, new = write_samples(model, 9, 5, seed=3, prompts=prompts)
    assert [len(start) for start in starts] == [3, 2, 4] * 3
    assert write_samples(model, 2, 5, seed=3, prompts=prompts)[1] == new[:2]


def test_the_kl_of_texts_is_zero_for_one_model_and_exact_in_the_mean():
    model, other = small_model(0, scale=20), small_model(1, scale=20)
    starts, new = write_samples(model, 400, 3, seed=0)
    assert float(sequence_kl(model, model, starts, new, 3).abs().max()) < 1e-6
    kl = Estimate.of(sequence_kl(model, other, starts, new, 3))
    # By enumeration of every text of at most three tokens.
    end, exact = model.tokenizer.end_of_text_id, 0.0
    frontier = [([end], 0.0)]
    with torch.inference_mode():
        for _ in range(3):
            coming = []
            for text, log_p in frontier:
                ours = model(torch.tensor([text]))[0][0, -1].double().log_softmax(-1)
                theirs = other(torch.tensor([text]))[0][0, -1].double().log_softmax(-1)
                exact += math.exp(log_p) * float((ours.exp() * (ours - theirs)).sum())
                coming += [
                    ([*text, token], log_p + float(ours[token]))
                    for token in range(len(ours))
                    if token != end
                ]
            frontier = coming
    assert kl.low - 0.3 * (kl.high - kl.mean) < exact < kl.high + 0.3 * (kl.high - kl.mean)
    assert exact > 0.01
