"""Rewards of the compiled engine in Python: the objects, and texts that are drawn with them."""

import gc
import importlib
import json
import math
import random
import weakref

import numpy as np
import pytest
import torch
from test_native import small_model
from test_native_sampling import Text, matched

from nanogpt import native
from nanogpt.decoding import Filters, GumbelNoise, window_start
from nanogpt.errors import InputError, UsageError
from nanogpt.rewards import TokenReward, char_reward_fn, combine, ids_reward_fn, term_reward_fn
from nanogpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native engine: {native.why_not()}")

PROSE = (
    "the gene therapy of the general was a gene editing; the café and the naïve gene, therapy! "
    "Genes are edited: a therapy in general.\n"
) * 8
TERMS = ["gene", "gene therapy", "café", "therapy of the", "Editing"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def compiled():
    """The module itself."""
    return importlib.import_module("nanogpt._C")


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "char": CharTokenizer.from_text(PROSE + "E"),
        "byte": ByteTokenizer(),
        "bpe": BPETokenizer.train(iter([PROSE]), 320),
    }


KINDS = ["char", "byte", "bpe"]


@pytest.fixture(scope="module")
def models(tokenizers):
    """A model for each vocabulary, with a context that 40 tokens outgrow."""
    made = {}
    for kind, tokenizer in tokenizers.items():
        made[kind] = small_model(vocab_size=tokenizer.vocab_size)
        made[kind].tokenizer = tokenizer
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_reward_looks_at_the_last_whole_character_of_an_id(tokenizers, kind):
    tokenizer = tokenizers[kind]
    reward = native.char_reward("e y" if kind == "byte" else "eé y", tokenizer)
    last = [raw.decode("utf-8", "ignore")[-1:] for raw in tokenizer.token_bytes]
    whole = [bool(raw) and raw.endswith(c.encode()) for raw, c in zip(
        tokenizer.token_bytes, last, strict=True)]  # fmt: skip
    expected = [float(ok and c in "eé y" and c != "") for ok, c in zip(whole, last, strict=True)]
    assert reward.candidates().tolist() == expected
    assert sum(expected) >= 3
    before = reward.candidates()
    reward.advance(5)
    assert np.array_equal(reward.candidates(), before)
    assert reward.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_reward_is_what_each_id_adds_to_the_texts_worth(tokenizers, kind):
    tokenizer = tokenizers[kind]
    reward, text = native.term_reward(TERMS, tokenizer), Text(TERMS)
    ids = tokenizer.encode("Gene therapy of the café")
    generator = random.Random(kind)
    written: list[bytes] = []
    for token in [*ids, tokenizer.end_of_text_id, *ids[:3]]:
        got, before = reward.candidates(), text.worth(written)
        assert got.dtype == np.float64
        # All of a few ids, and those that the text goes on with in particular.
        for candidate in {*generator.sample(range(tokenizer.vocab_size), 25), *ids}:
            piece = tokenizer.token_bytes[candidate]
            assert got[candidate] == pytest.approx(text.worth([*written, piece]) - before)
        reward.advance(token)
        written.append(tokenizer.token_bytes[token])


@pytest.mark.parametrize("kind", KINDS)
def test_term_rewards_add_up_to_the_distinct_terms(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for start in (0, 9, 40):
        text = PROSE[start : start + 150]
        reward, total = native.term_reward(TERMS, tokenizer), 0.0
        for token in [*tokenizer.encode(text), tokenizer.end_of_text_id]:
            total += reward.candidates()[token]
            reward.advance(token)
        assert total == pytest.approx(len(matched(TERMS, text)))
        assert total >= 2


def replay(make, path):
    reward = make()
    for token in path:
        reward.advance(token)
    return reward.candidates()


def test_a_copy_goes_on_by_itself_from_the_same_place(tokenizers):
    tokenizer = tokenizers["bpe"]

    def make():
        return native.term_reward(TERMS, tokenizer)

    one, path = make(), tokenizer.encode("a gene thera")
    for token in path:
        one.advance(token)
    twin = one.copy()
    assert np.array_equal(one.candidates(), twin.candidates())
    first, second = tokenizer.encode("py of the "), tokenizer.encode(" café gene")
    for token in first:
        one.advance(token)
    for token in second:
        twin.advance(token)
    assert np.array_equal(one.candidates(), replay(make, [*path, *first]))
    assert np.array_equal(twin.candidates(), replay(make, [*path, *second]))
    assert not np.array_equal(one.candidates(), twin.candidates())


def test_a_sum_is_weighted_and_of_copies(compiled, tokenizers):
    tokenizer = tokenizers["byte"]
    terms = native.term_reward(TERMS, tokenizer)
    characters = native.char_reward("e", tokenizer)
    values = compiled.TokenReward(np.linspace(-1, 1, 257))
    total = native.sum_reward([(terms, 2.0), (characters, -0.5), (values, 3.0)])
    for token in b"a gene t":
        expected = 2 * terms.candidates() - 0.5 * characters.candidates()
        expected += 3 * np.linspace(-1, 1, 257)
        np.testing.assert_allclose(total.candidates(), expected, atol=1e-14)
        twin = total.copy()
        total.advance(token)
        terms.advance(token)
    assert not np.array_equal(twin.candidates(), total.candidates())
    untouched = native.term_reward(TERMS, tokenizer)
    native.sum_reward([(untouched, 1.0)]).advance(ord("g"))
    assert np.array_equal(untouched.candidates(), native.term_reward(TERMS, tokenizer).candidates())


def test_values_given_out_are_arrays_of_their_own(tokenizers):
    reward = native.term_reward(TERMS, tokenizers["byte"])
    first = reward.candidates()
    kept = first.copy()
    reward.advance(ord("g"))
    reward.candidates()
    assert np.array_equal(first, kept)
    first[:] = 7.0
    assert not (reward.candidates() == 7.0).any()


def test_a_reward_outlives_its_tokenizer(compiled):
    tokenizer = compiled.Tokenizer.from_json(json.dumps({"kind": "byte"}))
    rewards = [compiled.TermReward(tokenizer, ["gene"])]
    rewards += [rewards[0].copy(), compiled.SumReward([(rewards[0], 1.0)])]
    del tokenizer
    gc.collect()
    np.random.default_rng(0).random(100_000)
    for reward in rewards:
        reward.advance(0xC3)  # half of a character, so that the bytes of ids are read again
        assert reward.candidates()[ord("g")] == pytest.approx(0.2)


def test_one_compiled_tokenizer_is_kept_as_long_as_its_own(tokenizers):
    tokenizer = ByteTokenizer()
    assert native.tokenizer_for(tokenizer) is native.tokenizer_for(tokenizer)
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


BAD = {
    "a character that no token ends with": (
        lambda c, t: native.char_reward("eß", t["char"]), InputError, "the character 'ß'"),
    "no character": (lambda c, t: native.char_reward("", t["char"]), InputError, "no characters"),
    "a term that cannot be written": (
        lambda c, t: native.term_reward(["gene", "Gänse"], t["char"]), InputError, "'Gänse'"),
    "a capital that only others have": (
        lambda c, t: native.term_reward(["GENE", "ÉT"], CharTokenizer("gent")), InputError, "'ÉT'"),
    "an empty term": (lambda c, t: native.term_reward([""], t["byte"]), InputError, "is empty"),
    "no terms": (lambda c, t: native.term_reward([], t["byte"]), InputError, "no terms"),
    "an id outside the vocabulary": (
        lambda c, t: native.char_reward("e", t["byte"]).advance(257), UsageError, "token 257"),
    "a negative id": (
        lambda c, t: native.term_reward(["e"], t["byte"]).advance(-1), UsageError, "token -1"),
    "a sum of nothing": (lambda c, t: native.sum_reward([]), UsageError, "needs a reward"),
    "a weight that is no number": (
        lambda c, t: native.sum_reward([(native.char_reward("e", t["byte"]), math.nan)]),
        UsageError, "finite"),
    "two vocabularies": (
        lambda c, t: native.sum_reward(
            [(native.char_reward("e", t[kind]), 1.0) for kind in ("byte", "char")]),
        UsageError, "different vocabularies"),
    "values that are no numbers": (lambda c, t: c.TokenReward(["a"]), TypeError, "for every id"),
    "values of two dimensions": (
        lambda c, t: c.TokenReward(np.zeros((2, 2))), TypeError, "for every id"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rewards_that_make_no_sense_are_refused(compiled, tokenizers, case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make(compiled, tokenizers)


def test_a_term_may_be_written_in_other_letters(tokenizers):
    """Matching folds case, so "GENE" can be rewarded where only small letters are tokens."""
    tokenizer = CharTokenizer("gen ſ")  # the last one folds to s
    reward = native.term_reward(["GENES"], tokenizer)
    total = 0.0
    for token in [*tokenizer.encode("geneſ"), tokenizer.end_of_text_id]:
        total += reward.candidates()[token]
        reward.advance(token)
    assert total == pytest.approx(1.0)


def written_in_python(model, prompt, new, *, filters, reward, beta, reward_top_k=None, seed=5):
    """Torch's logits, Python's filters and draw, and a tilt written out: ids, and details of each.

    The details are the reward, log Z and KL over the ids that are drawn from, in float64.
    """
    text, details = list(prompt), []
    noise = GumbelNoise(seed, model.config.vocab_size, 1)
    seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
    seen[0, text] = True
    for end in range(len(text), len(text) + new):
        window = torch.tensor([text[window_start(end, model.config.block_size) :]])
        with torch.no_grad():
            kept = filters.apply(model.next_logits(window), seen)[0].clone()
        rewards = torch.from_numpy(reward.candidates())
        if reward_top_k is not None and beta != 0:
            kept[kept.argsort(descending=True, stable=True)[reward_top_k:]] = -math.inf
        p = kept.softmax(-1)
        tilted = kept + beta * rewards
        shifted = tilted + (noise.at(end)[0] if filters.temperature > 0 else 0.0)
        token = int(shifted.argmax())
        log_z = math.log(math.fsum((p * (beta * rewards).exp())[kept > -math.inf].tolist()))
        q = tilted.softmax(-1)
        kl = math.fsum((q * (q / p).log())[q > 0].tolist())
        details.append((float(rewards[token]), log_z, kl))
        reward.advance(token)
        text.append(token)
        seen[0, token] = True
    return text[len(prompt) :], details


CASES = [
    ("char", "characters", 0.7, {}),
    ("char", "characters", -2.0, {"temperature": 0.8, "top_k": 12}),
    ("char", "terms", 5.0, {"top_p": 0.9}),
    ("char", "terms", 3.0, {"temperature": 1.5, "repetition_penalty": 1.3}),
    ("char", "both", 4.0, {"min_p": 0.02}),
    ("byte", "characters", 3.0, {"top_k": 100}),
    ("byte", "terms", 8.0, {"temperature": 1.2, "top_k": 60, "top_p": 0.95, "min_p": 0.001}),
    ("bpe", "characters", 1.0, {"top_p": 0.8}),
    ("bpe", "terms", 6.0, {}),
    ("bpe", "both", -3.0, {"repetition_penalty": 0.8}),
    ("bpe", "values", 2.5, {"top_k": 40}),
]


def reward_for(compiled, what, tokenizer):
    values = np.random.default_rng(2).normal(size=tokenizer.vocab_size)
    made = {
        "characters": lambda: native.char_reward("e ", tokenizer),
        "terms": lambda: native.term_reward(TERMS, tokenizer),
        "both": lambda: native.sum_reward(
            [(native.char_reward("e", tokenizer), 0.5), (native.term_reward(TERMS, tokenizer), 1.0)]
        ),
        "values": lambda: compiled.TokenReward(values),
    }
    return made[what]()


@pytest.mark.parametrize("reward_top_k", [None, 7])
@pytest.mark.parametrize(("kind", "what", "beta", "options"), CASES)
def test_rewarded_texts_equal_a_loop_in_python_beyond_the_context(
    compiled, models, kind, what, beta, options, reward_top_k
):
    model = models[kind]
    prompt = model.tokenizer.encode("the gene")
    filters = Filters(**options)
    reward = reward_for(compiled, what, model.tokenizer)
    ids, details = written_in_python(
        model, prompt, 40, filters=filters, reward=reward.copy(), beta=beta,
        reward_top_k=reward_top_k,
    )  # fmt: skip
    choice = {"reward": reward, "beta": beta, "reward_top_k": reward_top_k, **options}
    engine = native.engine_for(model)
    steps = engine.stream(prompt, 40, seed=5, details=True, **choice)
    ours = [(token, steps.details) for token, _ in steps]
    assert [token for token, _ in ours] == ids
    got, want = np.array([d for _, d in ours]), np.array(details)
    np.testing.assert_allclose(got[:, 0], want[:, 0], atol=1e-9)
    np.testing.assert_allclose(got[:, 1:], want[:, 1:], atol=1e-5)
    assert (got[:, 2] >= -1e-12).all()
    assert engine.generate(prompt, 40, seed=5, **choice)[0] == ids
    # The object that was given has not moved, and the reward made a difference.
    assert np.array_equal(
        reward.candidates(), reward_for(compiled, what, model.tokenizer).candidates()
    )
    assert engine.generate(prompt, 40, seed=5, **options)[0] != ids


@pytest.mark.parametrize("beta", [0.5, 30.0])
def test_greedy_takes_the_likeliest_after_the_tilt(compiled, models, beta):
    model = models["char"]
    reward = native.char_reward("e", model.tokenizer)
    for reward_top_k in (None, 3):
        want, details = written_in_python(
            model, [1, 2], 30, filters=Filters(0.0), reward=reward.copy(), beta=beta,
            reward_top_k=reward_top_k,
        )  # fmt: skip
        steps = native.engine_for(model).stream(
            [1, 2], 30, temperature=0.0, seed=0, reward=reward, beta=beta, details=True,
            reward_top_k=reward_top_k,
        )  # fmt: skip
        got = [(token, steps.details) for token, _ in steps]
        assert [token for token, _ in got] == want
        np.testing.assert_allclose([d for _, d in got], details, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["characters", "terms", "values"])
def test_with_beta_0_the_tokens_are_those_without_a_reward(compiled, models, kind, what):
    """B7, also where reward_top_k would cut."""
    model, engine = models[kind], native.engine_for(models[kind])
    reward = reward_for(compiled, what, model.tokenizer)
    for options in ({}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9}):
        plain = engine.generate([1, 2], 40, seed=3, **options)
        assert engine.generate([1, 2], 40, seed=3, reward=reward, beta=0.0, **options) == plain
        choice = {"reward": reward, "beta": 0.0, "reward_top_k": 2, "details": True}
        steps = engine.stream([1, 2], 40, seed=3, **choice, **options)
        details = []
        assert [token for token, _ in steps if details.append(steps.details) is None] == plain[0]
        assert {(z, kl) for _, z, kl in details} == {(0.0, 0.0)}
        values = reward.candidates()
        if what != "terms":
            assert [r for r, _, _ in details] == [values[token] for token in plain[0]]


def test_values_of_every_id_are_a_reward(models):
    model, engine = models["char"], native.engine_for(models["char"])
    values = np.zeros(model.config.vocab_size)
    values[4] = 2.0
    for given in (values, values.tolist(), torch.from_numpy(values), values.astype("f4")):
        ids, _ = engine.generate([1], 30, seed=1, reward=given, beta=50.0)
        assert set(ids) == {4}
    forbidden = values - np.where(np.arange(len(values)) == 4, np.inf, 0.0)
    assert 4 not in engine.generate([1], 200, seed=1, reward=forbidden, beta=1.0)[0]
    lists = engine.stream([1], 3, seed=1, reward=forbidden, details=True)
    assert all(math.isfinite(number) for _ in lists for number in lists.details)


BAD_STREAMS = {
    "a Python function": (
        {"reward": lambda ids: 1.0}, TypeError, 'functions are for engine="torch"'),
    "a wrong vocabulary": (
        {"reward": np.zeros(5)}, UsageError, "for a vocabulary of 5, the model has"),
    "a matrix": ({"reward": np.zeros((2, 5))}, TypeError, "a number for every id"),
    "a word": ({"reward": "abc"}, TypeError, "a number for every id"),
    "no candidates": ({"reward": "zeros", "reward_top_k": 0}, UsageError, "reward_top_k"),
    "a beta that is no number": ({"reward": "zeros", "beta": math.nan}, UsageError, "beta"),
    "values that are no numbers": (
        {"reward": "nan"}, InputError, "rewards for token 1 of the text"),
    "nothing that may come": ({"reward": "-inf"}, InputError, "nothing is left"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_rewards_that_cannot_be_followed_are_refused(models, case):
    options, error, words = BAD_STREAMS[case]
    options, size = dict(options), models["char"].config.vocab_size
    fills = {"zeros": 0.0, "nan": math.nan, "-inf": -math.inf}
    if isinstance(options["reward"], str) and options["reward"] in fills:
        options["reward"] = np.full(size, fills[options["reward"]])
    with pytest.raises(error, match=words):
        list(native.engine_for(models["char"]).stream([1], 3, seed=1, **options))


def test_details_are_there_where_they_were_asked_for(models):
    engine = native.engine_for(models["char"])
    reward = native.char_reward("e", models["char"].tokenizer)
    steps = engine.stream([1], 2, seed=1, reward=reward, details=True)
    assert steps.details is None
    next(steps)
    first = steps.details
    assert len(first) == 3
    next(steps)
    assert next(steps, None) is None
    assert steps.details != first
    plain = engine.stream([1], 2, seed=1, reward=reward)
    next(plain)
    assert plain.details is None


# The same rewards through the library: generate_reward_augmented, and term_reward_fn's states.


def library_reward(what, tokenizer):
    made = {
        "characters": lambda: char_reward_fn("e ", tokenizer, reward=0.5),
        "terms": lambda: term_reward_fn(TERMS, tokenizer),
        "both": lambda: combine(
            [(char_reward_fn("e", tokenizer), -0.5), (term_reward_fn(TERMS, tokenizer), 2.0)]
        ),
        "one and nothing": lambda: combine(
            [(char_reward_fn("e", tokenizer, reward=-math.inf), 0.0), (term_reward_fn(
                TERMS, tokenizer), 1.0)]
        ),
    }  # fmt: skip
    return made[what]()


LIBRARY_CASES = [
    ("char", "characters", 3.0, {}),
    ("char", "terms", 20.0, {"temperature": 0.8, "top_k": 20}),
    ("char", "both", -2.0, {"repetition_penalty": 1.2}),
    ("char", "terms", 30.0, {"temperature": 0.0}),
    ("byte", "terms", 9.0, {"top_p": 0.95}),
    ("byte", "both", 4.0, {"min_p": 0.001, "reward_top_k": 50}),
    ("bpe", "characters", 2.0, {"top_p": 0.9, "reward_top_k": 5}),
    ("bpe", "terms", 8.0, {"first_row": 9}),
    ("bpe", "one and nothing", 8.0, {}),
    ("bpe", "terms", 0.0, {"reward_top_k": 3}),
]


@pytest.mark.parametrize(("kind", "what", "beta", "options"), LIBRARY_CASES)
def test_rewarded_texts_and_their_details_are_those_of_torch(models, kind, what, beta, options):
    model = models[kind]
    reward = library_reward(what, model.tokenizer)
    prompt = model.tokenizer.encode("the gene")
    prompts = torch.tensor([prompt, prompt[::-1]])
    ours, theirs = (
        model.generate_reward_augmented(
            prompts, 40, reward, beta, seed=6, engine=engine, return_details=True, **options
        )
        for engine in ("native", "torch")
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.sequences.shape[1] == prompts.shape[1] + 40
    torch.testing.assert_close(ours.rewards, theirs.rewards, rtol=0, atol=1e-9)
    exact = {"rtol": 0, "atol": 1e-6 * max(1.0, abs(beta))}  # logits of float32 differ by 1e-6
    torch.testing.assert_close(ours.kl, theirs.kl, **exact)
    torch.testing.assert_close(ours.log_normalisers, theirs.log_normalisers, **exact)
    torch.testing.assert_close(ours.log_z, theirs.log_z, rtol=0, atol=40 * exact["atol"])
    torch.testing.assert_close(
        ours.token_probabilities, theirs.token_probabilities, rtol=0, atol=1e-6
    )
    for name in ("lengths", "ess", "resamplings", "particles", "weights"):
        ours_too, theirs_too = getattr(ours, name), getattr(theirs, name)
        assert ours_too.dtype == theirs_too.dtype
        assert torch.equal(ours_too, theirs_too), name
    plain = model.generate_reward_augmented(
        prompts, 40, reward, beta, seed=6, engine="auto", **options
    )
    assert torch.equal(plain, ours.sequences)
    unmoved = {k: v for k, v in options.items() if k != "reward_top_k"}
    free = model.generate(prompts, 40, seed=6, **unmoved)
    assert torch.equal(free, ours.sequences) is (beta == 0)


def test_rewarded_rows_end_as_those_of_torch(models):
    model = models["char"]
    reward = term_reward_fn(TERMS, model.tokenizer)
    prompts = torch.tensor([[1], [5], [9], [3]])
    free = model.generate_reward_augmented(prompts, 40, reward, 6.0, seed=2)
    end, stop = int(free[1, 9]), model.tokenizer.decode(free[0, 12:14].tolist())
    for options in ({"eos_token_id": end}, {"stop": stop}):
        ours, theirs = (
            model.generate_reward_augmented(
                prompts, 40, reward, 6.0, seed=2, engine=engine, return_details=True, **options
            )
            for engine in ("native", "torch")
        )
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(ours.lengths, theirs.lengths)
        assert (ours.lengths < 40).any()
        torch.testing.assert_close(ours.rewards, theirs.rewards, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.kl, theirs.kl, rtol=0, atol=1e-5)


def test_the_native_engine_says_which_rewards_it_has(models):
    model = models["char"]
    tokens = torch.tensor([[1]])
    terms = term_reward_fn(["gene"], model.tokenizer)

    def last_token_is_5(ids: torch.Tensor) -> torch.Tensor:
        return (ids[:, -1] == 5).float()

    with pytest.raises(RuntimeError, match="'last_token_is_5' is another"):
        model.generate_reward_augmented(tokens, 5, last_token_is_5, 1.0, engine="native")
    with pytest.raises(RuntimeError, match="is another"):
        model.generate_reward_augmented(
            tokens, 5, combine([(terms, 1.0), (ids_reward_fn(last_token_is_5), 1.0)]), 1.0,
            engine="native",
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="num_particles > 1"):
        model.generate_reward_augmented(
            tokens, 5, terms, 1.0, engine="native", num_particles=2, seed=1
        )
    # "auto" takes torch for those.
    model.generate_reward_augmented(tokens, 5, last_token_is_5, 1.0, engine="auto", seed=1)


def test_a_forbidden_token_never_comes_and_nothing_left_is_said(models):
    model = models["char"]
    size = model.config.vocab_size
    forbidding = TokenReward({4: -math.inf})
    native_text, torch_text = (
        model.generate_reward_augmented(
            torch.tensor([[1]]), 60, forbidding, 1.0, seed=1, engine=engine
        )
        for engine in ("native", "torch")
    )
    assert torch.equal(native_text, torch_text)
    assert not (native_text[0, 1:] == 4).any()
    nothing = TokenReward(dict.fromkeys(range(size), -math.inf), name="nothing")
    for engine in ("native", "torch"):
        with pytest.raises(ValueError, match="reward 'nothing'"):
            model.generate_reward_augmented(
                torch.tensor([[1]]), 5, nothing, 1.0, engine=engine, seed=1
            )


def test_term_states_are_compiled_where_they_can_be(tokenizers, monkeypatch):
    """The rewards of both states are the same, and the compiled one is made once."""
    tokenizer = tokenizers["bpe"]
    reward = term_reward_fn(TERMS, tokenizer)
    made, prompt = [], torch.zeros(3, 1, dtype=torch.int64)
    monkeypatch.setattr(
        native, "term_reward", lambda *a, make=native.term_reward: made.append(a) or make(*a)
    )
    state = reward.begin(prompt)
    again = reward.begin(prompt)
    assert len(made) == 1
    monkeypatch.setattr(native, "available", lambda: False)
    plain = term_reward_fn(TERMS, tokenizer).begin(prompt)
    assert type(plain.rows[0]) is not type(state.rows[0])
    texts = (" gene therapy of the café", "a therapy of the gene; edits", "the naïve general gene")
    ids = torch.tensor([tokenizer.encode(text * 2)[:8] for text in texts])
    untouched = again.candidates().clone()
    for step in range(8):
        torch.testing.assert_close(state.candidates(), plain.candidates(), rtol=0, atol=1e-12)
        if step == 4:
            for one in (state, plain):
                one.select(torch.tensor([2, 2, 0]))
            ids = ids[[2, 2, 0]]
        for one in (state, plain):
            one.advance(ids[:, step])
    assert torch.equal(again.candidates(), untouched)
    assert len(made) == 1
