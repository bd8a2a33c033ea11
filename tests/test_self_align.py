"""Self-alignment: cases C1 to C6, C9 and C11 on a tabular policy, C10 and C12 on small GPTs.

The tabular policy has a few texts and their probabilities, so that training is exact and what the
loop does to it has closed forms. The loop is the one that aligns a GPT.
"""

import copy
import math
import random

import numpy as np
import pytest
import torch

from nanogpt.data import BatchOrder, gather
from nanogpt.errors import InputError
from nanogpt.model import GPT
from nanogpt.self_align import RewardTilt, Samples, SelfAlignConfig, SelfAlignTrainer
from nanogpt.term_alignment import (
    AlignmentReward,
    FitConfig,
    GPTPolicy,
    make_self_alignment,
    split_terms,
)
from nanogpt.tilt import effective_sample_size, reward_weights, tilt
from nanogpt.tokenizer import CharTokenizer

TEXTS = ("plain", "rewarded")


class Table:
    """Probabilities of a few texts.

    Args:
        exact: a sample is the table itself, every text standing for N times its probability.
        temperature: of what is drawn.
        weighted: give importance weights for a temperature other than 1.
    """

    def __init__(self, p, *, exact=True, temperature=1.0, weighted=False, rewards=(0.0, 1.0)):
        self.p0 = self.p = torch.tensor(p, dtype=torch.float64)
        self.exact, self.temperature, self.weighted = exact, temperature, weighted
        self.rewards = torch.tensor(rewards, dtype=torch.float64)
        self.trained = []
        self.tilted = False

    def sample(self, n, seed, *, distil_beta=None):
        q = (self.p.log() / self.temperature).softmax(0)
        if distil_beta is not None:
            q = tilt(q.log(), self.rewards, distil_beta).log_q.exp()
        if self.exact:
            rows, counts = torch.arange(len(q)), n * q
            if self.weighted:
                counts = n * self.p
        else:
            draw = torch.Generator().manual_seed(seed)
            rows = torch.multinomial(q, n, replacement=True, generator=draw)
            counts = (self.p / q)[rows] if self.weighted else torch.ones(n, dtype=torch.float64)
        log_ratio = self.p.log() - self.p0.log()
        texts = [TEXTS[i] for i in rows.tolist()]
        return Samples(
            written=texts,
            texts=texts,
            prompts=[""] * len(rows),
            n_tokens=torch.ones(len(rows), dtype=torch.int64),
            counts=counts,
            kl=(self.p * log_ratio).nan_to_num().sum().expand(len(rows)),
            entropy=torch.special.entr(self.p).sum().expand(len(rows)),
            base_nll=-self.p0.log()[rows],
            tokens=rows[:, None],
            temperature=self.temperature,
            tilted=self.tilted,
        )

    def fit(self, pool, weights, anchor, seed):
        assert float(weights.mean()) == pytest.approx(1)
        share = torch.zeros_like(self.p).index_add_(0, pool.tokens[:, 0], weights)
        new = copy.copy(self)
        new.p = (1 - anchor) * share / share.sum() + anchor * self.p0
        self.trained.append(weights)
        return new

    def general_nll(self):
        return None

    def state(self):
        return {"p": self.p}

    def with_state(self, state):
        new = copy.copy(self)
        new.p = state["p"]
        return new


def of_text(values):
    table = torch.tensor(values, dtype=torch.float64)
    return lambda samples: table[samples.tokens[:, 0]]


REWARD = of_text((0.0, 1.0))


def trainer(policy, reward=REWARD, **choices):
    """Raw rewards, no anchor and no budget unless given; every draw counts."""
    defaults = {
        "rounds": 10,
        "scale_rewards": "none",
        "anchor_fraction": 0.0,
        "kl_budget": 1e9,
        "deduplicate": False,
        "num_generations": 1000,
    }
    return SelfAlignTrainer(policy, reward, SelfAlignConfig(**{**defaults, **choices}))


def path(aligning):
    """The probability of the rewarded text after each round."""
    reached = []
    while aligning.step():
        reached.append(float(aligning.policy.p[-1]))
    return reached[1:]


C1 = {1: 0.231969, 2: 0.450853, 3: 0.690568, 5: 0.942826, 10: 0.999592}


def test_c1_rounds_move_log_odds_by_one_temperature_each():
    reached = path(trainer(Table([0.9, 0.1])))
    assert len(reached) == 10
    for rounds, expected in C1.items():
        assert reached[rounds - 1] == pytest.approx(expected, abs=1e-6)


def test_c1_sampled_rounds_are_within_three_standard_errors():
    n = 10_000
    reached = path(trainer(Table([0.9, 0.1], exact=False), num_generations=n, rounds=5))
    for rounds in (1, 2, 3, 5):
        p = C1[rounds]
        # The error of a share under weights: of round 1's 10,000 draws, the tenth that count most.
        spread = 3 * p * (1 - p) * math.sqrt(1 / (0.1 * 0.9 * n))
        assert reached[rounds - 1] == pytest.approx(p, abs=spread)


def test_c1_earlier_samples_add_to_what_a_round_knows():
    """With as many samples again from earlier rounds, the error of the third round is smaller."""

    def error(forgets):
        total = 0.0
        for seed in range(40):
            aligning = trainer(
                Table([0.9, 0.1], exact=False), num_generations=200, rounds=3, seed=seed
            )
            while aligning.step():
                if forgets:
                    del aligning._drawn[:-1]
            total += (float(aligning.policy.p[-1]) - C1[3]) ** 2
        return total

    assert error(forgets=False) < error(forgets=True)


def test_rounds_share_a_pool_by_their_effective_sizes():
    policy = Table([0.9, 0.1], exact=False)
    trainer(policy, rounds=3, num_generations=500, beta=0.4).train()
    rounds = policy.trained[2].split(500)
    sizes = [effective_sample_size(weights) for weights in rounds]
    assert sizes[0] < 0.8 * sizes[2]
    for weights, size in zip(rounds, sizes, strict=True):
        assert float(weights.sum()) / 1500 == pytest.approx(size / sum(sizes))


def test_c2_keeping_the_best_fifth_divides_by_a_fifth():
    reached = path(trainer(Table([0.95, 0.05]), weighting="keep", keep_fraction=0.2, rounds=2))
    assert reached == pytest.approx([0.25, 1.0])


def test_c2_sampled_the_kept_number_is_rounded_up_and_ties_share():
    rewards = torch.tensor([0.0] * 90 + [1.0] * 11, dtype=torch.float64)
    ones = torch.ones(101, dtype=torch.float64)
    factor = RewardTilt.best(rewards, ones, 0.2).log_factor(rewards).exp()
    quota = math.ceil(0.2 * 101)
    assert quota == 21
    assert float(factor.sum()) == pytest.approx(101)
    # Eleven count in full, the other ten places are shared by ninety.
    assert float(factor[-1]) == pytest.approx(101 / quota)
    assert float(factor[0]) == pytest.approx(101 / quota * 10 / 90)
    several = torch.tensor([3.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    exact = RewardTilt.best(several, ones[:4], 0.5).log_factor(several).exp()
    assert exact.tolist() == pytest.approx([2, 0, 2, 0])
    equal = torch.full((7,), 0.3, dtype=torch.float64)
    assert RewardTilt.best(equal, ones[:7], 0.2).log_factor(equal).tolist() == pytest.approx(
        [0] * 7
    )


@pytest.mark.parametrize(
    ("anchor", "fixed"), [(0.1, 0.858581), (0.3, 0.585240), (0.5, 0.343680), (0.8, 0.142089)]
)
def test_c3_an_anchor_gives_the_rounds_a_fixed_point(anchor, fixed):
    """Though earlier samples are reused, with the weights that the anchored rounds give them."""
    aligning = trainer(Table([0.9, 0.1]), rounds=40, anchor_fraction=anchor)
    reached = path(aligning)
    assert reached[-1] == pytest.approx(fixed, abs=1e-5)
    assert len(aligning._drawn) > 40
    if anchor == 0.3:
        sampled = path(
            trainer(
                Table([0.9, 0.1], exact=False),
                rounds=8,
                anchor_fraction=anchor,
                num_generations=10_000,
            )
        )
        assert sampled == pytest.approx(reached[:8], abs=0.03)


def test_c3_without_an_anchor_nothing_is_left_of_the_base():
    assert path(trainer(Table([0.9, 0.1]), rounds=40))[-1] == pytest.approx(1, abs=1e-5)


def test_c4_the_distance_is_known_in_advance_and_the_budget_ends_the_rounds():
    aligning = trainer(Table([0.9, 0.1]), rounds=5)
    aligning.train()
    for rounds, expected in {1: 0.073404, 2: 0.407677, 3: 1.004048, 5: 1.957839}.items():
        assert aligning.rounds[rounds]["kl_predicted"] == pytest.approx(expected, abs=1e-6)
        assert aligning.rounds[rounds]["kl"] == pytest.approx(expected, abs=1e-6)
    held = trainer(Table([0.9, 0.1]), rounds=5, kl_budget=0.5)
    held.train()
    assert [metrics["round"] for metrics in held.rounds] == [0, 1, 2]
    assert float(held.policy.p[-1]) == pytest.approx(C1[2], abs=1e-6)
    assert len(held.rounds) == 3
    assert "KL budget" in held.stopped
    assert "round 3 would go 1 nats" in held.stopped


def test_c4_the_distance_of_an_anchored_mixture_is_known_too():
    aligning = trainer(Table([0.9, 0.1]), rounds=4, anchor_fraction=0.3)
    aligning.train()
    for metrics in aligning.rounds[1:]:
        assert metrics["kl_predicted"] == pytest.approx(metrics["kl"], abs=1e-9)


def test_c5_without_a_reward_the_rounds_are_a_martingale():
    """Weights are exactly 1 and only the noise of sampling moves the policy."""
    ends = []
    for seed in range(20):
        aligning = trainer(
            Table([0.9, 0.1], exact=False), weighting="identity", rounds=3, seed=seed
        )
        aligning.train()
        ends.append(float(aligning.policy.p[-1]) - 0.1)
    bound = 3 * math.sqrt(3 * 0.1 * 0.9 / 1000 / 20)
    assert abs(sum(ends) / 20) <= bound
    assert max(map(abs, ends)) > 0
    base = Table([0.9, 0.1], exact=False)
    first = trainer(base, weighting="identity", rounds=1)
    first.train()
    assert base.trained[0].tolist() == [1.0] * 1000


def test_c6_samples_at_another_temperature_are_refused_or_weighted():
    with pytest.raises(ValueError, match=r"temperature 0\.5 .* draw at 1"):
        trainer(Table([0.9, 0.1], exact=False, temperature=0.5)).train()
    # What taking them as they are would do, without any reward: .1 becomes .012195.
    naive = Table([0.9, 0.1], temperature=0.5).sample(1000, 0).counts / 1000
    assert float(naive[1]) == pytest.approx(0.012195, abs=1e-6)
    plain = trainer(
        Table([0.9, 0.1], temperature=0.5, weighted=True), weighting="identity", rounds=1
    )
    assert path(plain) == pytest.approx([0.1])
    drawn = Table([0.9, 0.1], exact=False, temperature=0.5, weighted=True)
    reached = path(trainer(drawn, rounds=1, num_generations=20_000))
    assert reached[0] == pytest.approx(C1[1], abs=0.02)


def test_c9_training_on_the_decoders_samples_is_as_many_rounds():
    n = 10_000
    policy = Table([0.9, 0.1], exact=False)
    distilled = trainer(policy, weighting="identity", distil_beta=3.0, rounds=1, num_generations=n)
    p = C1[3]
    assert path(distilled)[0] == pytest.approx(p, abs=3 * math.sqrt(p * (1 - p) / n))


def test_c9_tilting_twice_is_refused():
    with pytest.raises(ValueError, match="double_tilt"):
        SelfAlignConfig(distil_beta=3.0, weighting="exp")
    policy = Table([0.9, 0.1])
    policy.tilted = True
    with pytest.raises(ValueError, match="double_tilt"):
        trainer(policy).train()


@pytest.mark.filterwarnings("ignore:nothing")
def test_c11_where_all_rewards_are_equal_nothing_is_trained():
    for value in (0.0, 1.0):
        policy = Table([0.9, 0.1], exact=False)
        aligning = trainer(policy, of_text((value, value)), scale_rewards="std")
        with pytest.warns(RuntimeWarning, match="nothing can be learnt"):
            aligning.train()
        assert aligning.policy is policy
        assert not policy.trained
        assert aligning.rounds[-1]["frac_reward_zero_std"] == 1
        assert "the same reward" in aligning.stopped


def test_c11_where_nothing_is_accepted_nothing_is_trained():
    """Though penalties differ from text to text."""
    policy = Table([0.9, 0.1], exact=False)
    config = SelfAlignConfig(num_generations=100)
    aligning = SelfAlignTrainer(
        policy, of_text((-0.2, -0.1)), config, accepts=lambda s: torch.zeros(len(s)).bool()
    )
    with pytest.warns(RuntimeWarning, match="nothing is accepted"):
        aligning.train()
    assert not policy.trained
    assert aligning.rounds[-1]["acceptance"] == 0
    assert aligning.stopped.startswith("nothing is accepted: none of 100 samples")


def without_time(rounds):
    return [{k: v for k, v in metrics.items() if k != "seconds"} for metrics in rounds]


def test_c12_the_same_seed_gives_the_same_rounds_and_a_resumed_run_too():
    def run(seed=3):
        return trainer(
            Table([0.9, 0.1], exact=False), rounds=4, scale_rewards="std", seed=seed, beta=2.0
        )

    whole, again, other = run(), run(), run(seed=4)
    assert without_time(whole.train()) == without_time(again.train())
    assert without_time(other.train()) != without_time(whole.rounds)
    for rounds_before in (0, 1, 2):
        begun = run()
        for _ in range(1 + rounds_before):
            begun.step()
        state = copy.deepcopy(begun.state())
        begun.train()  # going on changes nothing of what was saved
        resumed = run()
        resumed.load_state(state)
        assert without_time(resumed.train()) == without_time(whole.rounds)
        assert resumed.stopped == whole.stopped == "all 4 rounds are done"


def test_weights_of_a_round_are_those_of_tilt():
    rewards = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rewards[0] = 40.0
    expected, stats = reward_weights(rewards, beta=0.7, max_weight=20)
    assert stats.fraction_clipped > 0
    ones = torch.ones(300, dtype=torch.float64)
    unit = 0.7 * float(rewards.std(correction=0))
    factor = RewardTilt.exponential(rewards, ones, unit, 20).log_factor(rewards).exp()
    torch.testing.assert_close(factor, expected, atol=1e-9, rtol=1e-9)


def test_standard_deviations_are_the_bases_in_every_round():
    """A unit of its own in each round would make the rounds' steps unequal."""
    table = Table([0.9, 0.1])
    scaled = path(trainer(table, scale_rewards="std", beta=4.0, rounds=4))
    deviation = 0.3
    for rounds, reached in enumerate(scaled, 1):
        odds = 0.1 / 0.9 * math.exp(rounds / (4 * deviation))
        assert reached == pytest.approx(odds / (1 + odds), abs=1e-9)


def test_a_round_that_breaks_a_limit_is_undone():
    class Drifting(Table):
        def fit(self, pool, weights, anchor, seed):
            new = super().fit(pool, weights, anchor, seed)
            new.rounds = getattr(self, "rounds", 0) + 1
            return new

        def general_nll(self):
            return 2.0 * (1 + 0.015 * getattr(self, "rounds", 0))

        def sample(self, n, seed, *, distil_beta=None):
            drawn = super().sample(n, seed, distil_beta=distil_beta)
            drawn.kl = drawn.kl + 0.2 * getattr(self, "rounds", 0)
            return drawn

    worse = trainer(Drifting([0.9, 0.1]))
    worse.train()
    assert [m["kept"] for m in worse.rounds] == [True, True, False]
    assert float(worse.policy.p[-1]) == pytest.approx(C1[1], abs=1e-6)
    assert worse.stopped.startswith("general text suffers: round 2 predicts it 3.0 % worse")
    # What is measured counts, not only what was predicted.
    far = trainer(Drifting([0.9, 0.1]), kl_budget=0.7, worst_nll_increase=1.0)
    far.train()
    assert [m["kept"] for m in far.rounds] == [True, True, False]
    assert far.stopped.startswith("the KL budget is reached: round 2 went 0.808 nats")
    assert not far.step()


def test_a_text_that_was_drawn_twice_is_trained_on_once():
    policy = Table([0.9, 0.1], exact=False)
    aligning = trainer(policy, deduplicate=True, rounds=1)
    aligning.train()
    assert len(policy.trained[0]) == 2
    assert aligning.rounds[0]["duplicate_rate"] == pytest.approx(998 / 1000)


@pytest.mark.parametrize(
    "wrong",
    [
        {"weighting": "softmax"}, {"scale_rewards": "group"}, {"rounds": 0}, {"beta": 0.0},
        {"beta": math.inf}, {"max_weight": 0.5}, {"keep_fraction": 0.0}, {"anchor_fraction": 1.0},
        {"kl_budget": 0.0}, {"num_generations": 1},
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SelfAlignConfig(**wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        trainer(Table([0.5, 0.5]), of_text((0.0, bad))).train()


# A GPT as the policy.

COMMON = ("sun", "moon", "star", "rain", "snow", "wind", "tree", "leaf", "root", "seed", "bird")
RARE = ("king", "crown", "queen")


def sentences(n, seed=0):
    rng = random.Random(seed)
    weights = [6] * len(COMMON) + [1] * len(RARE)
    words = [rng.choices(COMMON + RARE, weights, k=rng.randint(3, 6)) for _ in range(n)]
    return "".join(" ".join(sentence) + ".\n" for sentence in words)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small products do not gain from more, and lose where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def writer():
    """A small GPT that has learnt sentences of fourteen words, three of them rare; and its text."""
    text = sentences(3000)
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode_array(text)
    torch.manual_seed(0)
    model = GPT(vocab_size=tokenizer.vocab_size, block_size=48, n_layer=2, n_head=2, n_embd=48)
    model.tokenizer = tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    order = BatchOrder(len(ids), 48, 32, seed=0)
    for step in range(200):
        windows = torch.from_numpy(gather(ids, order.starts(step), 48))
        _, loss = model(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), ids


def untrained(text="abc d. ", **shape):
    tokenizer = CharTokenizer.from_text(text)
    size = {"block_size": 24, "n_layer": 1, "n_head": 2, "n_embd": 16, **shape}
    torch.manual_seed(3)
    model = GPT(vocab_size=tokenizer.vocab_size, **size)
    model.tokenizer = tokenizer
    with torch.no_grad():
        model.token_weight.mul_(20)  # far from uniform
    return model.eval(), tokenizer.encode_array(text * 60)


SMALL = FitConfig(prompt_tokens=6, max_completion_length=12, rows_at_once=8, epochs=1)


def other_policy(policy):
    """The policy with other weights than its base."""
    moved = copy.copy(policy)
    moved.model = copy.deepcopy(policy.base)
    with torch.no_grad():
        moved.model.token_weight.add_(0.1 * torch.randn_like(moved.model.token_weight))
    return moved


def test_a_gpts_samples_are_what_generate_writes_at_temperature_one():
    model, ids = untrained()
    policy = GPTPolicy(model, ids, ids[:0], SMALL)
    samples = policy.sample(20, seed=9)
    prompts = samples.tokens[:, :6]
    alone = model.generate(prompts, 12, seed=9, eos_token_id=model.tokenizer.end_of_text_id)
    torch.testing.assert_close(samples.tokens[:, : alone.shape[1]], alone)
    text = model.tokenizer.decode(ids.tolist())
    assert all(prompt in text for prompt in samples.prompts)
    assert len(set(samples.prompts)) > 3
    assert samples.temperature == 1
    assert samples.top_k is None
    assert samples.counts.tolist() == [1] * 20


def test_kl_entropy_and_likelihood_along_samples_are_those_of_every_step():
    model, ids = untrained()
    policy = other_policy(GPTPolicy(model, ids, ids[:0], SMALL))
    tokens = policy.sample(5, seed=1).tokens
    end = model.tokenizer.end_of_text_id
    tokens[0, 11:] = tokens[1, 6:] = end  # two texts end before the others, one at once
    samples = policy._described(tokens, tilted=False)
    for row in range(5):
        kl = entropy = nll = 0.0
        count = 0
        for place in range(6, 18):
            before = samples.tokens[row : row + 1, :place]
            p, q = (
                m.next_logits(before).detach().double().log_softmax(-1)[0]
                for m in (policy.model, model)
            )
            kl += float((p.exp() * (p - q)).sum())
            entropy -= float((p.exp() * p).sum())
            nll -= float(q[samples.tokens[row, place]])
            count += 1
            if samples.tokens[row, place] == end:
                break
        assert int(samples.n_tokens[row]) == count
        assert float(samples.kl[row]) == pytest.approx(kl, abs=1e-4)
        assert float(samples.entropy[row]) == pytest.approx(entropy, abs=1e-4)
        assert float(samples.base_nll[row]) == pytest.approx(nll / count, abs=1e-4)
    assert float(samples.kl.min()) > 0.01
    assert samples.n_tokens.tolist() == [6, 1, 12, 12, 12]
    assert GPTPolicy(model, ids, ids[:0], SMALL).sample(5, 2).kl.tolist() == [0] * 5


def test_texts_are_scored_without_the_words_that_their_edges_cut():
    model, ids = untrained("gene the.")
    policy = GPTPolicy(model, ids, ids[:0], SMALL)
    encode, end = model.tokenizer.encode, model.tokenizer.end_of_text_id
    rows = [
        encode("the ge") + encode("ne gene gene"),
        encode("the ge") + encode("ne the gene") + [end],
        encode("the. .") + encode("gene") + [end] * 8,
    ]
    samples = policy._described(torch.tensor(rows), tilted=False)
    assert samples.texts == [" gene ", " the gene", "gene"]
    assert samples.written == ["ne gene gene", "ne the gene", "gene"]
    assert samples.n_tokens.tolist() == [12, 12, 5]
    assert samples.prompts == ["the ge", "the ge", "the. ."]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_round_trains_on_completions_and_a_share_of_original_text(share):
    model, ids = untrained()
    policy = GPTPolicy(model, ids, ids[:0], SMALL)
    samples = policy.sample(60, seed=4)
    examples, n_windows = policy._examples(samples, share, seed=0)
    assert len(examples) == 60 + n_windows
    batch = examples.batch(np.arange(60))
    counted = batch.targets != -100
    assert not counted[:, :5].any()  # of the prompt
    assert counted[:, 5:].sum(1).tolist() == samples.n_tokens.tolist()
    completions = samples.tokens[:, 6:]
    kept = torch.arange(12) < samples.n_tokens[:, None]
    assert (batch.targets[counted] == completions[kept]).all()
    targets = examples.counts
    assert targets[60:].sum() / targets.sum() == pytest.approx(share, abs=0.01)
    if share:
        text = model.tokenizer.decode(ids.tolist())
        windows = examples.batch(np.arange(60, len(examples)))
        for row in windows.tokens.tolist():
            assert model.tokenizer.decode(row) in text


def test_every_round_begins_at_the_base():
    model, ids = untrained()
    before = copy.deepcopy(model.state_dict())
    policy = GPTPolicy(model, ids, ids[:0], SMALL)
    samples = policy.sample(32, seed=4)
    weights = torch.ones(32, dtype=torch.float64)
    once = policy.fit(samples, weights, 0.3, seed=1)
    again = once.fit(samples, weights, 0.3, seed=1)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(once.model.state_dict()[name], again.model.state_dict()[name])
    assert not torch.equal(once.model.token_weight, model.token_weight)
    assert once.base is model


def test_a_sample_and_its_prompt_fit_the_context():
    model, ids = untrained()
    long = GPTPolicy(model, ids, ids, FitConfig(prompt_tokens=100, max_completion_length=500))
    assert (long.prompt_tokens, long.completion_tokens) == (12, 13)
    assert long.sample(3, 0).tokens.shape == (3, 25)
    with pytest.raises(InputError, match="anchor text is too short: 25 tokens"):
        GPTPolicy(model, ids[:25], ids)


def samples_of(*texts, base_nll=1.0, lengths=None):
    n = len(texts)
    lengths = lengths or [max(1, len(text)) for text in texts]
    nothing = torch.zeros(n, dtype=torch.float64)
    return Samples(
        written=list(texts),
        texts=list(texts),
        prompts=[""] * n,
        n_tokens=torch.tensor(lengths),
        counts=nothing + 1,
        kl=nothing,
        entropy=nothing,
        base_nll=nothing + base_nll,
    )


def test_the_reward_is_terms_with_diminishing_return_less_the_penalties():
    reward = AlignmentReward(["gene", "gene therapy", "editing"])
    scored = samples_of(
        "general genes", "Gene gene gene", "Gene therapy and gene editing", "no no no no no"
    )
    assert reward(scored).tolist() == pytest.approx([0, 0.5, 0.875, -2 / 3])
    assert reward.accepts(scored).tolist() == [False, True, True, False]
    dull = AlignmentReward(["gene"], usual_nll=1.2)
    assert dull(samples_of("gene", base_nll=1.5)).tolist() == pytest.approx([0.5 - 0.3])
    assert dull(samples_of("gene", base_nll=1.1)).tolist() == pytest.approx([0.5])
    ending = AlignmentReward(["gene"], longest=80)
    assert ending(samples_of("gene", "gene", lengths=[75, 80])).tolist() == pytest.approx([0, -0.5])


def test_a_third_of_the_terms_judges():
    terms = [f"term {i}" for i in range(10)]
    rewarded, judging = split_terms(terms, seed=1)
    assert (len(rewarded), len(judging)) == (7, 3)
    assert sorted(rewarded + judging) == sorted(terms)
    assert rewarded == [term for term in terms if term in rewarded]
    assert split_terms(terms, seed=1) == (rewarded, judging)
    assert any(split_terms(terms, seed=seed)[1] != judging for seed in range(2, 5))
    assert [len(part) for part in split_terms(["a", "b", "c"])] == [2, 1]
    assert split_terms(["a", "b"]) == (["a", "b"], [])
    assert split_terms(["Gene", "gene ", "b"]) == (["Gene", "b"], [])


def test_terms_that_the_vocabulary_cannot_spell_are_named(writer):
    model, ids = writer
    with pytest.raises(InputError, match="zebra"):
        make_self_alignment(model, ["king", "zebra", "queen"], ids)
    notes = []
    make_self_alignment(model, ["king", "queen"], ids, note=notes.append)
    assert notes == ["with fewer than three terms none is held out to judge by"]


def short(**choices):
    return SelfAlignConfig(**{"num_generations": 64, "rounds": 3, "seed": 5, **choices})


def test_c12_a_gpts_rounds_repeat_and_resume(writer, tmp_path):
    model, ids = writer
    fit = FitConfig(prompt_tokens=8, max_completion_length=24, epochs=1)

    def run():
        config = short(kl_budget=50.0, worst_nll_increase=1.0, rounds=2)
        return make_self_alignment(model, RARE, ids, config, fit)

    torch.manual_seed(0)
    whole = run()
    whole.train()
    assert len(whole.rounds) == 3
    torch.manual_seed(1)
    begun = run()
    begun.step()
    begun.step()
    torch.save(begun.state(), tmp_path / "state.pt")
    resumed = run()
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert without_time(resumed.train()) == without_time(whole.rounds)
    assert torch.equal(resumed.policy.model.token_weight, whole.policy.model.token_weight)
    assert resumed.stopped == whole.stopped


def test_the_decoder_writes_what_the_base_hardly_does_and_the_policy_learns_it(writer):
    """Distilled rounds: unweighted training on samples of the reward-augmented decoder."""
    model, ids = writer
    fit = FitConfig(
        prompt_tokens=8, max_completion_length=24, epochs=4, batch_size=8, learning_rate=2e-3
    )
    config = short(
        num_generations=192, rounds=1, distil_beta=12.0, weighting="identity", kl_budget=50.0,
        worst_nll_increase=1.0,
    )  # fmt: skip
    aligning = make_self_alignment(model, RARE, ids, config, fit)
    written = aligning.policy.sample(192, seed=1, distil_beta=12.0)
    assert written.tilted
    assert float(aligning.reward.accepts(written).double().mean()) > 0.3
    base, aligned = aligning.train()
    assert math.isnan(aligned["kl_predicted"])
    spread = math.hypot(aligned["terms_per_text_se"], base["terms_per_text_se"])
    assert aligned["terms_per_text"] > base["terms_per_text"] + 3 * spread


def test_without_any_original_text_a_round_needs_none(writer):
    model, ids = writer
    policy = GPTPolicy(model, ids, ids[:0], SMALL)
    assert policy.general_nll() is None
    assert policy.usual_nll() == math.inf

    def reward(samples):
        return torch.tensor([text.count("s") for text in samples.texts])

    aligning = SelfAlignTrainer(policy, reward, short(rounds=1, kl_budget=9.0))
    aligning.train()
    assert aligning.rounds[1]["val_loss_change"] is None
    assert aligning.rounds[1]["kept"]


def test_without_original_text_the_base_writes_it(writer):
    model, _ = writer
    fit = FitConfig(prompt_tokens=8, max_completion_length=32, epochs=1)
    config = short(rounds=1)
    aligning = make_self_alignment(model, RARE, None, config, fit)
    assert model.tokenizer.end_of_text_id in aligning.policy.anchor
    aligning.train()
    assert len(aligning.rounds) == 2
    assert aligning.rounds[1]["val_loss"] is not None


DOMAIN = (
    "king", "queen", "crown", "throne", "war", "sword", "blood", "battle", "soldier", "prince",
    "army", "royal", "fight", "enemy", "arms", "duke", "noble", "death",
)  # fmt: skip


@pytest.mark.slow
def test_c10_on_shakespeare_terms_double_and_the_controls_do_not_move(data_folder):
    """Held-out terms, general text and variety stay; a minute of training on one core before."""
    text = (data_folder / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode_array(text)
    order = BatchOrder(int(0.9 * len(ids)), 64, 32, seed=0)
    model = GPT(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=4, n_embd=96)
    model.tokenizer = tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), fused=True)
    steps = 1200
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 50) * (1 - 0.95 * step / steps)
        windows = torch.from_numpy(gather(ids, order.starts(step), 64))
        _, loss = model(windows[:, :-1], windows[:, 1:], return_logits=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def align(rounds, change=None):
        config = SelfAlignConfig(num_generations=512, rounds=rounds, seed=1)
        aligning = make_self_alignment(model, DOMAIN, ids, config, FitConfig(prompt_tokens=8))
        if change is not None:
            aligning.reward = change(aligning.reward)
        aligning.train()
        kept = [metrics for metrics in aligning.rounds if metrics["kept"]]
        return kept[0], kept[-1]

    def moved(base, last, name="term_rate"):
        """In standard errors of the difference."""
        return (last[name] - base[name]) / math.hypot(base[f"{name}_se"], last[f"{name}_se"])

    base, last = align(3)
    assert last["term_rate"] >= 2 * base["term_rate"]
    assert moved(base, last, "heldout_term_rate") > -3
    assert last["val_loss_change"] <= 0.02
    assert last["distinct_2"] >= 0.8 * base["distinct_2"]
    assert last["duplicate_rate"] <= 0.05
    assert last["longest_copied_characters"] < 57  # no sample is a copy
    # The prediction is of an exact fit; a small model comes close to it.
    assert 0.4 * last["kl_predicted"] < last["kl"] < 2 * last["kl_predicted"]

    def shuffled(reward):
        order = torch.Generator().manual_seed(5)
        return lambda samples: reward(samples)[torch.randperm(len(samples), generator=order)]

    base, last = align(2, shuffled)
    assert last["round"] == 2
    assert abs(moved(base, last)) < 3
    with pytest.warns(RuntimeWarning, match="nothing can be learnt"):
        base, last = align(2, lambda reward: lambda samples: torch.zeros(len(samples)))
    assert last["round"] == 0
