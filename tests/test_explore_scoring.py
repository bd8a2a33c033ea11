"""What a model thinks of records: surprisal, typicality, conditional distributions, vectors."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanogpt.explore.fields import describe_fields
from nanogpt.explore.learning import Encoder, make_plan, random_orders
from nanogpt.explore.records import Records
from nanogpt.explore.scoring import (
    Scorer,
    centred,
    joint_rescoring,
    position_weights,
    sequence_surprisal,
    token_scores,
    typicality,
)
from nanogpt.model import GPT


def random_model(vocab_size, block_size=16, scale=1.0, n_embd=16):
    """A model with weights large enough that its distributions differ from place to place."""
    torch.manual_seed(1)
    model = GPT(vocab_size=vocab_size, block_size=block_size, n_layer=1, n_head=2, n_embd=n_embd)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, scale / math.sqrt(n_embd))
    return model.eval()


def uniform_model(vocab_size):
    model = GPT(vocab_size=vocab_size, block_size=16, n_layer=1, n_head=1, n_embd=8).eval()
    torch.nn.init.zeros_(model.token_weight)
    return model


def records_with_texts(n=40, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        city = str(rng.choice(["Rome", "Oslo", "Lima"]))
        length = int(rng.integers(0, 30))
        text = " ".join(rng.choice(["sun", "rain", "a long way", "über", "ok"], length))
        rows.append(
            {"city": city, "size": f"{rng.normal():.3f}", "note": f"{text} in {city} {number % 7}"}
        )
    return Records.from_rows(rows)


@pytest.fixture(scope="module")
def mixed():
    """Records of a category, a number and a text, and an untrained model of them."""
    records = records_with_texts()
    encoder = Encoder.fit(describe_fields(records), records)
    model = random_model(encoder.tokenizer.vocab_size, block_size=32)
    return encoder.encode(records), Scorer(model, encoder), records


def test_the_probabilities_of_all_strings_sum_to_one():
    """E1: strings of two symbols that end within six, and those of six that go on."""
    model, end = random_model(3, scale=2.0), 2
    total = 0.0
    for length in range(7):
        for symbols in itertools.product(range(2), repeat=length):
            tail = [end] if length < 6 else []
            tokens = torch.tensor([[end, *symbols, *tail]])
            total += 2 ** -float(sequence_surprisal(model, tokens))
    assert total == pytest.approx(1, abs=1e-6)


def test_a_uniform_model_takes_the_logarithm_of_its_vocabulary():
    """E2: ten characters and their end among 66 symbols; without an end among 65."""
    tokens = torch.tensor([[65, *range(10), 65]])
    assert float(sequence_surprisal(uniform_model(66), tokens)) == pytest.approx(
        66.488335, abs=1e-4
    )
    tokens = torch.tensor([[64, *range(10)]])
    assert float(sequence_surprisal(uniform_model(65), tokens)) == pytest.approx(
        60.223678, abs=1e-4
    )


def test_what_follows_the_end_does_not_count():
    model = random_model(5)
    short = torch.tensor([[4, 1, 2, 4]])
    longer = torch.tensor([[4, 1, 2, 4, 3, 0]])
    assert sequence_surprisal(model, short) == pytest.approx(sequence_surprisal(model, longer))


@torch.inference_mode()
def one_by_one(scorer, encoded, row, order):
    """Bits of each field of a record, token after token with nothing beside it."""
    encoder = scorer.encoder
    bits = np.zeros(encoder.n_fields)
    tokens = [encoder.end]
    for field in order:
        tokens.append(int(encoder.name_ids[field]))
        value = encoded.texts[field][row] if field in encoded.texts else [encoded.ids[row, field]]
        for token in value:
            context = tokens[-((len(tokens) - 1) % scorer.model.config.block_size + 1) :]
            logits = scorer.model(torch.tensor([context]))[0][0, -1].double()
            ids = encoder.class_ids[field]
            if len(ids):
                mask = torch.full_like(logits, -math.inf)
                mask[torch.from_numpy(ids)] = 0
                logits = logits + mask
            bits[field] -= float(torch.log_softmax(logits, 0)[int(token)]) / math.log(2)
            tokens.append(int(token))
    return bits


def test_field_bits_are_those_of_the_tokens_one_by_one(mixed):
    """E3: windows, batches, padding and the order of rows change nothing; fields sum to records."""
    encoded, scorer, _ = mixed
    rows = np.array([3, int(encoded.lengths().argmax()), 8, 30])
    assert encoded.lengths().max() > scorer.model.config.block_size
    orders = random_orders(np.random.default_rng(0), len(rows), 3)
    together, _, _ = scorer.cell_scores(encoded, rows, orders)
    for at, (row, order) in enumerate(zip(rows.tolist(), orders.tolist(), strict=True)):
        alone, _, _ = scorer.cell_scores(encoded, rows[at : at + 1], orders[at : at + 1])
        np.testing.assert_allclose(alone[0], together[at], atol=1e-4)
        np.testing.assert_allclose(one_by_one(scorer, encoded, row, order), alone[0], atol=1e-4)
    whole = scorer.surprisal(encoded, n_orders=3, seed=(0,))
    np.testing.assert_allclose(whole.field_bits.sum(axis=1), whole.bits, atol=1e-4)


def test_typicality_of_what_a_model_writes_is_standard_normal():
    """E4: 4,000 sequences of 5 to 80 tokens drawn from the model itself."""
    model = random_model(24, block_size=128, scale=2.5)
    rng = np.random.default_rng(0)
    n = 4000
    lengths = rng.integers(5, 81, n)
    start = torch.zeros(n, 1, dtype=torch.int64)
    tokens = model.generate(start, max_new_tokens=80, seed=1)
    real = np.arange(80)[None, :] < lengths[:, None]
    sums = np.zeros((3, n))
    with torch.inference_mode():
        for rows in np.array_split(np.arange(n), 8):
            logits = model(tokens[rows, :-1])[0]
            scores = token_scores(logits.flatten(0, 1), tokens[rows, 1:].flatten())
            for into, value in zip(
                sums, (scores.surprisal, scores.entropy, scores.varentropy), strict=True
            ):
                into[rows] = (value.reshape(-1, 80).numpy() * real[rows]).sum(axis=1)
    z = typicality(*sums)
    assert abs(z.mean()) < 0.05
    assert abs(z.std() - 1) < 0.05
    assert abs(np.corrcoef(z, lengths)[0, 1]) < 0.05
    assert np.corrcoef(sums[0], lengths)[0, 1] > 0.9  # what the raw sum would rank
    top = np.argsort(-z)[: n // 100]
    assert abs(lengths[top].mean() - 42.5) < 15
    assert lengths[np.argsort(-sums[0])[: n // 100]].mean() > 70


def test_typicality_is_the_negative_analytic_discrepancy():
    """E5: the formula of Fast-DetectGPT, in float64, on random logits."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 30, generator=rng, dtype=torch.float64) * 3
    targets = torch.randint(30, (50,), generator=rng)
    log_p = F.log_softmax(logits, dim=-1)
    p = log_p.exp()
    likelihood = log_p.gather(1, targets[:, None]).squeeze(1)
    mean = (p * log_p).sum(dim=-1)
    variance = (p * log_p**2).sum(dim=-1) - mean**2
    discrepancy = (likelihood.sum() - mean.sum()) / variance.sum().sqrt()
    scores = token_scores(logits, targets)
    sums = [
        np.array([float(each.sum())])
        for each in (scores.surprisal, scores.entropy, scores.varentropy)
    ]
    assert typicality(*sums)[0] == pytest.approx(-float(discrepancy), abs=1e-5)


def test_scores_are_finite_where_logits_are_minus_infinity():
    logits = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, 0.0, -math.inf]])
    scores = token_scores(logits, torch.tensor([2, 1]))
    for each in (scores.surprisal, scores.entropy, scores.varentropy):
        assert torch.isfinite(each).all()
    assert float(scores.entropy[1]) == float(scores.varentropy[1]) == 0


def test_typicality_where_the_model_is_sure():
    sure = np.zeros(2)
    assert typicality(np.array([0.0, 3.0]), sure, sure).tolist() == [0.0, math.inf]


def test_completion_by_bayes():
    """E7 with a stub: 2 (red, S), 1 (red, L), 3 (blue, L)."""
    joint = {("red", "S"): 2 / 6, ("red", "L"): 1 / 6, ("blue", "L"): 3 / 6, ("blue", "S"): 0.0}
    with np.errstate(divide="ignore"):
        given_red = np.log([joint["red", "S"], joint["red", "L"]])
        given_l = np.log([joint["red", "L"], joint["blue", "L"]])
        given_s = np.log([joint["red", "S"], joint["blue", "S"]])
    assert joint_rescoring(given_red)[0] == pytest.approx(2 / 3, abs=1e-6)
    assert joint_rescoring(given_l)[0] == pytest.approx(1 / 4, abs=1e-6)
    assert joint_rescoring(given_s).tolist() == [1.0, 0.0]


def test_orders_are_averaged_as_a_mixture():
    logs = np.log([[0.2, 0.4], [0.2, 0.0001]])
    expected = np.array([0.6, 0.2001]) / 0.8001
    np.testing.assert_allclose(joint_rescoring(logs), expected, atol=1e-9)


def test_chain_rule_of_two_fields(mixed):
    """E15: log p(a) + log p(b | a) = log p(a, b)."""
    encoded, scorer, _ = mixed
    rows = np.arange(12)
    orders = np.broadcast_to([0, 1], (12, 2))
    both, _, _ = scorer.cell_scores(encoded, rows, orders)
    table, marginal = scorer.pair_tables()[0, 1], scorer.marginal(0)
    codes = encoded.codes[rows]
    apart = -np.log(marginal[codes[:, 0]]) - np.log(table[codes[:, 0], codes[:, 1]])
    np.testing.assert_allclose(both.sum(axis=1) * math.log(2), apart, atol=1e-4)


def test_distributions_sum_to_one_whatever_is_given(mixed):
    encoded, scorer, _ = mixed
    rows = np.arange(len(encoded))
    for order in ([], [1], [2], [1, 2], [2, 1]):
        orders = np.broadcast_to(np.array(order, np.int64), (len(rows), len(order)))
        p = scorer.distribution(encoded, rows, orders, 0)
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-9)
    alone = scorer.distribution(encoded, rows[5:6], np.array([[1, 2]]), 0)
    orders = np.broadcast_to([1, 2], (len(rows), 2))
    np.testing.assert_allclose(
        scorer.distribution(encoded, rows, orders, 0)[5], alone[0], atol=1e-5
    )


def test_weights_of_positions():
    """E14: four tokens weigh a tenth, two tenths and so on, padding nothing."""
    records = Records.from_rows([{"a": str(n % 2)} for n in range(30)])
    encoder = Encoder.fit(describe_fields(records), records)
    batch = encoder.encode(records).sequences(np.arange(2), np.zeros((2, 1), np.int64), 8)
    assert batch.tokens.shape == (2, 3)
    np.testing.assert_allclose(position_weights(batch)[0], np.array([1, 2, 3]) / 6)
    four = type(batch)(np.zeros((1, 6)), np.zeros((1, 6)), np.array([[-1, 0, -1, 0, -2, -2]]),
                       np.zeros(1, np.int64))  # fmt: skip
    np.testing.assert_allclose(position_weights(four)[0], [0.1, 0.2, 0.3, 0.4, 0, 0])


def test_weights_go_on_over_windows(mixed):
    encoded, _, _ = mixed
    row = int(encoded.lengths().argmax())
    batch = encoded.sequences(np.array([row]), np.array([[0, 1, 2]]), 16)
    assert len(batch.tokens) > 1
    weights = position_weights(batch)
    assert weights.sum() == pytest.approx(1)
    assert weights[0, 0] < weights[0, -1] < weights[1, 0]


def test_vectors_do_not_depend_on_their_neighbours(mixed):
    """E14: alone, among others, in another order of rows."""
    encoded, scorer, _ = mixed
    order = np.array([2, 0, 1])
    together = scorer.states_of(encoded, order)
    alone = scorer.states_of(encoded.take(np.array([9])), order)
    np.testing.assert_allclose(together[9], alone[0], atol=1e-5)
    turned = scorer.states_of(encoded.take(np.arange(len(encoded))[::-1]), order)
    np.testing.assert_allclose(turned[::-1], together, atol=1e-5)


def test_centred_vectors(mixed):
    """E14: they sum to nothing before they are scaled, and point everywhere alike."""
    encoded, scorer, _ = mixed
    states = scorer.states(encoded, n_orders=2)
    raw = states / np.linalg.norm(states, axis=1, keepdims=True)
    vectors = centred(states)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)

    def mean_cosine(x):
        return ((x @ x.T).sum() - len(x)) / (len(x) * (len(x) - 1))

    assert mean_cosine(raw) > 0.3
    assert abs(mean_cosine(vectors)) < 0.05
    shifted = states - states.mean(axis=0)
    assert np.linalg.norm(shifted.sum(axis=0)) <= 1e-5
    duplicated = centred(np.concatenate([states, states[4:5]]))
    cosine = duplicated[:-1] @ duplicated[-1]
    assert cosine.argmax() == 4
    assert cosine[4] == pytest.approx(1)


def test_the_plan_shows_every_row_in_eight_orders(mixed):
    encoded, _, _ = mixed
    plan = make_plan(encoded, epochs=2, batch_size=8)
    assert plan.views == 6  # of three fields there are no more
    assert plan.steps(len(encoded)) == 2 * 6 * 5
    wide = Records.from_rows(
        [{name: str((n * k) % 3) for k, name in enumerate("abcde", 1)} for n in range(40)]
    )
    encoder = Encoder.fit(describe_fields(wide), wide)
    assert make_plan(encoder.encode(wide), epochs=1, batch_size=8).views == 8
