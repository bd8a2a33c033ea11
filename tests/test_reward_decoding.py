"""Writing with rewards: cases B1 to B19 end to end, particles, best of n, logits processors."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from nanogpt import GPT, char_reward_fn, term_reward_fn
from nanogpt.reward_decoding import (
    RewardAugmentedLogitsProcessor,
    best_of_n,
    generate_reward_augmented,
)
from nanogpt.rewards import TokenReward, combine, ids_reward_fn, text_reward_fn
from nanogpt.tilt import best_of_n as best_of_n_pmf
from nanogpt.tokenizer import CharTokenizer

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz .")
BLOCK = 16
# Quantiles of chi-square at 0.999, by degrees of freedom.
QUANTILE = {1: 10.83, 2: 13.82, 3: 16.27}


class FixedModel(torch.nn.Module):
    """The same logits after the same last token, whatever stands before.

    Args:
        probabilities: (V, V), row i follows token i; or (V,), the same after all.
    """

    def __init__(self, probabilities: list) -> None:
        super().__init__()
        p = torch.tensor(probabilities, dtype=torch.float64)
        size = p.shape[-1]
        self.log_p = p.expand(size, size).log()
        self.config = SimpleNamespace(vocab_size=size, block_size=1000)
        self.token_weight = torch.zeros(1)
        self.calibration_temperature = self.tokenizer = None
        self.calls = 0

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.log_p[tokens[:, -1]]


@pytest.fixture(scope="module")
def model() -> GPT:
    """Large random weights, so that its distributions are far from uniform."""
    torch.manual_seed(5)
    model = GPT(vocab_size=29, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    model.tokenizer = LETTERS
    return model.eval()


def write(model, reward, beta, *, rows=1, new=1, prompt=None, **options):
    """What generate_reward_augmented gives from token 0, or a prompt, on a stub or a GPT."""
    if prompt is None:
        prompt = torch.zeros(rows, 1, dtype=torch.int64)
    options.setdefault("seed", 7)
    options.setdefault("use_cache", not isinstance(model, FixedModel))
    return generate_reward_augmented(model, prompt, new, reward, beta, **options)


def fixed(values: list[float]) -> TokenReward:
    return TokenReward(dict(enumerate(values)), vocab_size=len(values), name="fixed")


def as_function(values: list[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same rewards as a function of ids, so that candidates are scored one by one."""
    vector = torch.tensor(values, dtype=torch.float64)
    return lambda ids: vector[ids[:, -1]]


def chi_square(drawn: torch.Tensor, expected: list[float]) -> float:
    p = torch.tensor(expected, dtype=torch.float64)
    counts = torch.bincount(drawn, minlength=len(p)).double()
    assert (counts[p == 0] == 0).all()
    wanted = p[p > 0] * len(drawn)
    return float(((counts[p > 0] - wanted) ** 2 / wanted).sum())


B1 = ([0.5, 0.3, 0.15, 0.05], [0.0, 0.0, 0.0, 1.0])
B2 = ([0.1, 0.2, 0.3, 0.4], [1.0, 0.5, 0.2, 0.0])
B5 = ([0.5, 0.3, 0.15, 0.05], [0.2, 0.9, 0.4, 1.0])
DRAWS = 20_000


@pytest.mark.parametrize("make", [fixed, as_function])
@pytest.mark.parametrize(
    ("case", "beta", "expected"),
    [
        (B1, 1.0, [0.460442, 0.276265, 0.138132, 0.125161]),
        (B1, 5.0, None),
        (B2, 1.0, [0.198706, 0.241042, 0.267853, 0.292399]),
        (B2, -2.0, None),
        (([0.9, 0.1], [0.5, 0.501]), 10.0, [0.899096, 0.100904]),
    ],
    ids=["B1", "B1 at 5", "B2", "negative", "B17"],
)
def test_b1_b2_b17_draws_follow_the_tilted_distribution(make, case, beta, expected):
    """Per-step normalisation of the rewards of B17 would give [.000408, .999592]."""
    p, r = case
    if expected is None:
        weights = [a * math.exp(beta * b) for a, b in zip(p, r, strict=True)]
        expected = [w / sum(weights) for w in weights]
    drawn = write(FixedModel(p), make(r), beta, rows=DRAWS)[:, 1]
    assert chi_square(drawn, expected) < QUANTILE[len(p) - 1]
    assert chi_square(drawn, p) > QUANTILE[len(p) - 1] or beta == 10.0


def test_b1_a_wrong_beta_fails_the_chi_square_test():
    drawn = write(FixedModel(B1[0]), fixed(B1[1]), 1.15, rows=DRAWS)[:, 1]
    assert chi_square(drawn, [0.460442, 0.276265, 0.138132, 0.125161]) > QUANTILE[3]


@pytest.mark.parametrize(
    ("beta", "kl"), [(0.5, 0.013338), (1, 0.059453), (2, 0.276866), (4, 1.083933), (8, 2.079154)]
)
def test_b3_details_hold_the_exact_kl_of_each_step(beta, kl):
    details = write(FixedModel(B2[0]), fixed(B2[1]), beta, rows=3, new=2, return_details=True)
    assert details.kl.flatten().tolist() == pytest.approx([kl] * 6, abs=1e-6)
    p, r = (torch.tensor(values, dtype=torch.float64) for values in B2)
    log_z = (p * (beta * r).exp()).sum().log()
    assert torch.allclose(details.log_normalisers, log_z.expand(3, 2), atol=1e-12)
    assert torch.allclose(details.log_z, 2 * log_z.expand(3), atol=1e-12)
    assert torch.equal(details.rewards, r[details.sequences[:, 1:]])
    assert torch.allclose(details.token_probabilities, p[details.sequences[:, 1:]])
    reached = (p * r * (beta * r).exp()).sum() / log_z.exp()
    assert details.kl[0, 0].item() == pytest.approx((beta * reached - log_z).item(), abs=1e-12)


@pytest.mark.parametrize("shift", [-3.0, 1e4])
def test_b4_a_shift_of_all_rewards_changes_no_draw(shift):
    model = FixedModel(B2[0])
    plain = write(model, fixed(B2[1]), 1.5, rows=500, new=8)
    assert torch.equal(write(model, fixed([r + shift for r in B2[1]]), 1.5, rows=500, new=8), plain)
    shifted = as_function([r + shift for r in B2[1]])
    assert torch.equal(write(model, ids_reward_fn(shifted), 1.5, rows=500, new=8), plain)


def test_b4_a_count_so_far_is_the_reward_of_the_last_token():
    model = FixedModel(B1[0])
    plain = write(model, fixed(B1[1]), 2.0, rows=500, new=8, return_details=True)

    def count(ids):
        return (ids == 3).double().sum(1)

    counted = write(model, count, 2.0, rows=500, new=8, return_details=True)
    assert torch.equal(plain.sequences, counted.sequences)
    assert torch.allclose(plain.rewards, counted.rewards)
    assert torch.allclose(plain.kl, counted.kl, atol=1e-9)
    assert counted.rewards.sum() > 100


def test_b5_the_inverse_reward_is_the_negative_beta():
    model = FixedModel(B5[0])
    inverse = write(model, fixed([1 - r for r in B5[1]]), 2.0, rows=500, new=4)
    assert torch.equal(inverse, write(model, fixed(B5[1]), -2.0, rows=500, new=4))


def test_b6_rewards_of_beta_1_and_2_together_are_beta_3():
    model = FixedModel(B5[0])
    both = combine([(fixed(B5[1]), 1.0), (fixed(B5[1]), 2.0)])
    got = write(model, both, 1.0, rows=500, new=4)
    assert torch.equal(got, write(model, fixed(B5[1]), 3.0, rows=500, new=4))


OPTIONS = [
    {},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.4, "top_p": 0.8, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"min_p": 0.05, "stop": "e", "eos_token_id": 28},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "reward",
    [
        char_reward_fn("eg", LETTERS),
        term_reward_fn(["gene"], LETTERS),
        lambda ids: (ids == 4).double().sum(1),
    ],
    ids=["characters", "terms", "function"],
)
@pytest.mark.parametrize("details", [False, True])
def test_b7_beta_0_gives_the_tokens_of_generate(model, options, reward, details):
    prompt = torch.randint(28, (3, 5))
    plain = model.generate(prompt, 40, seed=11, return_details=True, **options)
    got = model.generate_reward_augmented(
        prompt, 40, reward, 0.0, seed=11, return_details=details, **options
    )
    assert torch.equal(got.sequences if details else got, plain.sequences)
    if details:
        assert torch.equal(got.lengths, plain.lengths)
        assert torch.equal(got.token_probabilities, plain.token_probabilities)
        assert not got.kl.any()
        assert not got.log_z.any()
        if not options.get("stop"):
            new = got.sequences[:, 5:].tolist()
            expected = [
                float(reward(torch.tensor([row])).sum())
                if not hasattr(reward, "token_rewards") or reward.kind == "step"
                else float(reward.token_rewards(29)[row].sum())
                for row in new
            ]
            counted = (prompt == 4).sum(1).tolist() if not hasattr(reward, "kind") else [0] * 3
            expected = [a + b for a, b in zip(expected, counted, strict=True)]
            assert got.rewards.sum(1).tolist() == pytest.approx(expected, abs=1e-5)


def test_b7_beta_0_of_a_large_vocabulary_is_not_cut_to_the_likeliest():
    p = torch.full((1500,), 1 / 1500).tolist()
    drawn = write(FixedModel(p), lambda ids: ids[:, -1].double(), 0.0, rows=300)[:, 1]
    assert len(drawn.unique()) > 150


def test_b8_rewards_are_added_after_the_temperature():
    p, r = B5
    drawn = write(FixedModel(p), fixed(r), 2.0, rows=DRAWS, temperature=0.5)[:, 1]
    weights = [a**2 * math.exp(2 * b) for a, b in zip(p, r, strict=True)]
    other = [(a * math.exp(2 * b)) ** 2 for a, b in zip(p, r, strict=True)]
    assert chi_square(drawn, [w / sum(weights) for w in weights]) < QUANTILE[3]
    assert chi_square(drawn, [w / sum(other) for w in other]) > QUANTILE[3]
    gap = [a / sum(weights) - b / sum(other) for a, b in zip(weights, other, strict=True)]
    assert max(map(abs, gap)) == pytest.approx(0.2515, abs=1e-4)


@pytest.mark.parametrize("make", [fixed, as_function])
def test_b9_only_the_likeliest_candidates_are_scored_and_kept(make):
    model, reward = FixedModel(B1[0]), make(B1[1])
    two = write(model, reward, 5.0, rows=2000, reward_top_k=2)[:, 1]
    assert set(two.tolist()) == {0, 1}
    every = write(model, reward, 5.0, rows=DRAWS)[:, 1]
    assert chi_square(every, [0.056746, 0.034048, 0.017024, 0.886508 - 0.994326 + 1]) > 0
    assert (every == 3).double().mean().item() == pytest.approx(0.886508, abs=0.01)
    for k in (4, 9):
        more = write(model, reward, 5.0, rows=DRAWS, reward_top_k=k)[:, 1]
        assert torch.equal(more, every)


def test_b9_a_function_scores_20_candidates_of_a_large_vocabulary():
    p = torch.arange(1, 1501).double()
    widths = []

    def reward(ids):
        widths.append(len(ids))
        return (ids[:, -1] < 1490).double()

    drawn = write(FixedModel((p / p.sum()).tolist()), reward, 30.0, rows=50)[:, 1]
    assert widths == [50 * 20]
    assert set(drawn.tolist()) <= set(range(1480, 1490))
    vector = fixed([1.0] * 3 + [0.0] * 1497)
    assert set(write(FixedModel((p / p.sum()).tolist()), vector, 40.0, rows=50)[:, 1].tolist()) <= {
        0,
        1,
        2,
    }


MARKOV = [[0.9, 0.1], [0.2, 0.8]]
TEXTS = list(itertools.product([0, 1], repeat=2))


class Markov(FixedModel):
    """Case B10: begins with [.5, .5] after the prompt, token 2, and then follows A."""

    def __init__(self, rows: list) -> None:
        padded = [[*row, 0.0] for row in rows] + [[0.5, 0.5, 0.0]]
        super().__init__(padded)


def ones(ids: torch.Tensor) -> torch.Tensor:
    return (ids == 1).double().sum(1)


def frequencies(sequences: torch.Tensor) -> list[float]:
    codes = sequences[:, -2] * 2 + sequences[:, -1]
    return (torch.bincount(codes, minlength=4).double() / len(codes)).tolist()


TARGET = [0.118006, 0.035642, 0.071283, 0.775069]
TOKENWISE = [0.206555, 0.062386, 0.061573, 0.669486]
BEGIN = torch.full((1, 1), 2)


@pytest.mark.parametrize("reward", [fixed([0.0, 1.0, 0.0]), ones], ids=["fixed", "function"])
def test_b10_token_by_token_is_not_the_tilt_of_texts(reward):
    drawn = write(Markov(MARKOV), reward, 1.0, prompt=BEGIN.expand(DRAWS, 1), new=2)
    codes = drawn[:, 1] * 2 + drawn[:, 2]
    assert chi_square(codes, TOKENWISE) < QUANTILE[3]
    assert chi_square(codes, TARGET) > QUANTILE[3]


@pytest.mark.parametrize("reward", [fixed([0.0, 1.0, 0.0]), ones], ids=["fixed", "function"])
def test_b10_particles_reach_the_tilt_of_texts(reward):
    details = write(
        Markov(MARKOV), reward, 1.0, prompt=BEGIN.expand(20, 1), new=2,
        num_particles=4096, return_details=True,
    )  # fmt: skip
    p = torch.zeros(20, 4, dtype=torch.float64)
    codes = details.particles[..., 1] * 2 + details.particles[..., 2]
    p.scatter_add_(1, codes, details.weights)
    distance = 0.5 * (p - torch.tensor(TARGET)).abs().sum(1)
    assert distance.max() < 0.02
    assert torch.allclose(details.weights.sum(1), torch.ones(20, dtype=torch.float64))
    z = details.log_z.exp()
    assert abs(z.mean() - 3.813365) < 3 * z.std() / math.sqrt(20)
    assert z.std() < 0.1


def test_b10_one_particle_drawn_by_its_weight_follows_the_tilt_of_texts():
    """8 particles, with resampling: nearly the target, and not what the steps alone give."""
    rows = 6000
    drawn = write(Markov(MARKOV), ones, 1.0, prompt=BEGIN.expand(rows, 1), new=2, num_particles=8)
    codes = drawn[:, 1] * 2 + drawn[:, 2]
    got = frequencies(drawn)
    assert 0.5 * sum(abs(a - b) for a, b in zip(got, TARGET, strict=True)) < 0.03
    assert chi_square(codes, TOKENWISE) > QUANTILE[3]


@pytest.mark.parametrize("particles", [1, 3, 6])
def test_b10_the_normaliser_is_unbiased_for_any_number_of_particles(particles):
    """Longer texts, so that particles are resampled."""
    model = Markov([[0.97, 0.03], [0.1, 0.9]])
    new, rows = 12, 4000
    details = write(
        model, ones, 1.0, prompt=BEGIN.expand(rows, 1), new=new, num_particles=particles,
        return_details=True, seed=3,
    )  # fmt: skip
    value = torch.ones(2, dtype=torch.float64)
    a = torch.tensor([[0.97, 0.03], [0.1, 0.9]], dtype=torch.float64)
    gain = torch.tensor([1.0, math.e], dtype=torch.float64)
    for _ in range(new - 1):
        value = a @ (gain * value)
    exact = float((0.5 * gain * value).sum())
    z = details.log_z.exp()
    assert abs(float(z.mean()) - exact) < 3.5 * float(z.std()) / math.sqrt(rows)
    assert bool(details.resamplings.any()) is (particles > 1)
    if particles == 1:
        assert torch.allclose(details.log_z, details.log_normalisers.sum(1))


def test_b10_an_exact_value_of_prefixes_makes_every_step_exact():
    """V = E[e^(future reward)] given the prefix, with beta 1: r + log V(x) - log V(before)."""
    value = torch.tensor([1.171828, 2.374625, 1.0], dtype=torch.float64)

    def twisted(ids):
        new = ids[:, 1:]
        later = value[new[:, -1]].log() if new.shape[1] == 1 else torch.zeros(len(new)).double()
        return ones(new) + later

    drawn = write(Markov(MARKOV), twisted, 1.0, prompt=BEGIN.expand(DRAWS, 1), new=2)
    assert chi_square(drawn[:, 1] * 2 + drawn[:, 2], TARGET) < QUANTILE[3]
    details = write(
        Markov(MARKOV), twisted, 1.0, prompt=BEGIN.expand(50, 1), new=2, return_details=True
    )
    # With the exact value the normalisers of all texts multiply to Z, whichever was drawn.
    assert torch.allclose(details.log_z.exp(), torch.tensor(3.813365).double(), atol=1e-5)


def test_b11_without_memory_token_by_token_is_the_tilt_of_texts():
    details = write(
        Markov([[0.7, 0.3], [0.7, 0.3]]), ones, 1.0, prompt=torch.zeros(DRAWS, 1).long(), new=2,
        return_details=True,
    )  # fmt: skip
    share = (details.sequences[:, 1:] == 1).double().mean().item()
    assert share == pytest.approx(0.538102, abs=0.01)
    z = 0.7 + 0.3 * math.e
    assert torch.allclose(details.log_z, torch.tensor(2 * math.log(z)).double(), atol=1e-12)


REWARDS = {
    "characters": char_reward_fn("eg", LETTERS, reward=2.0),
    "terms": term_reward_fn(["gene", "ab"], LETTERS),
    "function": lambda ids: (ids == 4).double().sum(1) * 0.7,
    "texts": text_reward_fn(
        lambda completions, **_: [text.count("e") for text in completions], LETTERS
    ),
    "sum": combine([(char_reward_fn("eg", LETTERS), 0.5), (term_reward_fn(["ab"], LETTERS), 2.0)]),
}


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("name", REWARDS)
def test_b12_rows_of_a_batch_equal_single_runs(model, name, particles):
    prompt = torch.randint(28, (3, 5))
    options = {"seed": 4, "num_particles": particles, "return_details": True, "stop": "q"}
    batch = model.generate_reward_augmented(prompt, 24, REWARDS[name], 1.5, **options)
    assert len({tuple(row.tolist()) for row in batch.sequences}) == 3
    for row in range(3):
        single = model.generate_reward_augmented(
            prompt[row : row + 1], 24, REWARDS[name], 1.5, first_row=row, **options
        )
        n = int(single.lengths[0])
        assert n == int(batch.lengths[row])
        assert torch.equal(single.sequences[0, : 5 + n], batch.sequences[row, : 5 + n])
        for one, many in (
            (single.rewards, batch.rewards),
            (single.kl, batch.kl),
            (single.log_normalisers, batch.log_normalisers),
            (single.token_probabilities, batch.token_probabilities),
        ):
            assert torch.allclose(one[0, :n], many[row, :n], atol=1e-5)
        assert torch.allclose(single.log_z[0], batch.log_z[row], atol=1e-5)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("name", REWARDS)
def test_b13_the_cache_changes_nothing_far_past_the_context(model, name, particles):
    prompt = torch.randint(28, (2, 5))
    options = {"seed": 4, "num_particles": particles, "return_details": True}
    cached = model.generate_reward_augmented(prompt, 40, REWARDS[name], 1.5, **options)
    plain = model.generate_reward_augmented(
        prompt, 40, REWARDS[name], 1.5, use_cache=False, **options
    )
    graphed = model.generate_reward_augmented(
        prompt, 40, REWARDS[name], 1.5, use_graph=True, **options
    )
    for other in (plain, graphed):
        assert torch.equal(cached.sequences, other.sequences)
        assert torch.equal(cached.particles, other.particles)
        assert torch.allclose(cached.kl, other.kl, atol=1e-4)
        assert torch.allclose(cached.log_z, other.log_z, atol=1e-4)
    if particles > 1 and name == "characters":
        assert cached.resamplings.sum() >= 1


def test_b14_a_fraction_is_diluted_and_a_character_reward_is_not():
    p = [0.5, 0.3, 0.15, 0.05]
    expected = {0: 0.886508, 9: 0.079846, 99: 0.052429}

    def fraction(ids):
        return (ids[:, 1:] == 3).double().mean(1)

    for length, share in expected.items():
        prompt = torch.zeros(DRAWS if length < 99 else 4000, 1 + length, dtype=torch.int64)
        for reward, wanted in ((fraction, share), (fixed([0, 0, 0, 1.0]), 0.886508)):
            drawn = write(FixedModel(p), reward, 5.0, prompt=prompt)[:, -1]
            got = (drawn == 3).double().mean().item()
            assert abs(got - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / len(prompt))


def test_b15_rows_that_have_ended_are_not_asked_about_again(model):
    seen = []

    def reward(prompts, completions, completion_ids):
        seen.append((list(prompts), [list(ids) for ids in completion_ids]))
        return [0.0] * len(completions)

    prompt = torch.tensor([LETTERS.encode(text) for text in ("ab", "cd", "ef", "gh")])
    end = LETTERS.stoi["e"]
    details = model.generate_reward_augmented(
        prompt, 40, text_reward_fn(reward, LETTERS), 1.0, seed=8, temperature=1.5,
        eos_token_id=end, return_details=True,
    )  # fmt: skip
    lengths = details.lengths.tolist()
    assert len(set(lengths)) > 1
    assert len(seen) == max(lengths)
    for step, (prompts, ids) in enumerate(seen):
        going = [row for row in range(4) if lengths[row] > step]
        assert prompts == [LETTERS.decode(prompt[row].tolist()) for row in going for _ in range(29)]
        for place, row in enumerate(going):
            before = details.sequences[row, 2 : 2 + step].tolist()
            assert all(one[:-1] == before for one in ids[29 * place : 29 * place + 29])
            # The end token is a candidate like any other, by its id.
            assert {one[-1] for one in ids[29 * place : 29 * place + 29]} == set(range(29))
    for row in range(4):
        assert (details.sequences[row, 2 + lengths[row] :] == end).all()
        assert not details.rewards[row, lengths[row] :].any()
        assert not details.kl[row, lengths[row] :].any()


@pytest.mark.parametrize("make", [fixed, as_function])
def test_b15_a_reward_for_the_end_token_is_scored_from_its_id(make):
    drawn = write(
        FixedModel([0.5, 0.3, 0.15, 0.05]), make([0, 0, 0, 1.0]), 30.0, rows=50, new=5,
        eos_token_id=3,
    )  # fmt: skip
    assert (drawn[:, 1:] == 3).all()


def test_b16_best_of_n_follows_its_exact_distribution():
    p, r = B2
    details = best_of_n(
        FixedModel(p), torch.zeros(5000, 1, dtype=torch.int64), 1, fixed(r), 4,
        seed=3, use_cache=False, return_details=True,
    )  # fmt: skip
    expected = best_of_n_pmf(torch.tensor(p), torch.tensor(r), 4).tolist()
    assert sorted(expected) == pytest.approx([0.0256, 0.2145, 0.3439, 0.4160], abs=1e-4)
    assert chi_square(details.sequences[:, 1], expected) < QUANTILE[3]
    assert torch.equal(
        details.rewards.max(1).values, details.rewards.gather(1, details.best[:, None])[:, 0]
    )
    assert torch.equal(details.candidates[torch.arange(5000), details.best], details.sequences)


@pytest.mark.parametrize("name", REWARDS)
def test_best_of_n_compares_the_sums_of_step_rewards(model, name):
    prompt = torch.randint(28, (2, 5))
    details = best_of_n(model, prompt, 20, REWARDS[name], 3, seed=4, stop="q", return_details=True)
    for row in range(2):
        for place in range(3):
            # beta 0 writes the same text, and its details add the rewards up.
            one = model.generate_reward_augmented(
                prompt[row : row + 1], 20, REWARDS[name], 0.0, seed=4, stop="q",
                first_row=3 * row + place, return_details=True,
            )  # fmt: skip
            n = int(one.lengths[0])
            assert torch.equal(details.candidates[row, place, : 5 + n], one.sequences[0, : 5 + n])
            assert details.rewards[row, place] == pytest.approx(float(one.rewards.sum()), abs=1e-5)
    assert torch.equal(details.best, details.rewards.argmax(1))
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n(model, prompt, 2, REWARDS[name], 0)


@pytest.mark.parametrize("make", [fixed, as_function])
def test_b18_equal_rewards_change_no_draw_and_minus_infinity_forbids(make):
    model = FixedModel(B1[0])
    plain = write(model, fixed([0.0] * 4), 0.0, rows=300, new=4)
    assert torch.equal(write(model, make([3.5] * 4), 2.0, rows=300, new=4), plain)
    forbidden = write(
        model, make([-math.inf, 0.0, 0.0, 1.0]), 2.0, rows=300, new=4, return_details=True
    )
    assert not (forbidden.sequences[:, 1:] == 0).any()
    assert forbidden.kl.isfinite().all()


def test_b18_rewards_that_are_no_numbers_name_the_reward_and_the_step():
    def third_is_bad(value):
        def slowly(ids):
            rewards = torch.zeros(len(ids), dtype=torch.float64)
            if ids.shape[1] == 4:
                rewards[5] = value
            return rewards

        return slowly

    model = FixedModel(B1[0])
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"'slowly' gave {value} for token . at step 3"):
            write(model, third_is_bad(value), 1.0, rows=2, new=6)

    def nothing_left(ids):
        return torch.full((len(ids),), -math.inf if ids.shape[1] == 3 else 0.0)

    for options in ({}, {"num_particles": 3}):
        with pytest.raises(ValueError, match=r"'nothing_left' forbids every token .* at step 2"):
            write(model, nothing_left, 1.0, rows=2, new=6, **options)
    with pytest.raises(ValueError, match="forbids every token"):
        write(model, fixed([-math.inf] * 4), 1.0)
    with pytest.raises(ValueError, match="gave -inf for token 0"):
        write(model, fixed([-math.inf, 0, 0, 0]), -1.0)


def test_b18_a_reward_of_nan_that_the_filters_left_out_does_not_matter():
    model = FixedModel(B1[0])
    reward = as_function([0.0, 1.0, math.nan, 2.0])
    drawn = write(model, reward, 1.0, rows=200, top_k=2)[:, 1]
    assert set(drawn.tolist()) == {0, 1}


def test_a_reward_that_raises_is_named_with_the_step_and_keeps_its_cause():
    def broken(ids):
        if ids.shape[1] == 4:
            raise KeyError("topic")
        return torch.zeros(len(ids))

    with pytest.raises(ValueError, match="'broken' raised KeyError: 'topic' at step 3") as caught:
        write(FixedModel(B1[0]), broken, 1.0, new=6)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda ids: torch.zeros(len(ids), 2), r"'<lambda>': it gave shape \(8, 2\) for 8 texts"),
        (lambda ids: [0.0], r"it gave shape \(1,\) for 8 texts"),
        (
            SimpleNamespace(
                candidates=lambda: torch.zeros(3), advance=lambda t: None, select=lambda r: None
            ),
            r"gave shape \(2, 3\) for candidates of shape \(2, 4\) at step 1",
        ),
        (
            SimpleNamespace(
                candidates=lambda: "many", advance=lambda t: None, select=lambda r: None
            ),
            "'SimpleNamespace' raised TypeError: .* at step 1",
        ),
    ],
)
def test_rewards_of_a_wrong_shape_are_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        write(FixedModel(B1[0]), reward, 1.0, rows=2)


def test_a_state_of_the_users_own_is_used_as_it_is():
    class Alternating:
        """Rewards token 3 at even steps and token 2 at odd ones."""

        def __init__(self):
            self.step, self.rows = 0, []

        def candidates(self):
            rewards = torch.zeros(4)
            rewards[3 - self.step % 2] = 50.0
            return rewards

        def advance(self, tokens):
            self.step += 1
            self.rows.append(tokens.tolist())

        def select(self, rows):
            raise AssertionError("no row ends here")

    state = Alternating()
    drawn = write(FixedModel(B1[0]), state, 1.0, rows=2, new=4)
    assert drawn[:, 1:].tolist() == [[3, 2, 3, 2]] * 2
    assert state.rows == [[3, 3], [2, 2]] * 2


def test_b19_character_rewards_make_no_call_per_step_and_functions_exactly_one(monkeypatch, model):
    calls = []
    reward = char_reward_fn("eg", LETTERS)
    for name in ("__call__", "token_rewards", "begin"):
        original = getattr(TokenReward, name)

        def counted(self, *arguments, _name=name, _original=original):
            calls.append(_name)
            return _original(self, *arguments)

        monkeypatch.setattr(TokenReward, name, counted)
    prompt = torch.randint(28, (3, 5))
    for options in ({}, {"return_details": True}, {"num_particles": 4}):
        calls.clear()
        model.generate_reward_augmented(prompt, 20, reward, 1.0, **options)
        assert calls == ["token_rewards"]
    widths = []

    def function(ids):
        widths.append(tuple(ids.shape))
        return (ids[:, -1] == 4).double()

    model.generate_reward_augmented(prompt, 20, function, 1.0, top_k=7)
    assert widths == [(3 * 7, 6 + step) for step in range(20)]


def test_temperature_0_takes_the_largest_sum_of_log_p_and_reward(model):
    prompt = torch.randint(28, (2, 5))
    reward = char_reward_fn("eg", LETTERS)
    got = model.generate_reward_augmented(prompt, 30, reward, 3.0, temperature=0.0)
    text = prompt
    for _ in range(30):
        n, start = text.shape[1], 0
        if n > BLOCK:
            start = 4 * math.ceil((n - BLOCK) / 4)
        logits = model(text[:, start:])[0][:, -1].double() + 3.0 * reward.token_rewards(29)
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, text)
    assert not torch.equal(got, model.generate(prompt, 30, temperature=0.0))


def test_filters_act_before_the_reward():
    """With top-k 2 the rewarded fourth token stays out, whatever beta is."""
    drawn = write(FixedModel(B1[0]), fixed(B1[1]), 50.0, rows=500, top_k=2)[:, 1]
    assert set(drawn.tolist()) == {0, 1}


def test_particles_are_a_function_of_the_seed(model):
    prompt = torch.randint(28, (2, 5))
    reward = char_reward_fn("eg", LETTERS)
    options = {"num_particles": 6, "return_details": True}
    first = model.generate_reward_augmented(prompt, 20, reward, 2.0, seed=1, **options)
    again = model.generate_reward_augmented(prompt, 20, reward, 2.0, seed=1, **options)
    other = model.generate_reward_augmented(prompt, 20, reward, 2.0, seed=2, **options)
    assert torch.equal(first.particles, again.particles)
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.particles, other.particles)
    alone = model.generate_reward_augmented(prompt, 20, reward, 2.0, seed=1, num_particles=6)
    assert torch.equal(alone, first.sequences)
    assert first.particles.shape == (2, 6, 25)
    # The text that is given is one of the particles.
    for row in range(2):
        assert any(torch.equal(first.sequences[row], one) for one in first.particles[row])


def test_the_log_of_particles_is_told_along_the_line_that_was_drawn(model):
    """Rewards and probabilities of the drawn text are those of its tokens, resampling or not."""
    prompt = torch.randint(28, (6, 5))
    reward = char_reward_fn("eg", LETTERS)
    got = model.generate_reward_augmented(
        prompt, 11, reward, 3.0, seed=1, num_particles=6, return_details=True
    )
    assert got.resamplings.sum() >= 4
    assert torch.equal(got.rewards, reward.token_rewards(29)[got.sequences[:, 5:]])
    logits = model(got.sequences[:, :-1])[0].double().log_softmax(-1)[:, 4:]
    picked = logits.gather(2, got.sequences[:, 5:, None])[..., 0].exp()
    assert torch.allclose(got.token_probabilities, picked, atol=1e-5)


def test_particles_in_a_dead_end_give_way_to_the_others():
    """Token 1 may only be followed by itself, which is forbidden: its particles weigh nothing."""
    model = FixedModel([[0.5, 0.5], [0.0, 1.0]])

    def no_second_one(ids):
        return torch.where((ids[:, 1:] == 1).sum(1) >= 2, -math.inf, 0.0)

    details = write(
        model, no_second_one, 1.0, rows=30, new=4, num_particles=64, return_details=True
    )
    assert (details.particles[..., 1:-1][details.weights > 0] == 0).all()
    assert (details.sequences[:, 1:4] == 0).all()
    z = details.log_z.exp()  # texts without two ones: 0000 and 0001
    assert abs(z.mean().item() - 1 / 8) < 4 * z.std().item() / math.sqrt(30)


def test_stop_texts_end_particles_one_by_one(model):
    prompt = torch.randint(28, (2, 5))
    reward = char_reward_fn("e", LETTERS)
    got = model.generate_reward_augmented(
        prompt, 60, reward, 2.0, seed=1, num_particles=5, stop="ee", return_details=True
    )
    for row in range(2):
        n = int(got.lengths[row])
        text = LETTERS.decode(got.sequences[row, 5 : 5 + n].tolist())
        assert text.endswith("ee")
        assert "ee" not in text[:-1]
        assert not got.rewards[row, n:].any()
        assert (got.sequences[row, 5 + n :] == LETTERS.end_of_text_id).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": math.nan}, "beta must be finite"),
        ({"beta": math.inf}, "beta must be finite"),
        ({"reward_top_k": 0}, "reward_top_k must be at least 1"),
        ({"num_particles": 0}, "num_particles must be at least 1"),
        ({"num_particles": 2, "temperature": 0.0}, "temperature must be above 0"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"first_row": 2**32}, "first_row"),
        ({"num_particles": 4, "first_row": 2**30}, "first_row"),
        ({"engine": "gpu"}, "engine must be"),
        ({"engine": "native", "use_cache": False}, "engine='torch'"),
    ],
)
def test_an_option_out_of_range_is_named(model, options, message):
    given = {"max_new_tokens": 1, "beta": 1.0, "reward_fn": char_reward_fn("e", LETTERS), **options}
    with pytest.raises(ValueError, match=message):
        model.generate_reward_augmented(torch.zeros(1, 1, dtype=torch.int64), **given)


def test_the_compiled_engine_says_why_it_cannot_write_with_particles(model):
    prompt = torch.zeros(1, 3, dtype=torch.int64)
    reward = char_reward_fn("e", LETTERS)
    with pytest.raises(RuntimeError, match="num_particles > 1 needs several"):
        model.generate_reward_augmented(prompt, 3, reward, 1.0, engine="native", num_particles=2)
    auto = model.generate_reward_augmented(
        prompt, 9, reward, 1.0, engine="auto", num_particles=2, seed=1
    )
    torch_alone = model.generate_reward_augmented(prompt, 9, reward, 1.0, num_particles=2, seed=1)
    assert torch.equal(auto, torch_alone)


def test_a_reward_for_another_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match=r"char_reward\(.*: it was made for 12 tokens"):
        model.generate_reward_augmented(
            torch.zeros(1, 1, dtype=torch.int64),
            2,
            char_reward_fn("e", CharTokenizer("abcdefghijk")),
            1.0,
        )


def test_no_new_tokens_give_the_prompt_back(model):
    prompt = torch.randint(28, (2, 3))
    for particles in (1, 3):
        got = model.generate_reward_augmented(
            prompt, 0, char_reward_fn("e", LETTERS), 1.0, num_particles=particles,
            return_details=True,
        )  # fmt: skip
        assert torch.equal(got.sequences, prompt)
        assert got.rewards.shape == (2, 0)
        assert got.log_z.tolist() == [0.0, 0.0]


def test_writing_leaves_the_training_mode_as_it_was(model):
    model.train()
    model.generate_reward_augmented(
        torch.zeros(1, 1, dtype=torch.int64), 1, char_reward_fn("e", LETTERS), 1.0
    )
    assert model.training
    model.eval()


class Processed:
    """Hugging Face's loop in short: processors first, then the temperature, then a draw."""

    def __init__(self, model: FixedModel, processor, temperature: float = 1.0) -> None:
        self.model, self.processor, self.temperature = model, processor, temperature

    def distributions(self, path: torch.Tensor) -> list[torch.Tensor]:
        """(B, V) before each of the tokens path[:, 1:]."""
        out = []
        for t in range(1, path.shape[1]):
            ids = path[:, :t]
            scores = self.processor(ids, self.model.next_logits(ids).float())
            out.append((scores.double() / self.temperature).softmax(-1))
        return out


@pytest.mark.parametrize("make", [fixed, as_function])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_b8_a_logits_processor_tilts_by_beta_over_temperature(make, temperature):
    p, r = B5
    processor = RewardAugmentedLogitsProcessor(make(r), 2.0 * temperature)
    (got,) = Processed(FixedModel(p), processor, temperature).distributions(
        torch.zeros(1, 2).long()
    )
    weights = [a ** (1 / temperature) * math.exp(2.0 * b) for a, b in zip(p, r, strict=True)]
    assert got[0].tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-6)


def test_a_logits_processor_follows_its_texts_and_notices_new_ones():
    """Terms depend on the text so far; beams change places; another prompt starts anew."""
    reward = term_reward_fn(["ab", "ba"], LETTERS)
    processor = RewardAugmentedLogitsProcessor(reward, 1.0)
    scores = torch.zeros(2, 29)
    prompt = torch.tensor([LETTERS.encode("a"), LETTERS.encode("b")])

    def step(ids):
        return processor(ids, scores)

    def expected(texts):
        rows = []
        for text in texts:
            state = reward.begin(torch.zeros(1, 1, dtype=torch.int64))
            for token in LETTERS.encode(text):
                state.advance(torch.tensor([token]))
            rows.append(state.candidates()[0])
        return torch.stack(rows).float()

    def ids(*texts):
        return torch.tensor([LETTERS.encode(text) for text in texts])

    assert torch.equal(step(prompt), expected(["", ""]))
    assert torch.equal(step(ids("aa", "bb")), expected(["a", "b"]))
    assert torch.equal(step(ids("bba", "aab")), expected(["ba", "ab"]))
    assert torch.equal(step(ids("aab ", "aab.")), expected(["ab ", "ab."]))
    assert torch.equal(step(ids("ab", "ab")), expected(["", ""]))
    processor.reset()
    assert torch.equal(step(ids("aba", "abb")), expected(["", ""]))


def test_a_logits_processor_scores_the_likeliest_candidates_alone():
    processor = RewardAugmentedLogitsProcessor(as_function(B1[1]), 5.0, reward_top_k=2)
    (got,) = Processed(FixedModel(B1[0]), processor).distributions(torch.zeros(1, 2).long())
    assert got[0].tolist() == pytest.approx([0.625, 0.375, 0.0, 0.0])
    for bad in ({"beta": math.nan}, {"reward_top_k": 0}):
        with pytest.raises(ValueError, match="must be"):
            RewardAugmentedLogitsProcessor(fixed(B1[1]), **{"beta": 1.0, **bad})


def test_transformers_generates_with_the_processor():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=29, n_positions=64, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=28, eos_token_id=28, pad_token_id=28,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    reward = char_reward_fn("g", LETTERS)
    processor = RewardAugmentedLogitsProcessor(reward, 40.0)
    out = theirs.generate(
        torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=8, do_sample=True,
        logits_processor=transformers.LogitsProcessorList([processor]),
    )  # fmt: skip
    assert (out[:, 3:] == LETTERS.stoi["g"]).all()
    halved = theirs.generate(
        torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=3, do_sample=True, temperature=0.5,
        top_k=0, logits_processor=[RewardAugmentedLogitsProcessor(reward, 2.0)],
        output_scores=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for scores, logits in zip(halved.scores, halved.logits, strict=True):
        # beta here = beta there / T: 4 to their 2.
        expected = logits / 0.5 + 4.0 * reward.token_rewards(29).float()
        assert torch.allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("particles", [1, 4])
def test_a_reward_by_ids_may_know_fewer_ids_than_the_model(model, particles):
    """char_reward_fn(["g"], stoi) beside terms, after a prompt of low ids."""
    by_ids = char_reward_fn(["g"], {"g": LETTERS.stoi["g"]})
    by_tokenizer = char_reward_fn("g", LETTERS)
    terms = term_reward_fn(["gene", "egg"], LETTERS)
    prompt = torch.tensor([[0, 1, 2]])
    texts = [
        generate_reward_augmented(
            model, prompt, 12, combine([(part, 0.5), (terms, 1.0)]), 3.0, seed=2,
            num_particles=particles,
        )
        for part in (by_ids, by_tokenizer)
    ]  # fmt: skip
    assert torch.equal(*texts)


def test_b15_a_row_that_has_ended_cannot_be_left_without_tokens():
    """What an ended row would go on to write may be forbidden: nobody is asked for it."""
    # 0 -> 1 (the end) -> 2, which is forbidden; 3 -> 3 for ever.
    chain = [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    model = FixedModel([[float(p) for p in row] for row in chain])
    forbids = TokenReward({2: -math.inf})
    both = generate_reward_augmented(
        model, torch.tensor([[0], [3]]), 3, forbids, 1.0, eos_token_id=1, seed=0, use_cache=False
    )
    assert both.tolist() == [[0, 1, 1, 1], [3, 3, 3, 3]]
    with pytest.raises(ValueError, match="forbids every token"):
        generate_reward_augmented(
            model, torch.tensor([[0], [3]]), 3, forbids, 1.0, seed=0, use_cache=False
        )


def test_a_part_of_weight_0_counts_nothing():
    both = combine([(TokenReward({1: -math.inf}), 0.0), (TokenReward({1: 2.0}), 1.0)])
    tokens = torch.tensor([[0, 1]])
    assert both(tokens).tolist() == [2.0]
    assert both.totals(tokens[:, :1], tokens[:, 1:], torch.tensor([1])).tolist() == [2.0]
