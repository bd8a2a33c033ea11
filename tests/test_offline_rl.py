"""Offline RL: the weighted optimum, its invariances, the preference losses; both controls."""

import copy
import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanogpt import GPT
from nanogpt.decoding import generate
from nanogpt.offline_rl import (
    LabelTrainer,
    PreferenceTrainer,
    RewardWeightedConfig,
    RewardWeightedTrainer,
    binary_labels,
    dpo_loss,
    k3_estimate,
    kto_loss,
    preference_pairs,
    ratio,
    record_nll,
    reward_quantiles,
    row_nll,
    token_kl,
    weighted_nll,
)
from nanogpt.records import IGNORED, encode_records, mismatched_records
from nanogpt.reward_data import RewardRecord
from nanogpt.tilt import reward_weights
from nanogpt.tokenizer import CharTokenizer

CHARS = CharTokenizer("abcd")
END = CHARS.end_of_text_id


def tiny_gpt(block=12, seed=0, **shape):
    torch.manual_seed(seed)
    model = GPT(vocab_size=5, n_layer=1, n_head=2, n_embd=16, block_size=block, **shape)
    model.tokenizer = CHARS
    return model


def records_of(*texts):
    return [RewardRecord(text, reward) for text, reward in texts]


def examples_of(*texts, block=12):
    return encode_records(records_of(*((text, 0.0) for text in texts)), CHARS, block)


def settings(**changes):
    usual = {"learning_rate": 1e-2, "weight_decay": 0.0, "batch_size": 64, "scale_rewards": "none"}
    return RewardWeightedConfig(**{**usual, **changes})


def trained(records, *, reset=None, model=None, **changes):
    """A tiny GPT fitted to weighted records, and the weights."""
    config = settings(**changes)
    weights, _ = config.weigh([r.reward for r in records])
    weights = weights if reset is None else reset(weights)
    model = model or tiny_gpt()
    RewardWeightedTrainer(model, config, encode_records(records, CHARS, 12), weights).train()
    return model, weights


def chances(model, *texts):
    """Exact probabilities of whole texts."""
    return torch.exp(-record_nll(model, examples_of(*texts))[0])


def first_letters(model):
    with torch.no_grad():
        return model(torch.tensor([[END]]))[0][0, 0].softmax(-1)


def parameters(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def gradient(trainer):
    """The gradient of the next step, of which nothing else happens."""
    found = []

    def keep(*_):
        found.append(torch.cat([p.grad.flatten().clone() for p in trainer.model.parameters()]))

    trainer.optimizer.step = keep
    trainer.step()
    return found[0]


# Sixteen targets and more, of several lengths, two of them cut into windows.
MIXED = ["a", "bb", "cab", "dddd", "abcdabcd", "cc", "bdbdbdbdbdbdbdbdbd", "dcbadcbadcbadcba"]


def mixed_examples():
    return examples_of(*MIXED)


A8 = records_of(*[("a", 0.0)] * 30, *[("b", 1.0)] * 10)
A8_ANSWERS = [
    ("exp", 1.0, math.inf, 0.475367),
    ("exp", 0.5, math.inf, 0.711235),
    ("exp", 0.1, math.inf, 0.999864),
    ("exp", 0.1, 20.0, 0.987837),
    ("identity", 1.0, math.inf, 0.25),
]


@pytest.mark.parametrize(("weighting", "beta", "max_weight", "answer"), A8_ANSWERS)
def test_a8_the_weighted_optimum_of_a_unigram_model(weighting, beta, max_weight, answer):
    config = settings(weighting=weighting, beta=beta, max_weight=max_weight)
    weights, _ = config.weigh([r.reward for r in A8])
    targets = torch.tensor([[0 if r.text == "a" else 1] for r in A8])
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = weighted_nll(logits.expand(len(A8), 1, 2), targets, weights, len(A8))
        value.backward()
        return value

    optimizer.step(loss)
    assert float(logits.detach().softmax(0)[1]) == pytest.approx(answer, abs=1e-4)


@pytest.mark.parametrize(("weighting", "beta", "max_weight", "answer"), A8_ANSWERS)
def test_a8_the_weighted_optimum_of_a_tiny_gpt(weighting, beta, max_weight, answer):
    model, _ = trained(
        A8, weighting=weighting, beta=beta, max_weight=max_weight, num_train_epochs=150
    )
    assert float(first_letters(model)[1]) == pytest.approx(answer, abs=0.02)


def test_a9_long_texts_are_not_discounted():
    records = records_of(("aa", 0.0), ("bbbbbbbb", 0.0))
    model, _ = trained(records, num_train_epochs=150)
    assert float(first_letters(model)[0]) == pytest.approx(0.5, abs=0.02)
    # One text in a step sees only its own length, and still nothing is discounted.
    model, _ = trained(records, num_train_epochs=400, batch_size=1, learning_rate=3e-3)
    assert float(first_letters(model)[0]) == pytest.approx(0.5, abs=0.02)


def test_a9_a_loss_that_divides_by_each_length_would_be_seen():
    records = records_of(("aa", 0.0), ("bbbbbbbb", 0.0))
    by_length = torch.tensor([2 * 9 / 12, 2 * 3 / 12])  # 1/3 and 1/9, of mean 1
    model, _ = trained(records, reset=lambda _: by_length, num_train_epochs=150)
    assert float(first_letters(model)[0]) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_a10_micro_batches_do_not_change_the_gradient(dtype, tolerance, kl_coef):
    examples = mixed_examples()
    weights = reward_weights([0.0, 1.0, -2.0, 3.0, 0.5, 1.5, -1.0, 2.0])[0]
    found = {}
    for limit in (10_000, 48, 1):
        config = settings(micro_batch_tokens=limit, grad_clip=0.0, kl_coef=kl_coef)
        model, reference = tiny_gpt().to(dtype), tiny_gpt(seed=1).to(dtype)
        trainer = RewardWeightedTrainer(model, config, examples, weights, reference=reference)
        parts = len(trainer._parts(np.arange(len(examples))))
        found[parts] = gradient(trainer)
    assert min(found) == 1
    assert max(found) == len(examples)
    assert len(found) == 3
    whole = found[1]
    for other in found.values():
        assert float((other - whole).norm() / whole.norm()) <= tolerance


def test_a10_a_batch_of_one_still_feels_its_weight():
    examples = mixed_examples()
    weights = torch.tensor([0.5, 2.0] * 4, dtype=torch.float64)
    config = settings(batch_size=1, grad_clip=0.0)
    ones, weighted = (
        gradient(RewardWeightedTrainer(tiny_gpt(), config, examples, w))
        for w in (torch.ones(8), weights)
    )
    first = RewardWeightedTrainer(tiny_gpt(), config, examples, weights).order.starts(0)
    factor = float(weights[examples.records[first]])
    torch.testing.assert_close(weighted, ones * factor)


def test_a11_padding_changes_nothing():
    model = tiny_gpt()
    alone = [float(record_nll(model, examples_of(text))[0]) for text in MIXED]
    together, counts = record_nll(model, mixed_examples())
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert counts.tolist() == [len(text) + 1 for text in MIXED]
    model = model.double()
    tokens = torch.tensor([[END, 0, 1]])
    targets = torch.tensor([[0, 1, END]])
    wider = torch.cat([tokens, torch.full((1, 5), END)], 1)
    padded = torch.cat([targets, torch.full((1, 5), IGNORED)], 1)
    with torch.no_grad():
        plain = row_nll(model(tokens)[0], targets)
        assert float((row_nll(model(wider)[0], padded) - plain).abs()) < 1e-7


def test_a11_the_end_of_a_text_is_learnt():
    model, _ = trained(records_of(("ab", 0.0), ("ab", 0.0)), num_train_epochs=150)
    with torch.no_grad():
        after = model(torch.tensor([[END, 0, 1]]))[0][0, -1].softmax(-1)
    assert float(after[END]) > 0.98


def test_a12_the_kl_of_a_hand_computed_case():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    q = torch.tensor([0.198706, 0.241042, 0.267853, 0.292399], dtype=torch.float64).log()
    assert float(token_kl(q, p)) == pytest.approx(0.059453, abs=2e-6)
    # Only differences of logits matter, and a mask leaves zeros.
    both = token_kl(torch.stack([q + 5, q]), torch.stack([p, p - 3]), torch.tensor([True, False]))
    assert both.tolist() == pytest.approx([float(token_kl(q, p)), 0.0])


def test_a12_the_kl_to_oneself_is_zero_and_so_is_its_gradient():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    kl = token_kl(logits, logits.detach().clone())
    kl.sum().backward()
    assert float(kl.detach().abs().max()) <= 1e-7
    assert float(logits.grad.abs().max()) <= 1e-7


def test_a12_k3_is_never_negative_and_right_in_the_mean():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    q = torch.tensor([0.198706, 0.241042, 0.267853, 0.292399], dtype=torch.float64)
    draw = torch.multinomial(q, 20_000, True, generator=torch.Generator().manual_seed(0))
    k3 = k3_estimate(q.log()[draw], p[draw])
    assert float(k3.min()) >= 0
    error = float(k3.std()) / math.sqrt(len(k3))
    assert abs(float(k3.mean()) - float(token_kl(q.log(), p))) <= 3 * error


A13 = records_of(*[(text, float(i)) for i, text in enumerate("abcd")] * 4)


@pytest.mark.parametrize(("weighting", "answer"), [("exp", 2.492653), ("identity", 1.5)])
def test_a13_the_model_writes_at_the_reward_of_the_weighted_data(weighting, answer):
    model, _ = trained(A13, weighting=weighting, max_weight=math.inf, num_train_epochs=200)
    p = chances(model, *"abcd")
    assert float(p.sum()) > 0.98
    assert float((p * torch.arange(4)).sum() / p.sum()) == pytest.approx(answer, abs=0.05)
    start = torch.full((4000, 1), END)
    written = Counter(generate(model, start, 1, seed=1)[:, 1].tolist())
    rewards = [i for i in range(4) for _ in range(written[i])]
    error = np.std(rewards) / math.sqrt(len(rewards))
    assert np.mean(rewards) == pytest.approx(answer, abs=0.05 + 3 * error)


@pytest.mark.parametrize("weighting", ["exp", "binary", "topk", "rank"])
def test_a14_equal_rewards_are_plain_training_bit_for_bit(weighting):
    """With dropout, decay, clipping, warmup, and held-out records."""
    losses, ends = [], []
    for kind, reward in (("identity", 0.0), (weighting, -3.7)):
        config = settings(
            weighting=kind, weight_decay=0.1, batch_size=3, num_train_epochs=2, scale_rewards="std"
        )
        weights, _ = config.weigh([reward] * len(MIXED))
        assert torch.equal(weights, torch.ones(len(MIXED), dtype=torch.float64))
        model = tiny_gpt(dropout=0.2)
        trainer = RewardWeightedTrainer(
            model, config, mixed_examples(), weights, eval_examples=examples_of("ab")
        )
        losses.append([trainer.step().loss for _ in range(trainer.total_steps)])
        ends.append((parameters(model), trainer.measure_epoch()))
    assert losses[0] == losses[1]
    assert torch.equal(ends[0][0], ends[1][0])
    assert str(ends[0][1]) == str(ends[1][1])


def test_a14_unequal_rewards_are_another_run():
    weights = torch.ones(len(MIXED), dtype=torch.float64)
    weights[3] = 1.0001
    ends = []
    for w in (torch.ones(len(MIXED)), weights):
        model = tiny_gpt()
        RewardWeightedTrainer(model, settings(num_train_epochs=1), mixed_examples(), w).train()
        ends.append(parameters(model))
    assert not torch.equal(*ends)


def test_a14_shuffled_rewards_move_nothing_and_true_ones_do():
    texts = ["a", "b"] * 200
    true = [float(text == "b") for text in texts]
    shuffled = np.random.default_rng(0).permutation(true).tolist()
    reached = {}
    for name, rewards in (("true", true), ("shuffled", shuffled)):
        records = records_of(*zip(texts, rewards, strict=True))
        model, weights = trained(records, num_train_epochs=12)
        ess = float(weights.sum() ** 2 / weights.square().sum())
        p = chances(model, "a", "b")
        reached[name] = float(p[1] / p.sum()), 0.5 / math.sqrt(ess)
    expected, error = reached["shuffled"]
    assert abs(expected - 0.5) <= 3 * error
    expected, error = reached["true"]
    assert expected > 0.5 + 5 * error
    assert expected == pytest.approx(math.e / (1 + math.e), abs=0.03)


def test_a4_at_a_high_temperature_the_gradient_is_plain_trainings():
    rewards = [0.0, 1.0, -2.0, 3.0, 0.5, 1.5, -1.0, 2.0]
    weights = settings(beta=1e6).weigh(rewards)[0]
    found = [
        gradient(
            RewardWeightedTrainer(tiny_gpt().double(), settings(grad_clip=0.0), mixed_examples(), w)
        )
        for w in (torch.ones(8), weights)
    ]
    assert float((found[1] - found[0]).norm() / found[0].norm()) <= 3e-6
    # And plain training's is that of the mean loss over all targets.
    model = tiny_gpt().double()
    batch = mixed_examples().batch(np.arange(len(mixed_examples())))
    logits = model(batch.tokens)[0]
    F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found[0], plain, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "bad", [[-0.1, 2.1], [math.nan, 1.0], [math.inf, 0.0], [1.0], [[1.0, 1.0]]]
)
def test_weights_that_are_negative_not_finite_or_too_few_are_refused(bad):
    with pytest.raises(ValueError, match="weights"):
        RewardWeightedTrainer(tiny_gpt(), settings(), examples_of("a", "b"), torch.tensor(bad))


def test_what_cannot_be_trained_is_refused():
    examples, ones = examples_of("a", "b"), torch.ones(2)
    model = tiny_gpt()
    with pytest.raises(ValueError, match="reference must be a copy"):
        RewardWeightedTrainer(model, settings(), examples, ones, reference=model)
    with pytest.raises(ValueError, match="kl_coef needs a reference"):
        RewardWeightedTrainer(model, settings(kl_coef=0.1), examples, ones)
    with pytest.raises(ValueError, match="kl_coef must not be negative"):
        RewardWeightedTrainer(model, settings(kl_coef=-0.1), examples, ones)
    with pytest.raises(ValueError, match="longer context"):
        RewardWeightedTrainer(tiny_gpt(4), settings(), examples_of("abcdabcd"), [1.0])
    with pytest.raises(ValueError, match="nothing to train on"):
        RewardWeightedTrainer(model, settings(), examples.of_records([]), torch.ones(0))


def test_calibration_does_not_outlive_training():
    model = tiny_gpt()
    model.calibration_temperature, model.calibration = 1.3, {"temperature": 1.3}
    RewardWeightedTrainer(model, settings(), examples_of("a"), [1.0])
    assert model.calibration_temperature is None
    assert model.calibration_is_stale


def test_a_step_that_is_not_finite_changes_nothing():
    model = tiny_gpt()
    trainer = RewardWeightedTrainer(model, settings(), examples_of("a", "b"), torch.ones(2))
    trainer.step()
    before = parameters(model)
    broken = trainer._logits
    trainer._logits = lambda batch, index: broken(batch, index) * math.nan
    metrics = trainer.step()
    assert metrics.skipped
    assert math.isnan(metrics.loss)
    assert torch.equal(parameters(model), before)
    trainer._logits = broken
    assert not trainer.step().skipped
    assert trainer.progress.skipped_steps == 1
    assert not torch.equal(parameters(model), before)


@pytest.mark.parametrize(
    ("objective", "at"), [("weighted", 3), ("weighted", 5), ("dpo", 1), ("dpo", 2), ("kto", 5)]
)
def test_a_run_that_goes_on_repeats_the_one_that_was_not_interrupted(objective, at):
    def begin(model):
        config = settings(batch_size=2, num_train_epochs=2, learning_rate=3e-3)
        examples, held = mixed_examples(), examples_of("ab", "c")
        if objective == "weighted":
            weights = torch.linspace(0.2, 1.8, 8)
            return RewardWeightedTrainer(model, config, examples, weights, eval_examples=held)
        reference = tiny_gpt(dropout=0.2)
        if objective == "dpo":
            pairs = np.array([[0, 1], [2, 3], [6, 5], [4, 7]])
            return PreferenceTrainer(model, config, examples, pairs, reference=reference)
        return LabelTrainer(model, config, examples, [True, False] * 4, reference=reference)

    whole = begin(tiny_gpt(dropout=0.2))
    steps = [whole.step() for _ in range(whole.total_steps)]
    part = begin(tiny_gpt(dropout=0.2))
    for _ in range(at):
        part.step()
    kept = io.BytesIO()
    torch.save({"model": part.model.state_dict(), "trainer": part.state()}, kept)
    kept.seek(0)
    saved = torch.load(kept, weights_only=True)
    model = tiny_gpt(dropout=0.2, seed=9)
    model.load_state_dict(saved["model"])
    torch.manual_seed(123)
    again = begin(model)
    again.load_state(saved["trainer"])
    for expected in steps[at:]:
        assert str(again.step()) == str(expected)
    assert again.finished
    assert torch.equal(parameters(again.model), parameters(whole.model))
    assert str(again.measure_epoch()) == str(whole.measure_epoch())


def test_an_epoch_sees_every_example_once_in_an_order_of_its_own():
    trainer = RewardWeightedTrainer(
        tiny_gpt(), settings(batch_size=3), mixed_examples(), torch.ones(8)
    )
    orders = [
        np.concatenate([trainer.order.starts(e * trainer.steps_per_epoch + s)
                        for s in range(trainer.steps_per_epoch)]).tolist()
        for e in range(2)
    ]  # fmt: skip
    assert [sorted(order) for order in orders] == [list(range(len(mixed_examples())))] * 2
    assert orders[0] != orders[1]


def test_training_stops_between_steps_where_it_is_asked_to():
    trainer = RewardWeightedTrainer(
        tiny_gpt(), settings(batch_size=2, num_train_epochs=2), mixed_examples(), torch.ones(8)
    )
    assert trainer.train_epoch(stop=lambda: trainer.progress.step == 2) is None
    assert trainer.progress.step == 2
    metrics = trainer.train_epoch()
    assert metrics is not None
    assert (metrics.epoch, metrics.step) == (1, trainer.steps_per_epoch)
    first = metrics.loss
    (second,) = trainer.train()
    assert second.epoch == 2
    assert trainer.finished
    # An epoch's figures are its own.
    assert trainer.progress.sums[-1] == trainer.steps_per_epoch
    assert second.loss < first


def test_the_figures_of_an_epoch_are_means_over_its_targets():
    examples = examples_of("ab", "dddd", "c")
    weights = torch.tensor([2.0, 0.5, 0.5], dtype=torch.float64)
    trainer = RewardWeightedTrainer(
        tiny_gpt(),
        settings(learning_rate=1e-12, min_lr=0.0, num_train_epochs=1, batch_size=2),
        examples,
        weights,
        eval_examples=examples,
        eval_weights=weights,
        reference=tiny_gpt(seed=1),
    )
    metrics = trainer.train_epoch()
    nats, counts = record_nll(tiny_gpt(), examples)
    assert counts.tolist() == [3, 5, 2]
    weighted = float((weights * nats).sum() / (weights * counts).sum())
    for plain, tilted in (
        (metrics.train_nll, metrics.train_nll_weighted),
        (metrics.val_nll.mean, metrics.val_nll_weighted.mean),
    ):
        assert plain == pytest.approx(float(nats.sum()) / 10, rel=1e-5)
        assert tilted == pytest.approx(weighted, rel=1e-5)
    batch = examples.batch(np.arange(3))
    with torch.no_grad():
        kl = token_kl(tiny_gpt()(batch.tokens)[0], tiny_gpt(seed=1)(batch.tokens)[0])
    counted = batch.targets != IGNORED
    assert metrics.kl_ref.mean == pytest.approx(float(kl[counted].mean()), rel=1e-4)


def test_products_in_bfloat16_give_nearly_the_same_step():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = RewardWeightedTrainer(
            tiny_gpt(), settings(), mixed_examples(), torch.linspace(0.2, 1.8, 8), dtype=dtype
        )
        found.append(trainer.step())
    assert found[0].loss != found[1].loss
    assert found[1].loss == pytest.approx(found[0].loss, rel=1e-2)
    assert found[1].grad_norm == pytest.approx(found[0].grad_norm, rel=0.1)


def test_the_standard_error_of_a_ratio_is_over_records():
    sums, counts = torch.tensor([2.0, 9.0, 1.0]), torch.tensor([1, 3, 2])
    found = ratio(sums, counts)
    residuals = [2 - 2 * 1, 9 - 2 * 3, 1 - 2 * 2]
    assert found.mean == 2
    assert found.standard_error == pytest.approx(
        math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 6
    )
    # A record that stands twice as two records halves the variance, twice as long it does not.
    assert ratio(2 * sums, 2 * counts).standard_error == pytest.approx(found.standard_error)
    assert math.isnan(ratio(sums[:1], counts[:1]).standard_error)
    assert math.isnan(ratio(sums, counts, torch.zeros(3)).mean)


def test_the_price_of_kl_keeps_the_model_near_its_reference():
    start = tiny_gpt(seed=3)
    reached = []
    for kl_coef in (0.0, 1.0, 100.0):
        model = copy.deepcopy(start)
        trainer = RewardWeightedTrainer(
            model,
            settings(kl_coef=kl_coef, num_train_epochs=40),
            examples_of("a", "a", "b"),
            torch.ones(3),
            eval_examples=examples_of("a", "b"),
            reference=start,
        )
        reached.append(trainer.train()[-1].kl_ref.mean)
    assert reached[0] > 2 * reached[1] > 20 * reached[2] >= 0


def test_dpo_of_hand_computed_pairs():
    chosen, rejected = torch.tensor([-10.0, -3.0]), torch.tensor([-12.0, -2.0])
    ours = dpo_loss(chosen, rejected, torch.tensor([-11.0, -3.0]), torch.tensor([-11.0, -2.0]), 0.1)
    # Margins: (1 - -1) = 2, and 0.
    assert ours.tolist() == pytest.approx([math.log(1 + math.exp(-0.2)), math.log(2)])
    far = dpo_loss(torch.tensor([-1e4]), torch.tensor([0.0]), torch.zeros(1), torch.zeros(1))
    assert float(far) == pytest.approx(1000)


def test_kto_of_hand_computed_records():
    log_ratios = torch.tensor([2.0, 2.0, -4.0])
    desirable = torch.tensor([True, False, False])
    ours = kto_loss(log_ratios, desirable, 1.0, 0.5, desirable_weight=2.0, undesirable_weight=3.0)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    expected = [2 * (1 - sigmoid(0.5)), 3 * (1 - sigmoid(-0.5)), 3 * (1 - sigmoid(2.5))]
    assert ours.tolist() == pytest.approx(expected)
    # A negative baseline counts as 0, and no gradient flows through it.
    kl = torch.tensor(-5.0, requires_grad=True)
    assert torch.equal(kto_loss(log_ratios, desirable, kl), kto_loss(log_ratios, desirable, 0.0))
    kl = torch.tensor(5.0, requires_grad=True)
    assert not kto_loss(log_ratios, desirable, kl).requires_grad


def test_kto_agrees_with_its_published_form():
    """1 - sigmoid(beta (r - z)) and 1 - sigmoid(beta (z - r)), at random."""
    ratios = torch.randn(50, dtype=torch.float64) * 20
    labels = torch.rand(50) < 0.5
    z = torch.tensor(0.7, dtype=torch.float64)
    published = torch.where(
        labels, 1 - F.sigmoid(0.1 * (ratios - z)), 1 - F.sigmoid(0.1 * (z - ratios))
    )
    torch.testing.assert_close(kto_loss(ratios, labels, z), published)


def reference_of_whole_texts(model, examples):
    """(R,) log-likelihoods with a graph, in one batch."""
    batch = examples.batch(np.arange(len(examples)))
    rows = -row_nll(model(batch.tokens)[0], batch.targets)
    return torch.zeros(examples.n_records, dtype=rows.dtype).index_add(0, batch.records, rows)


@pytest.mark.parametrize("limit", [1, 48, 10_000])
def test_the_gradient_of_dpo_in_two_passes_is_the_one_of_a_single_graph(limit):
    examples = mixed_examples()  # of which two records have two windows
    pairs = np.array([[6, 0], [1, 7], [2, 6], [4, 3]])
    config = settings(beta=0.3, grad_clip=0.0, micro_batch_tokens=limit)
    model, reference = tiny_gpt().double(), tiny_gpt(seed=1).double()
    trainer = PreferenceTrainer(model, config, examples, pairs, reference=reference)
    ours = gradient(trainer)
    model = tiny_gpt().double()
    log_p = reference_of_whole_texts(model, examples)
    log_r = reference_of_whole_texts(reference, examples).detach()
    better, worse = torch.from_numpy(pairs.T)
    loss = dpo_loss(log_p[better], log_p[worse], log_r[better], log_r[worse], 0.3).mean()
    loss.backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert float((ours - whole).norm() / whole.norm()) < 1e-10
    assert trainer.progress.sums[0] == pytest.approx(float(loss.detach()))


@pytest.mark.parametrize("with_prompts", [False, True])
def test_the_gradient_of_kto_in_two_passes_is_the_one_of_a_single_graph(with_prompts):
    records = [RewardRecord(t, 0.0, prompt="ab" if with_prompts else "") for t in MIXED]
    examples = encode_records(records, CHARS, 12)
    other = encode_records(mismatched_records(records, 0), CHARS, 12) if with_prompts else None
    labels = torch.tensor([True, True, False, True, False, False, True, False])
    config = settings(beta=0.3, grad_clip=0.0, micro_batch_tokens=40, desirable_weight=1.5)
    model, reference = tiny_gpt(seed=4).double(), tiny_gpt(seed=1).double()
    # A model likelier than its reference has a baseline above 0.
    trainer = LabelTrainer(model, config, examples, labels, reference=reference, mismatched=other)
    ours = gradient(trainer)
    model = tiny_gpt(seed=4).double()
    ratios = reference_of_whole_texts(model, examples)
    ratios = ratios - reference_of_whole_texts(reference, examples).detach()
    baseline = ratios.mean()
    if other is not None:
        baseline = reference_of_whole_texts(model, other) - reference_of_whole_texts(
            reference, other
        )
        baseline = baseline.mean()
    loss = kto_loss(ratios, labels, baseline, 0.3, desirable_weight=1.5).mean()
    loss.backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert float((ours - whole).norm() / whole.norm()) < 1e-10
    assert trainer.progress.sums[0] == pytest.approx(float(loss.detach()))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_move_the_model_and_those_of_chance_do_not(objective):
    texts = ["a", "b"] * 100
    true = [float(text == "b") for text in texts]
    # Half of each text is good. A little more of one would do: KTO's optimum is then at infinity.
    chance = [0.0, 0.0, 1.0, 1.0] * 50
    base, _ = trained(records_of(*((text, 0.0) for text in texts)), num_train_epochs=15)
    share = {}
    for name, rewards in (("true", true), ("chance", chance)):
        model, examples = copy.deepcopy(base), examples_of(*texts)
        config = settings(beta=0.5, num_train_epochs=20, learning_rate=3e-3, batch_size=100)
        held = examples_of("a", "b")
        if objective == "dpo":
            trainer = PreferenceTrainer(
                model, config, examples, preference_pairs(rewards), reference=base,
                eval_examples=held, eval_pairs=np.array([[1, 0]]),
            )  # fmt: skip
        else:
            trainer = LabelTrainer(
                model, config, examples, binary_labels(rewards), reference=base,
                eval_examples=held, eval_desirable=[False, True],
            )  # fmt: skip
        metrics = trainer.train()[-1]
        if name == "true":
            assert metrics.val_accuracy.mean == 1
            assert metrics.val_loss.mean < (math.log(2) if objective == "dpo" else 0.5)
        p = chances(model, "a", "b")
        share[name] = float(p[1] / p.sum())
    p = chances(base, "a", "b")
    before = float(p[1] / p.sum())
    assert share["true"] > before + 0.2
    assert abs(share["chance"] - before) < 0.1


def test_equal_rewards_make_no_pairs_and_so_no_training():
    assert preference_pairs([1.0] * 9).shape == (0, 2)
    with pytest.raises(ValueError, match="nothing to train on"):
        PreferenceTrainer(
            tiny_gpt(), settings(), examples_of("a", "b"), preference_pairs([1.0, 1.0]),
            reference=tiny_gpt(),
        )  # fmt: skip


def test_pairs_set_the_better_half_against_the_worse():
    rewards = np.random.default_rng(0).normal(size=101)
    pairs = preference_pairs(rewards.tolist(), seed=3)
    assert pairs.shape == (50, 2)
    assert (rewards[pairs[:, 0]] > rewards[pairs[:, 1]]).all()
    assert len(set(pairs.ravel().tolist())) == 100
    assert rewards[pairs[:, 0]].min() > rewards[pairs[:, 1]].max()
    assert np.array_equal(pairs, preference_pairs(rewards.tolist(), seed=3))


def test_pairs_stay_within_their_group_and_ties_depend_on_the_seed():
    rewards = [1.0, 0.0, 5.0, 4.0, 4.0, 2.0]
    groups = ["x", "x", "y", "y", "z", "y"]
    pairs = {tuple(pair) for pair in preference_pairs(rewards, groups).tolist()}
    assert pairs == {(0, 1), (2, 5)}
    tied = [0.0, 0.0, 1.0, 1.0] * 5
    drawn = {str(preference_pairs(tied, seed=seed).tolist()) for seed in range(4)}
    assert len(drawn) == 4
    some_equal = preference_pairs([1.0, 1.0, 1.0, 0.0])
    assert len(some_equal) == 1
    assert some_equal[0, 1] == 3


def test_quantiles_are_of_dense_ranks_so_that_ties_share_one():
    assert reward_quantiles([0.0] * 30 + [1.0] * 10, 2).tolist() == [0] * 30 + [1] * 10
    assert reward_quantiles([5.0, 1.0, 3.0, 3.0, 9.0, 7.0], 5).tolist() == [2, 0, 1, 1, 4, 3]
    assert reward_quantiles([5.0, 1.0, 3.0, 7.0], 2).tolist() == [1, 0, 0, 1]
    assert reward_quantiles([2.0, 2.0], 3).tolist() == [0, 0]
    with pytest.raises(ValueError, match="at least one"):
        reward_quantiles([1.0], 0)


def test_a15_a_control_token_asks_for_a_reward():
    quantile = reward_quantiles([record.reward for record in A8], 2)
    low_high = "cd"
    records = [
        RewardRecord(record.text, record.reward, prompt=low_high[q])
        for record, q in zip(A8, quantile.tolist(), strict=True)
    ]
    model, _ = trained(records, weighting="identity", num_train_epochs=150)
    with torch.no_grad():
        after = model(torch.tensor([[END, 2], [END, 3]]))[0][:, -1].softmax(-1)[:, 1]
    low, high = after.tolist()
    assert high >= 0.98
    assert low <= 0.02
    share = np.bincount(quantile) / len(quantile)
    assert share @ np.array([low, high]) == pytest.approx(0.25, abs=0.02)


def test_labels_are_rewards_of_at_least_the_mean():
    assert binary_labels([1.0, -1.0, 0.0]).tolist() == [True, False, True]
    assert binary_labels([1.0, 2.0, 3.0], threshold=2.5).tolist() == [False, False, True]
    assert binary_labels([0.1] * 3).tolist() == [True] * 3
    assert binary_labels([1.7e308, 1.7e308, -1.7e308]).tolist() == [True, True, False]


def test_pairs_and_labels_that_do_not_fit_are_refused():
    examples, reference = examples_of("a", "b"), tiny_gpt()
    with pytest.raises(ValueError, match="records outside 0 to 1"):
        PreferenceTrainer(tiny_gpt(), settings(), examples, np.array([[0, 2]]), reference=reference)
    with pytest.raises(ValueError, match="must be"):
        PreferenceTrainer(tiny_gpt(), settings(), examples, np.array([0, 1]), reference=reference)
    with pytest.raises(ValueError, match="one a record"):
        LabelTrainer(tiny_gpt(), settings(), examples, [True], reference=reference)
    with pytest.raises(ValueError, match="kl_coef must be 0"):
        LabelTrainer(
            tiny_gpt(), settings(kl_coef=1.0), examples, [True, False], reference=reference
        )
