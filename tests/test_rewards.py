"""Rewards of tokens, terms and texts; the slow reference of terms is that of the native engine."""

import math
import pickle
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_native_sampling as native_sampling
import torch

from nanogpt.errors import InputError
from nanogpt.rewards import (
    IdsReward,
    Reward,
    TermReward,
    TokenReward,
    UnwritableError,
    as_reward,
    char_reward_fn,
    combine,
    ids_reward_fn,
    term_reward_fn,
    text_reward_fn,
)
from nanogpt.text_rewards import (
    domain_term_reward,
    repetition_penalty_reward,
    soft_overlong_punishment,
)
from nanogpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

engine, program = native_sampling.engine, native_sampling.program
LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz .")


@pytest.fixture(autouse=True)
def _terms_in_python(monkeypatch):
    """The compiled engine's rows are tested beside these, in test_native_rewards.py."""
    monkeypatch.setattr("nanogpt.rewards._compiled_term_row", lambda reward: None)


def tokens_of(pieces: list[bytes]) -> Tokenizer:
    """A vocabulary of these pieces."""
    return SimpleNamespace(token_bytes=pieces, vocab_size=len(pieces))


def steps_of(reward: Reward, path: list[int]) -> list[list[float]]:
    """Rewards of all candidates before each token of a path."""
    state = reward.begin(torch.zeros(1, 1, dtype=torch.int64))
    steps = []
    for token in path:
        steps.append(state.candidates()[0].tolist())
        state.advance(torch.tensor([token]))
    return steps


def test_characters_are_rewarded_as_the_last_token_alone():
    reward = char_reward_fn(["g", "e"], LETTERS.stoi, reward=2.0)
    ids = torch.tensor([LETTERS.encode("gab"), LETTERS.encode("abg"), LETTERS.encode("aae")])
    got = reward(ids)
    assert got.tolist() == [0.0, 2.0, 2.0]
    assert got.dtype == torch.float32
    vector = reward.token_rewards(29)
    assert vector.dtype == torch.float64
    assert vector.nonzero()[:, 0].tolist() == sorted(LETTERS.encode("eg"))
    assert torch.equal(vector, char_reward_fn("ge", LETTERS, reward=2.0).token_rewards(29))


@pytest.mark.parametrize("vocabulary", [LETTERS, LETTERS.stoi], ids=["tokenizer", "stoi"])
def test_a_character_that_no_token_writes_is_named(vocabulary):
    with pytest.raises(ValueError, match="ends with the character 'é'") as caught:
        char_reward_fn(["g", "é"], vocabulary)
    assert isinstance(caught.value, InputError)
    assert caught.value.what == "é"
    with pytest.raises(ValueError, match="no characters"):
        char_reward_fn("", vocabulary)


def test_a_token_counts_by_its_last_whole_character():
    pieces = [b"g", b"ag", b"ga", "gé".encode(), b"g\xc3", b"\xa9", b"\xc3\xa9g", b"\xffg", b""]
    vector = char_reward_fn("g", tokens_of(pieces)).token_rewards(9)
    assert vector.tolist() == [1, 1, 0, 0, 0, 0, 1, 1, 0]
    assert (
        char_reward_fn("é", tokens_of(pieces)).token_rewards(9).tolist() == [0] * 3 + [1] + [0] * 5
    )


def test_a_reward_for_a_larger_vocabulary_than_the_models_is_refused():
    with pytest.raises(ValueError, match="made for 29 tokens"):
        char_reward_fn("g", LETTERS).token_rewards(12)
    with pytest.raises(ValueError, match="made for 8 tokens or more"):
        TokenReward({7: 1.0}).token_rewards(3)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite or -inf"):
            TokenReward({0: bad})


@pytest.mark.parametrize("case", native_sampling.CASES)
def test_term_rewards_are_what_each_candidate_adds_to_the_texts_worth(case):
    pieces, terms = native_sampling.CASES[case]
    text = native_sampling.Text(terms)
    reward = term_reward_fn(terms, tokens_of(pieces))
    generator = random.Random(case)
    rewarded = 0
    for _ in range(8):
        path = [generator.randrange(len(pieces)) for _ in range(40)]
        written: list[bytes] = []
        for token, rewards in zip(path, steps_of(reward, path), strict=True):
            before = text.worth(written)
            expected = [text.worth([*written, piece]) - before for piece in pieces]
            assert rewards == pytest.approx(expected, abs=1e-12), written
            rewarded += sum(value != 0 for value in expected)
            written.append(pieces[token])
        assert reward(torch.tensor([path])).item() == pytest.approx(text.worth(written), abs=1e-6)
    assert rewarded > 300


@pytest.mark.parametrize("case", native_sampling.CASES)
def test_term_rewards_equal_the_engines(engine, case):
    pieces, terms = native_sampling.CASES[case]
    generator = random.Random(case)
    for _ in range(6):
        path = [generator.randrange(len(pieces)) for _ in range(60)]
        ask = {"tokens": native_sampling.hexadecimal(pieces), "terms": terms, "path": path}
        expected = engine.ask("rewards", **ask)["steps"]
        got = steps_of(term_reward_fn(terms, tokens_of(pieces)), path)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-12)


def test_term_rewards_of_a_large_vocabulary_equal_the_engines(engine):
    generator = random.Random(5)
    pieces = [bytes([c]) for c in range(256)]
    while len(pieces) < 1500:
        word = "".join(generator.choices("genthrapy", k=generator.randint(1, 5)))
        pieces.append(generator.choice([" ", "", "-", " G"]).encode() + word.encode())
    pieces.append(b"")
    terms = ["gene", "gene therapy", "gene thing", "the gene", "therapy", "gen", "general gene"]
    path = [pieces.index(p) for p in (b" ", b"g", b"e", b"n", b"e", b" ", b"t", b"h", b"e", b"r")]
    path += [generator.randrange(1500) for _ in range(30)]
    ask = {"tokens": native_sampling.hexadecimal(pieces), "terms": terms, "path": path}
    expected = engine.ask("rewards", **ask)["steps"]
    got = steps_of(term_reward_fn(terms, tokens_of(pieces)), path)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)
    assert sum(value != 0 for step in got for value in step) > 1000


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("gene therapy and gene editing. general genes", 3),
        ("gene gene gene gene", 1),
        ("general degeneration", 0),
    ],
)
def test_term_rewards_of_a_text_add_up_to_its_distinct_terms(text, count):
    reward = term_reward_fn(["gene", "Gene Therapy", "editing"], LETTERS)
    path = [*LETTERS.encode(text), LETTERS.end_of_text_id]
    got = sum(step[t] for t, step in zip(path, steps_of(reward, path), strict=True))
    assert got == pytest.approx(count)
    new, lengths = torch.tensor([path, path]), torch.tensor([len(path), 2])
    totals = reward.totals(torch.zeros(2, 3, dtype=torch.int64), new, lengths)
    assert totals[0].item() == pytest.approx(count)
    assert totals[1].item() == pytest.approx(2 / 5 if text.startswith("gene") else 0.0)


def test_only_new_text_counts_for_terms():
    """The prompt ends with half a term, and the text begins with the other half."""
    reward = term_reward_fn(["gene"], LETTERS)
    state = reward.begin(torch.tensor([LETTERS.encode("the ge")]))
    total = 0.0
    for token in LETTERS.encode("ne "):
        total += state.candidates()[0, token].item()
        state.advance(torch.tensor([token]))
    assert total == 0.0


def test_rows_of_a_term_reward_can_be_chosen_and_repeated():
    reward = term_reward_fn(["ab"], LETTERS)
    state = reward.begin(torch.zeros(3, 1, dtype=torch.int64))
    a, b, z = LETTERS.encode("abz")
    state.advance(torch.tensor([z, a, a]))
    state.select(torch.tensor([1, 1, 0]))
    state.advance(torch.tensor([b, z, z]))
    rewards = state.candidates()[:, LETTERS.encode(" ")[0]]
    assert rewards.tolist() == pytest.approx([1 - 2 / 3, 0.0, 0.0])


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (["gene", "café"], "cannot write the term 'café': no token holds the character 'é'"),
        ([], "no terms"),
        (["gene", ""], "one of the terms to reward is empty"),
        (["g" * 1001], "has 1001 characters"),
    ],
)
def test_terms_that_cannot_be_rewarded_are_refused(terms, message):
    with pytest.raises(ValueError, match=message):
        term_reward_fn(terms, LETTERS)


def test_capital_terms_are_written_with_small_letters_and_any_term_with_bytes():
    assert isinstance(term_reward_fn(["GENE"], LETTERS), TermReward)
    assert isinstance(term_reward_fn(["café 火"], ByteTokenizer()), TermReward)


def test_a_term_is_found_across_the_tokens_of_a_trained_vocabulary():
    sentences = ["gene therapy and gene editing in general "] * 50
    tokenizer = BPETokenizer.train(iter(sentences), 300)
    reward = term_reward_fn(["gene", "editing"], tokenizer)
    path = tokenizer.encode("some gene editing. ")
    assert len(path) < len("some gene editing. ")
    assert reward(torch.tensor([path])).item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Gene therapy and gene editing; general genes", 1.0),
        ("gene gene gene gene", 1 / 3),
        ("", 0.0),
        ("GENE-EDITING", 2 / 3),
        ("gene\u0301", 0.0),
    ],
)
def test_c7_domain_terms_are_distinct_whole_words(text, share):
    """Counting substrings gives .8571 and 1.0 for the first two."""
    reward = domain_term_reward(["gene", "gene therapy", "Editing", "EDITING"])
    assert reward(["p"], [text]) == [pytest.approx(share)]
    assert reward(prompts=["gene therapy editing"], completions=[text], other=[1]) == reward(
        None, [text]
    )


def test_domain_terms_are_composed_and_folded_before_they_are_compared():
    reward = domain_term_reward(["Cafe\u0301", "STRASSE"])
    assert reward(None, ["café straße"]) == [1.0]
    assert domain_term_reward(["Gene"], casefold=False)(None, ["gene", "Gene"]) == [0.0, 1.0]


def test_further_occurrences_of_a_term_are_worth_less_and_less():
    reward = domain_term_reward(["a", "b"], distinct=False, cap=3)
    one, two, three, four = reward(None, ["a", "a a", "a a a", "a a a a"])
    whole = 2 * (1 + 1 / 2 + 1 / 3)
    assert [one, two, three] == pytest.approx([1 / whole, 1.5 / whole, 0.5])
    assert four == three
    for bad in ({"cap": 2}, {"cap": 0, "distinct": False}):
        with pytest.raises(ValueError, match="cap"):
            domain_term_reward(["a"], **bad)


def test_c8_the_penalties_have_trls_documented_values():
    penalty = repetition_penalty_reward(ngram_size=2)
    assert penalty(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5], [1]]) == [0.0, -0.75, 0.0]
    overlong = soft_overlong_punishment(100, 20)
    lengths = (0, 80, 90, 100, 101)
    assert overlong(completion_ids=[[1] * n for n in lengths]) == [0.0, 0.0, -0.5, -1.0, -1.0]
    words = repetition_penalty_reward(1, -2.0, unit="words")
    assert words(completions=["the The cat sat", ""]) == [-0.5, 0.0]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: repetition_penalty_reward(0),
        lambda: repetition_penalty_reward(2, 1.0),
        lambda: repetition_penalty_reward(2, unit="letters"),
        lambda: soft_overlong_punishment(10, 11),
        lambda: soft_overlong_punishment(10, 0),
        lambda: domain_term_reward([]),
        lambda: domain_term_reward(["a", ""]),
        lambda: combine([]),
        lambda: combine([(domain_term_reward(["a"]), math.nan)]),
        lambda: repetition_penalty_reward()(completions=["a"]),
        lambda: domain_term_reward(["a"])(completion_ids=[[1]]),
    ],
)
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"must be|needs|no rewards|at least one"):
        bad()


def test_text_rewards_combine_by_weight():
    terms, penalty = domain_term_reward(["a", "b"]), repetition_penalty_reward(2)
    both = combine([(terms, 2.0), (penalty, 0.5)])
    got = both(prompts=["", ""], completions=["a b", "a"], completion_ids=[[1, 2], [5, 5, 5, 5, 5]])
    assert got == pytest.approx([2.0, 1.0 - 0.375])
    assert both.__name__ == "2 domain_term_reward + 0.5 repetition_penalty_reward"
    silent = combine([(lambda completions, **_: [1.0], 1.0)])
    with pytest.raises(ValueError, match=r"'<lambda>'.* gave shape \(1,\) for 2 texts"):
        silent(completions=["a", "b"])


def test_rewards_of_decoding_combine_by_weight():
    chars, terms = char_reward_fn("g", LETTERS), term_reward_fn(["ge"], LETTERS)
    both = combine([(chars, 0.5), (terms, -1.0)])
    assert both.kind == "step"
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    expected = 0.5 * chars.token_rewards(29) - terms.begin(prompt).candidates()[0]
    assert torch.equal(both.begin(prompt).candidates()[0], expected)
    only = combine([(chars, 0.5), (char_reward_fn("e", LETTERS), 2.0)])
    assert only.kind == "last token"
    assert only.token_rewards(29)[LETTERS.encode("ge")].tolist() == [0.5, 2.0]
    forbidden = combine([(char_reward_fn("e", LETTERS, reward=-math.inf), 0.0), (chars, 1.0)])
    assert torch.equal(forbidden.token_rewards(29), chars.token_rewards(29))
    with pytest.raises(ValueError, match="domain_term_reward is not a Reward"):
        combine([(chars, 1.0), (domain_term_reward(["a"]), 1.0)])


def first_id_share(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens == 0).double().mean(1)


def test_rewards_pickle_and_have_names():
    rewards = [
        char_reward_fn("g", LETTERS),
        term_reward_fn(["gene"], LETTERS),
        ids_reward_fn(first_id_share),
        text_reward_fn(domain_term_reward(["gene"]), LETTERS),
        combine([(char_reward_fn("g", LETTERS), 1.0), (term_reward_fn(["gene"], LETTERS), 2.0)]),
    ]
    ids = torch.tensor([LETTERS.encode("the gene g")])
    for reward in rewards:
        again = pickle.loads(pickle.dumps(reward))
        assert torch.equal(again(ids), reward(ids))
        assert again.__name__ == reward.__name__
    for text_reward in (
        domain_term_reward(["gene"]),
        repetition_penalty_reward(2),
        soft_overlong_punishment(5, 2),
        combine([(domain_term_reward(["gene"]), 1.0)]),
    ):
        again = pickle.loads(pickle.dumps(text_reward))
        given = {"completions": ["gene a"], "completion_ids": [[1, 1, 1, 1]]}
        assert again(**given) == text_reward(**given)
        assert again.__name__ == text_reward.__name__


def test_a_function_of_texts_sees_every_candidate_with_its_special_token():
    seen = []

    def reward(prompts, completions, completion_ids, topic):
        seen.append((prompts, completions, completion_ids, topic))
        return [float(len(text)) for text in completions]

    wrapped = text_reward_fn(reward, LETTERS, columns={"topic": ["x", "y"]})
    state = wrapped.begin(torch.tensor([LETTERS.encode("ab"), LETTERS.encode("cd")]))
    end, g = LETTERS.end_of_text_id, LETTERS.encode("g")[0]
    first = state.candidates(torch.tensor([[g, end], [end, g]]))
    assert seen[-1] == (
        ["ab", "ab", "cd", "cd"],
        ["g", "<|endoftext|>", "<|endoftext|>", "g"],
        [[g], [end], [end], [g]],
        ["x", "x", "y", "y"],
    )
    assert first.tolist() == [[1.0, 13.0], [13.0, 1.0]]
    state.advance(torch.tensor([g, end]))
    state.select(torch.tensor([1]))
    second = state.candidates(torch.tensor([[g]]))
    assert seen[-1] == (["cd"], ["<|endoftext|>g"], [[end, g]], ["y"])
    assert second.tolist() == [[1.0]]  # what the step adds to the 13 before
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"it has 2 topic for {rows} rows"):
            wrapped.begin(torch.zeros(rows, 1, dtype=torch.int64))
    twice = wrapped.begin(torch.zeros(4, 1, dtype=torch.int64))  # two particles of each row
    twice.candidates(torch.zeros(4, 1, dtype=torch.int64))
    assert seen[-1][3] == ["x", "x", "y", "y"]


def test_prompts_can_be_given_as_texts():
    def reward(prompts, completions, **_):
        return [float(prompt == "first") for prompt in prompts]

    wrapped = text_reward_fn(reward, LETTERS, prompts=["first", "second"])
    state = wrapped.begin(torch.zeros(2, 3, dtype=torch.int64))
    assert state.candidates(torch.zeros(2, 2, dtype=torch.int64)).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("per_step", [False, True])
def test_a_function_of_ids_gives_differences_of_values_or_rewards_of_steps(per_step):
    reward = ids_reward_fn(lambda ids: (ids == 3).double().sum(1), per_step=per_step)
    prompt = torch.tensor([[1, 1]])
    state = reward.begin(prompt)
    got = []
    for token in (3, 0, 3):
        got.append(state.candidates(torch.tensor([[0, token]]))[0, 1].item())
        state.advance(torch.tensor([token]))
    assert got == ([1, 1, 2] if per_step else [1, 0, 1])
    total = reward.totals(prompt, torch.tensor([[3, 0, 3]]), torch.tensor([3]))
    assert total.item() == sum(got)


def test_totals_of_texts_of_several_lengths_stop_at_each_ones_end():
    for reward in (
        char_reward_fn("b", LETTERS),
        ids_reward_fn(lambda ids: (ids == LETTERS.stoi["b"]).double().sum(1)),
        ids_reward_fn(lambda ids: (ids[:, -1] == LETTERS.stoi["b"]).double(), per_step=True),
    ):
        new = torch.tensor([LETTERS.encode("bbb"), LETTERS.encode("abb"), LETTERS.encode("bbb")])
        lengths = torch.tensor([3, 2, 0])
        totals = reward.totals(torch.zeros(3, 1, dtype=torch.int64), new, lengths)
        assert totals.tolist() == [3.0, 1.0, 0.0]


def test_what_is_no_reward_is_refused_in_words():
    for bad, message in (
        (3.0, "must be a Reward or a function of ids"),
        (None, "must be a Reward"),
        (TokenReward, "is the class TokenReward"),
        (domain_term_reward(["a"]), r"text_reward_fn\(domain_term_reward, tokenizer\)"),
        (lambda completions, **_: [1.0], "text_reward_fn"),
    ):
        with pytest.raises(TypeError, match=message):
            as_reward(bad)
    assert isinstance(as_reward(lambda ids: ids[:, 0]), IdsReward)
    half = SimpleNamespace(candidates=lambda: torch.zeros(3))
    with pytest.raises(TypeError, match="no advance and no select"):
        as_reward(half).begin(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("values", [[1.0], [1.0, None], ["1", "2"], 3.0, [[1.0, 2.0]]])
def test_a_text_reward_that_gives_no_list_of_numbers_is_refused(values):
    wrapped = text_reward_fn(lambda **_: values, LETTERS)
    with pytest.raises(ValueError, match="it gave"):
        wrapped(torch.zeros(2, 3, dtype=torch.int64))


def test_unwritable_things_are_input_errors_with_exit_code_3():
    assert UnwritableError("x", "no x").exit_code == 3
    assert Path(native_sampling.__file__).exists()
