"""The reward model: its loss on every prefix, what it learns, its file, steering with it."""

import math
import pickle
import random

import numpy as np
import pytest
import torch

from nanogpt import GPT, char_reward_fn
from nanogpt.decoding import window_start
from nanogpt.errors import InputError, UsageError
from nanogpt.judge import auroc
from nanogpt.records import encode_records
from nanogpt.reward_data import RewardRecord
from nanogpt.reward_decoding import RewardAugmentedLogitsProcessor, best_of_n
from nanogpt.reward_model import RewardHead, RewardModel, _read, fit_reward_model, weights_digest
from nanogpt.rewards import combine
from nanogpt.tokenizer import CharTokenizer

LETTERS = CharTokenizer("abcdefgh ")
BLOCK = 16


def texts_of(seed: int, count: int, longest: int = 14) -> list[str]:
    """Every text prefers one half of the alphabet: four letters of five come from it."""
    generator = random.Random(seed)
    texts = []
    for _ in range(count):
        often, rarely = generator.sample(["abcd", "efgh"], 2)
        letters = often * 4 + rarely
        texts.append("".join(generator.choices(letters, k=generator.randint(4, longest))))
    return texts


def share(text: str) -> float:
    """The reward: letters of the second half of the alphabet."""
    return sum(letter in "efgh" for letter in text) / len(text)


def gpt(seed: int = 3, steps: int = 0) -> GPT:
    """A tiny model, trained on such texts for some steps."""
    torch.manual_seed(seed)
    model = GPT(vocab_size=10, block_size=BLOCK, n_layer=1, n_head=2, n_embd=32)
    model.tokenizer = LETTERS
    records = [RewardRecord(text, 0.0) for text in texts_of(11, 64 * max(steps, 1))]
    examples = encode_records(records, LETTERS, BLOCK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        batch = examples.batch(np.arange(64 * step, 64 * step + 64))
        optimizer.zero_grad()
        model(batch.tokens, batch.targets)[1].backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return gpt(steps=100)


@pytest.fixture(scope="module")
def fitted(model) -> RewardModel:
    """Some of its texts outgrow the context."""
    torch.manual_seed(0)
    records = [(text, share(text)) for text in texts_of(1, 400, 24)]
    return fit_reward_model(model, records, learning_rate=3e-3)


def test_a_reward_model_learns_a_reward_and_says_how_well(fitted):
    quality = fitted.quality
    assert quality.n_held_out >= 30
    assert quality.n_fitted + quality.n_held_out == 400
    assert quality.correlation > 0.8
    assert quality.correlation_at_half > 0.8
    assert quality.auroc_at_half > 0.85
    assert quality.auroc > 0.85
    assert quality.loss < 0.8 * quality.loss_of_constant
    fresh = texts_of(2, 200, 24)
    scores = fitted.score(fresh)
    true = torch.tensor([share(t) for t in fresh], dtype=torch.float64)
    assert torch.corrcoef(torch.stack([scores, true]))[0, 1] > 0.8
    assert scores.min() >= 0.0


def test_two_valued_rewards_are_fitted_as_odds(model):
    texts = texts_of(4, 300)
    records = [(t, 3.0 if share(t) > 0.5 else -1.0) for t in texts]
    fitted = fit_reward_model(model, records, learning_rate=3e-3)
    assert fitted.two_valued
    fresh = texts_of(5, 200)
    scores = fitted.score(fresh)
    assert scores.min() > -1.0
    assert scores.max() < 3.0
    positive = torch.tensor([share(t) > 0.5 for t in fresh])
    assert auroc(scores, positive) > 0.95
    assert fitted.quality.loss < 0.9 * fitted.quality.loss_of_constant
    assert fitted.quality.loss_of_constant == pytest.approx(math.log(2), abs=0.1)


def test_shuffled_rewards_teach_nothing(model):
    texts = texts_of(6, 300)
    rewards = [share(t) for t in texts]
    random.Random(0).shuffle(rewards)
    fitted = fit_reward_model(model, list(zip(texts, rewards, strict=True)), learning_rate=3e-3)
    fresh = texts_of(7, 300)
    true = torch.tensor([share(t) for t in fresh], dtype=torch.float64)
    scores = fitted.score(fresh)
    if scores.std() > 0:
        assert abs(torch.corrcoef(torch.stack([scores, true]))[0, 1]) < 0.35
    assert fitted.quality.loss > 0.97 * fitted.quality.loss_of_constant


def test_fitting_leaves_the_model_as_it_was(model):
    before, was_training = weights_digest(model), model.training
    records = [(t, share(t)) for t in texts_of(8, 40)]
    first = fit_reward_model(model, records, epochs=2, seed=1)
    again = fit_reward_model(model, records, epochs=2, seed=1)
    assert weights_digest(model) == before
    assert model.training is was_training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in first.head.state_dict().items():
        assert torch.equal(value, again.head.state_dict()[name])


def test_records_side_by_side_do_not_mix(model):
    """Hidden states, tokens and weights of a record are those of the record alone."""
    texts = ["ab", "hgfedcba hgfedcba hg", "e", "cdcdcdcd"]
    records = [RewardRecord(text, 0.0) for text in texts]
    examples = encode_records(records, LETTERS, BLOCK)
    together = _read(model, examples, np.arange(len(examples)))
    for place, record in enumerate(records):
        alone_examples = encode_records([record], LETTERS, BLOCK)
        alone = _read(model, alone_examples, np.arange(len(alone_examples)))
        mine = together.records == place
        assert torch.equal(together.tokens[mine], alone.tokens)
        assert torch.allclose(together.hidden[mine], alone.hidden, atol=1e-5)
        assert torch.allclose(together.weights[mine], alone.weights)
        assert alone.tokens.tolist() == [*LETTERS.encode(record.completion), 9]


def test_every_prefix_weighs_in_proportion_to_its_length(model):
    """1, 2, … n over n (n + 1) / 2; windows of a long record go on counting."""
    records = [RewardRecord("abc", 0.0), RewardRecord("abcdefgh " * 4, 0.0)]
    examples = encode_records(records, LETTERS, BLOCK)
    assert len(examples) == 4
    part = _read(model, examples, np.array([2, 0, 3, 1]))
    for record, n in ((0, 4), (1, 37)):
        weights = part.weights[part.records == record].sort().values
        expected = torch.arange(1, n + 1) / (n * (n + 1) / 2)
        assert torch.allclose(weights, expected)
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert part.last.sum() == 2
    assert part.half.sum() == 2
    assert part.tokens[part.last].tolist() == [9, 9]


def test_the_head_scores_all_candidates_as_it_scores_each():
    torch.manual_seed(0)
    head = RewardHead(8, 5)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    hidden, weight = torch.randn(3, 8), torch.randn(5, 8)
    every = head.candidates(hidden, weight)
    for token in range(5):
        one = head(hidden, torch.full((3,), token), weight)
        assert torch.allclose(every[:, token], one, atol=1e-5)
    by_hand = hidden[1] @ head.value + (head.mix @ hidden[1]) @ weight[4] + head.token[4]
    assert every[1, 4].item() == pytest.approx((by_hand + head.offset).item(), abs=1e-5)


@pytest.mark.parametrize("end", [None, 9])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"use_graph": True}], ids=str)
def test_b13_scores_of_decoding_are_those_of_the_text_read_anew(model, fitted, options, end):
    """Far past the context, after end tokens, and for rows that go on after others have ended."""
    prompt = torch.randint(9, (4, 4))
    details = model.generate_reward_augmented(
        prompt, 40, fitted, 4.0, seed=2, return_details=True, eos_token_id=end, **options
    )
    new = details.sequences[:, 4:]
    assert (details.lengths.max() > 2 * BLOCK and (new == 9).any()) or end == 9
    assert len(set(details.lengths.tolist())) > 1 or end is None
    sums = details.rewards.cumsum(1)
    for row in range(4):
        n = int(details.lengths[row])
        for step in {*range(0, n, 5), n - 1}:
            prefix = details.sequences[row : row + 1, : 5 + step]
            start = window_start(prefix.shape[1] - 1, BLOCK)
            hidden = model.hidden_states(prefix[:, start:-1])[:, -1]
            f = fitted.head(hidden, prefix[:, -1], model.token_weight)
            assert sums[row, step].item() == pytest.approx(fitted.predicted(f).item(), abs=1e-4)
            assert sums[row, step].item() == pytest.approx(fitted(prefix).item(), abs=1e-4)


def test_writing_with_a_reward_model_raises_the_true_reward(model, fitted):
    prompt = torch.full((64, 1), 9)
    plain = model.generate(prompt, 12, seed=1)
    steered = model.generate_reward_augmented(prompt, 12, fitted, 30.0, seed=1)
    shunned = model.generate_reward_augmented(prompt, 12, fitted, -30.0, seed=1)

    def reached(out):
        return float(
            torch.tensor([share(LETTERS.decode(row) or "a") for row in out.tolist()]).mean()
        )

    base = reached(plain)
    assert reached(steered) > base + 0.25
    assert reached(shunned) < base - 0.25
    assert reached(best_of_n(model, prompt, 12, fitted, 8, seed=1)) > base + 0.15
    both = combine([(fitted, 30.0), (char_reward_fn("a", LETTERS), 0.0)])
    assert torch.equal(model.generate_reward_augmented(prompt, 12, both, 1.0, seed=1), steered)


def test_particles_are_weighted_by_a_reward_models_whole_texts(model, fitted):
    prompt = torch.full((2, 1), 9)
    details = model.generate_reward_augmented(
        prompt, 20, fitted, 10.0, seed=1, num_particles=16, return_details=True
    )
    for row in range(2):
        predicted = fitted(details.sequences[row : row + 1]).item()
        assert details.rewards[row].sum().item() == pytest.approx(predicted, abs=1e-4)


def test_beta_0_writes_what_generate_writes(model, fitted):
    prompt = torch.randint(9, (2, 3))
    plain = model.generate(prompt, 30, seed=5)
    for details in (False, True):
        got = model.generate_reward_augmented(
            prompt, 30, fitted, 0.0, seed=5, return_details=details
        )
        assert torch.equal(got.sequences if details else got, plain)


def test_a_file_gives_the_same_model_again(model, fitted, tmp_path):
    path = tmp_path / "head.safetensors"
    fitted.save(path)
    again = RewardModel.load(path, model)
    texts = texts_of(9, 20)
    assert torch.equal(again.score(texts), fitted.score(texts))
    assert again.quality == fitted.quality
    fitted.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    other = gpt(seed=4)
    with pytest.raises(InputError, match="fitted on other weights"):
        RewardModel.load(path, other)
    with pytest.raises(ValueError, match="fitted on other weights"):
        other.generate_reward_augmented(torch.zeros(1, 1, dtype=torch.int64), 2, fitted, 1.0)
    twin = gpt()
    twin.load_state_dict(model.state_dict())
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    assert torch.equal(
        twin.generate_reward_augmented(prompt, 5, fitted, 1.0, seed=1),
        model.generate_reward_augmented(prompt, 5, fitted, 1.0, seed=1),
    )
    assert torch.equal(pickle.loads(pickle.dumps(fitted)).score(texts), fitted.score(texts))


def test_a_damaged_or_foreign_file_is_refused(model, fitted, tmp_path):
    path = tmp_path / "head.safetensors"
    fitted.save(path)
    raw = path.read_bytes()
    refused = 0
    for at in [*range(8, len(raw), 97), len(raw) - 1]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        try:
            got = RewardModel.load(path, model)
        except InputError:
            refused += 1
        else:  # a padding space of the header, at most
            assert torch.equal(got.head.mix, fitted.head.mix)
    assert refused >= (len(raw) - 8) // 97
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match="damaged"):
        RewardModel.load(path, model)
    with pytest.raises(InputError, match="cannot be read"):
        RewardModel.load(tmp_path / "absent.safetensors", model)
    from nanogpt import save

    save(model, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is no reward model"):
        RewardModel.load(tmp_path / "model.safetensors", model)
    with pytest.raises(UsageError, match=r"a \.safetensors file"):
        fitted.save(tmp_path / "head.pth")


GOOD = [(text, float(i)) for i, text in enumerate(texts_of(3, 30))]


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (GOOD[:19], {}, "needs 20 records, not 19"),
        ([(t, 1.0) for t, _ in GOOD], {}, "all rewards are equal"),
        ([*GOOD, ("a", math.nan)], {}, "not finite"),
        ([("same", float(i)) for i in range(30)], {}, "nothing can be held out"),
        (GOOD, {"val_fraction": 0.0}, "val_fraction"),
        (GOOD, {"epochs": 0}, "epochs"),
        (GOOD, {"patience": 0}, "patience"),
        (GOOD, {"batch_size": 0}, "batch_size"),
        (GOOD, {"learning_rate": 0.0}, "learning_rate"),
        (GOOD, {"weight_decay": -1.0}, "weight_decay"),
        ([*GOOD, ("é", 1.0)], {}, "'é'"),
    ],
)
def test_what_it_cannot_be_fitted_on_is_refused(model, records, options, message):
    with pytest.raises((ValueError, InputError), match=message):
        fit_reward_model(model, records, **options)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        fit_reward_model(GPT(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=8), GOOD)


def test_a_logits_processor_cannot_show_it_hidden_states(fitted):
    with pytest.raises(ValueError, match="reads the model's hidden states"):
        RewardAugmentedLogitsProcessor(fitted, 1.0)
    with pytest.raises(ValueError, match="two ids at least"):
        fitted(torch.zeros(1, 1, dtype=torch.int64))


def test_weights_that_have_moved_are_noticed_in_memory():
    own = gpt()
    reward = fit_reward_model(own, [(text, share(text)) for text in texts_of(0, 40)], epochs=1)
    tokens = torch.tensor([[1, 2]])
    own.generate_reward_augmented(tokens, 2, reward, 1.0)
    with torch.no_grad():
        own.token_weight.add_(0.1)
    with pytest.raises(ValueError, match="other weights"):
        own.generate_reward_augmented(tokens, 2, reward, 1.0)


def test_a_rare_value_that_is_held_out_as_a_whole_is_no_error():
    own, rare = gpt(), [(text, 0.0) for text in texts_of(0, 20)]
    for seed in range(8):
        fit_reward_model(own, [*rare, ("aa", 1.0)], epochs=1, seed=seed)
