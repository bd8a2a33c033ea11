"""The native sampler, rewards and generator against Python's, number by number.

A small program (csrc/tests/sample_lines.cpp) runs them over its standard input. It is built in
build/native, or taken from $NANOGPT_NATIVE_BUILD, which may be a build with sanitizers.
"""

import codecs
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt.decoding import Filters, GumbelNoise, stream, window_start
from nanogpt.tokenizer import CharTokenizer

ROOT = Path(__file__).parent.parent
SEEDS = [0, 1, 12345, 2**32, 2**32 + 7, 2**63 - 1, 2**63 + 11, 2**64 - 1]


class Engine:
    """The program, running; `ask` sends one request and gives the answer."""

    def __init__(self, program: Path, instruction_set: str = "") -> None:
        environment = dict(os.environ)
        environment.pop("NANOGPT_ISA", None)
        if instruction_set:
            environment["NANOGPT_ISA"] = instruction_set
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def ask(self, op: str, payload: bytes = b"", **request: Any) -> dict[str, Any]:
        line = json.dumps({"op": op, "payload": len(payload), **request}) + "\n"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line.encode() + payload)
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the program ended with {self.process.wait()}"
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait()
        self.process.stdout.close()
        assert code == 0


@pytest.fixture(scope="module")
def program() -> Path:
    name = "nanogpt_sample_lines"
    if built := os.environ.get("NANOGPT_NATIVE_BUILD"):
        return Path(built) / name
    beside = str(Path(sys.executable).parent)
    path = beside + os.pathsep + os.environ.get("PATH", "")
    tools = [shutil.which(tool, path=path) for tool in ("cmake", "ninja", "c++")]
    if None in tools:
        pytest.skip("the native engine is built with cmake, ninja and a C++ compiler")
    folder = ROOT / "build" / "native"
    environment = {**os.environ, "PATH": path}
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja"]
    for command in (configure, ["ninja", "-C", str(folder), name]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / name


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Rows of logits are too short for several threads, which then wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(program: Path) -> Iterator[Engine]:
    running = Engine(program)
    yield running
    running.close()


def draw_natively(
    engine: Engine,
    logits: np.ndarray,
    *,
    filters: Filters | None = None,
    seed: int = 0,
    first_position: int = 0,
    row: int = 0,
    stream: int = 0,
    tilt: np.ndarray | None = None,
    seen: list[int] | None = None,
) -> list[int]:
    """An id for every row of logits (n, V), at successive positions."""
    answer = ask_for_draws(
        engine,
        logits,
        filters=filters,
        seed=seed,
        first_position=first_position,
        row=row,
        stream=stream,
        tilt=tilt,
        seen=seen,
    )
    assert "ids" in answer, answer
    return answer["ids"]


def ask_for_draws(
    engine: Engine,
    logits: np.ndarray,
    *,
    filters: Filters | None = None,
    first_position: int = 0,
    tilt: np.ndarray | None = None,
    seen: list[int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    options.setdefault("seed", 0)
    payload = np.ascontiguousarray(logits, dtype="<f4").tobytes()
    if tilt is not None:
        payload += np.ascontiguousarray(tilt, dtype="<f8").tobytes()
    chosen = vars(filters or Filters())
    return engine.ask(
        "sample",
        payload,
        vocab=logits.shape[1],
        positions=list(range(first_position, first_position + len(logits))),
        filters={name: value for name, value in chosen.items() if value is not None},
        tilted=tilt is not None,
        seen=seen or [],
        **options,
    )


def draw_in_python(
    logits: np.ndarray,
    *,
    filters: Filters | None = None,
    seed: int = 0,
    first_position: int = 0,
    row: int = 0,
    stream: int = 0,
    tilt: np.ndarray | None = None,
    seen: list[int] | None = None,
) -> list[int]:
    filters = filters or Filters()
    vocab = logits.shape[1]
    noise = GumbelNoise(seed, vocab, 1, first_row=row, stream=stream)
    marked = torch.zeros(1, vocab, dtype=torch.bool)
    marked[0, seen or []] = True
    ids = []
    for i, row_logits in enumerate(torch.from_numpy(np.asarray(logits, dtype=np.float32))):
        kept = filters.apply(row_logits[None], marked)
        if tilt is not None:
            kept = kept + torch.from_numpy(tilt[i])
        if filters.temperature > 0:
            kept = kept + noise.at(first_position + i)
        ids.append(int(kept.argmax(-1)))
        marked[0, ids[-1]] = True
    return ids


def hard_logits(generator: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Random logits with ties, and with -inf in some rows; one finite logit at least in each."""
    logits = generator.normal(0, 3, (rows, vocab))
    logits[::2] = np.round(logits[::2] * 2) / 2
    logits[1::3, generator.random(vocab) < 0.4] = -np.inf
    logits[:, generator.integers(vocab)] = 1.0
    return logits.astype(np.float32)


def chi_square(ids: list[int], probabilities: list[float]) -> float:
    expected = np.array(probabilities) * len(ids)
    counts = np.bincount(ids, minlength=len(probabilities))
    return float(((counts - expected) ** 2 / expected).sum())


# Quantiles of chi-square at 0.999: what a right sampler passes 999 times of 1,000.
QUANTILE = {1: 10.83, 3: 16.27, 7: 24.32}


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF, 0xFFFFFFFF],
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_agrees_with_the_published_vectors(engine, counter, key, words):
    """Known answers of Random123 1.14, kat_vectors, philox4x32 with 10 rounds."""
    assert engine.ask("philox", counter=counter, key=key)["words"] == words


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_equals_pythons_at_every_place(engine, seed):
    generator = np.random.default_rng(1)
    places, expected = [], []
    for _ in range(40):
        token, position = int(generator.integers(300)), int(generator.integers(2**32 - 100))
        row, stream = int(generator.integers(2**32 - 1)), int(generator.integers(2**32))
        places.append([token, position, row, stream])
        noise = GumbelNoise(seed, 300, 1, first_row=row, stream=stream).at(position)
        expected.append(noise[0, token].item())
    got = engine.ask("gumbel", seed=seed, at=places)["values"]
    assert got == pytest.approx(expected, rel=1e-14, abs=1e-15)


VOCABULARIES = [1, 2, 3, 5, 63, 64, 65, 96, 128, 257, 1000, 5003]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_draws_equal_pythons_for_every_combination_of_filters(engine, temperature, penalty):
    """Draws, and the least likely id that is kept, which says where the filters cut."""
    vocabularies = itertools.cycle(VOCABULARIES)
    generator = np.random.default_rng(int(temperature * 10 + penalty * 100))
    cuts = 0
    for top_k, top_p, min_p in itertools.product(
        [None, 1, 5, "all but one", "all", "more"],
        [None, 0.05, 0.5, 0.9, 0.999999, 1.0],
        [None, 0.0, 0.05, 1.0],
    ):
        vocab = next(vocabularies)
        k = {"all but one": max(1, vocab - 1), "all": vocab, "more": vocab + 5}.get(top_k, top_k)
        filters = Filters(temperature, k, top_p, min_p, penalty)
        logits = hard_logits(generator, 6, vocab)
        options = {
            "filters": filters,
            "seed": SEEDS[int(generator.integers(len(SEEDS)))],
            "first_position": int(generator.integers(10_000)),
            "row": int(generator.integers(1000)),
            "stream": int(generator.integers(3)),
            "seen": generator.integers(vocab, size=min(vocab, 20)).tolist(),
        }
        expected = draw_in_python(logits, **options)
        assert draw_natively(engine, logits, **options) == expected, (vocab, options)
        if temperature > 0:
            order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")
            tilt = np.empty(logits.shape)
            np.put_along_axis(tilt, order, 1e6 * np.arange(vocab, dtype=float)[None], axis=1)
            expected = draw_in_python(logits, tilt=tilt, **options)
            assert draw_natively(engine, logits, tilt=tilt, **options) == expected, (vocab, options)
            cuts += sum(tilt[i, token] < 1e6 * (vocab - 1) for i, token in enumerate(expected))
    assert temperature == 0 or cuts > 300


@pytest.mark.parametrize(
    "filters",
    [
        Filters(),
        Filters(temperature=0.7),
        Filters(top_k=40),
        Filters(top_k=5000),
        Filters(top_k=50_000),
        Filters(top_p=0.3),
        Filters(top_p=0.95),
        Filters(top_p=0.9999),
        Filters(min_p=0.02),
        Filters(1.2, 2000, 0.9, 0.001, 1.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])
def test_draws_equal_pythons_with_a_large_vocabulary(engine, filters, spread):
    generator = np.random.default_rng(3)
    logits = generator.normal(0, spread, (3, 50_257)).astype(np.float32)
    options = {"filters": filters, "seed": 2**63 + 5, "first_position": 77, "seen": [3, 5, 50_256]}
    expected = draw_in_python(logits, **options)
    assert draw_natively(engine, logits, **options) == expected
    assert len(set(expected)) > 1
    # The cut.
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")
    tilt = np.empty(logits.shape)
    np.put_along_axis(tilt, order, 1e6 * np.arange(50_257, dtype=float)[None], axis=1)
    expected = draw_in_python(logits, tilt=tilt, **options)
    assert draw_natively(engine, logits, tilt=tilt, **options) == expected


def test_top_p_cuts_where_python_does_among_equal_and_thousands_of_logits(engine):
    """Uniform and two-step distributions, whose partial sums are exact or nearly so."""
    for vocab in (4, 10, 64, 1000, 4096, 20_000):
        logits = np.zeros((1, vocab), dtype=np.float32)
        logits[0, vocab // 2 :] = 0.5
        order = np.argsort(-logits, axis=1, kind="stable")
        tilt = np.empty(logits.shape)
        np.put_along_axis(tilt, order, 1e6 * np.arange(vocab, dtype=float)[None], axis=1)
        for p in (0.1, 0.25, 0.3, 0.5, 0.70001, 0.9):
            for rows in (logits, np.zeros_like(logits)):
                filters = Filters(top_p=p)
                expected = draw_in_python(rows, filters=filters, tilt=tilt)
                assert draw_natively(engine, rows, filters=filters, tilt=tilt) == expected


@pytest.mark.parametrize("vocab", [3, 64, 65, 1000])
@pytest.mark.parametrize(
    "filters",
    [Filters(1e30, top_p=0.5), Filters(1e30, top_k=2, top_p=0.3), Filters(1e30, None, 0.3, 1.0)],
    ids=str,
)
def test_logits_that_differ_by_less_than_their_probabilities_are_drawn_from(engine, vocab, filters):
    """Top-p keeps the lower of equally likely ids, which need not be those of larger logits."""
    logits = np.tile(np.arange(vocab, dtype=np.float32), (20, 1))
    expected = draw_in_python(logits, filters=filters, seed=5)
    assert draw_natively(engine, logits, filters=filters, seed=5) == expected


@pytest.mark.parametrize("tilted_ids", [1, 7, None])
@pytest.mark.parametrize("vocab", [5, 96, 3000])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}], ids=str
)
def test_a_tilt_is_added_to_what_the_filters_left(engine, vocab, options, tilted_ids):
    generator = np.random.default_rng(vocab)
    logits = hard_logits(generator, 12, vocab)
    tilt = generator.normal(0, 2, logits.shape)
    if tilted_ids is not None:
        tilt[:, tilted_ids:] = 0.0
    tilt[generator.random(tilt.shape) < 0.1] = -np.inf
    tilt[:, np.argmax(np.isfinite(logits).all(0))] = 0.5
    tilt[np.arange(12), logits.argmax(1)] = 0.25
    filters = Filters(**options)
    expected = draw_in_python(logits, filters=filters, tilt=tilt, seed=9)
    assert draw_natively(engine, logits, filters=filters, tilt=tilt, seed=9) == expected


@pytest.mark.parametrize("vocab", [1, 4, 64, 65, 1000, 50_257])
@pytest.mark.parametrize("kind", ["plain", "ties", "flat", "peaked", "holes", "huge"])
def test_skipping_ids_that_cannot_win_never_changes_a_draw(engine, kind, vocab):
    draws = max(200, min(5000, 5_000_000 // vocab))
    answer = engine.ask("agree", vocab=vocab, kind=kind, draws=draws, seed=vocab + 17)
    assert answer["differences"] == 0


@pytest.mark.parametrize("instruction_set", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_draws_the_same(engine, program, instruction_set):
    other = Engine(program, instruction_set)
    generator = np.random.default_rng(8)
    for vocab in (1, 17, 96, 1029, 50_257):
        logits = hard_logits(generator, 8, vocab)
        tilt = generator.normal(0, 1, logits.shape)
        for filters in (Filters(), Filters(0.8, top_p=0.9), Filters(1.1, 50, min_p=0.01)):
            options = {"filters": filters, "seed": 2**40 + 3, "tilt": tilt}
            expected = draw_natively(engine, logits, **options)
            assert draw_natively(other, logits, **options) == expected
        payload = logits[0].tobytes()
        for temperature in (1.0, 0.6):
            ask = {"payload": payload, "id": vocab // 2, "temperature": temperature}
            assert other.ask("probability", **ask) == engine.ask("probability", **ask)
    other.close()


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, 0.3, -0.4, 1.7]


def test_twenty_thousand_draws_follow_the_exact_distribution(engine):
    ids = draw_natively(engine, np.tile(np.float32(LOGITS), (20_000, 1)), seed=11)
    exact = torch.tensor(LOGITS).double().softmax(0).tolist()
    assert chi_square(ids, exact) < QUANTILE[7]


def test_a_wrong_distribution_fails_the_chi_square_test(engine):
    """The test above can fail: draws from a slightly different temperature do."""
    logits = np.tile(np.float32(LOGITS), (20_000, 1))
    ids = draw_natively(engine, logits, seed=11, filters=Filters(temperature=1.15))
    exact = torch.tensor(LOGITS).double().softmax(0).tolist()
    assert chi_square(ids, exact) > QUANTILE[7]


def test_ties_go_to_the_lowest_id(engine):
    logits = np.float32([[1.0, 3.0, 3.0, 2.0, 3.0]] * 50)
    assert set(draw_natively(engine, logits, filters=Filters(temperature=0.0))) == {1}
    kept = set(draw_natively(engine, logits, filters=Filters(top_k=2)))
    assert kept == {1, 2}


@pytest.mark.parametrize("vocab", [3, 64, 1000])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(engine, value, place, vocab):
    logits = np.zeros((1, vocab), dtype=np.float32)
    logits[0, place] = value
    for filters in (Filters(), Filters(temperature=0.0), Filters(top_k=2, top_p=0.5)):
        answer = ask_for_draws(engine, logits, filters=filters, first_position=41)
        assert answer["code"] == 3
        assert "logits for token 41 of the text are not all numbers" in answer["error"]


@pytest.mark.parametrize("vocab", [3, 1000])
@pytest.mark.parametrize("filters", [Filters(), Filters(0.0), Filters(top_k=2)], ids=str)
def test_rewards_that_are_no_numbers_or_leave_nothing_are_refused(engine, vocab, filters):
    logits = np.zeros((1, vocab), dtype=np.float32)
    for value, sentence in [
        (math.nan, "rewards for token 5 of the text are not all numbers"),
        (math.inf, "rewards for token 5 of the text are not all numbers"),
        (-math.inf, "nothing is left to choose from for token 5"),
    ]:
        tilt = np.full((1, vocab), value)
        answer = ask_for_draws(engine, logits, filters=filters, first_position=5, tilt=tilt)
        assert (answer["code"], sentence in answer["error"]) == (3, True)
    nothing = np.full((1, vocab), -np.inf, dtype=np.float32)
    assert "nothing is left" in ask_for_draws(engine, nothing, filters=filters)["error"]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, not -1"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, not 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, not 0"),
    ],
)
def test_an_option_out_of_range_is_named(engine, filters, message):
    payload = np.zeros(4, dtype="<f4").tobytes()
    ask = {"vocab": 4, "positions": [0], "seed": 0, "filters": filters}
    answer = engine.ask("sample", payload, **ask)
    assert answer["code"] == 2
    assert message in answer["error"]


@pytest.mark.parametrize("vocab", [1, 5, 64, 100, 50_257])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])
def test_the_models_probability_equals_softmax(engine, vocab, temperature):
    logits = np.random.default_rng(2).normal(0, 4, vocab).astype(np.float32)
    logits[vocab // 3] = -np.inf if vocab > 1 else 0.0
    exact = (torch.from_numpy(logits).double() / temperature).softmax(-1)
    for token in {0, vocab // 3, vocab // 2, vocab - 1}:
        ask = {"id": token, "temperature": temperature}
        got = engine.ask("probability", logits.tobytes(), **ask)["value"]
        assert got == pytest.approx(exact[token].item(), rel=1e-12, abs=1e-300)
    refused = engine.ask("probability", logits.tobytes(), id=vocab, temperature=1.0)
    assert refused["code"] == 2


# Rewards: the closed forms.

P = [0.5, 0.3, 0.15, 0.05]
RISING = [0.1, 0.2, 0.3, 0.4]


def draws_with_reward(engine, p, reward, beta, n=20_000, seed=4) -> list[int]:
    logits = np.tile(np.log(p).astype(np.float32), (n, 1))
    tilt = np.tile(beta * np.array(reward, dtype=float), (n, 1))
    return draw_natively(engine, logits, tilt=tilt, seed=seed)


@pytest.mark.parametrize(
    ("beta", "exact"),
    [
        (1.0, [0.460442, 0.276265, 0.138132, 0.125161]),
        (2.0, [0.378945, 0.227367, 0.113683, 0.280005]),
        (5.0, [0.059733, 0.035840, 0.017919, 0.886508]),
    ],
)
def test_a_rewarded_token_gets_its_tilted_probability(engine, beta, exact):
    ids = draws_with_reward(engine, P, [0, 0, 0, 1], beta)
    assert chi_square(ids, exact) < QUANTILE[3]
    assert chi_square(ids, P) > QUANTILE[3]


def test_graded_rewards_tilt_every_probability(engine):
    reward = [1, 0.5, 0.2, 0]
    ids = draws_with_reward(engine, RISING, reward, 1.0)
    assert chi_square(ids, [0.198706, 0.241042, 0.267853, 0.292399]) < QUANTILE[3]
    means = [
        np.mean(np.array(reward)[draws_with_reward(engine, RISING, reward, b)])
        for b in (0, 0.5, 1, 2, 4, 8)
    ]
    exact = [0.26, 0.311807, 0.372798, 0.516520, 0.791009, 0.977329]
    assert means == pytest.approx(exact, abs=4 * 0.4 / math.sqrt(20_000))
    assert means == sorted(means)


@pytest.mark.parametrize("shift", [-3.0, 1e4])
def test_a_constant_added_to_all_rewards_changes_nothing(engine, shift):
    reward = np.array([0.2, 0.9, 0.4, 1.0])
    plain = draws_with_reward(engine, P, reward, 2.0)
    assert draws_with_reward(engine, P, reward + shift, 2.0) == plain


def test_the_inverse_reward_is_a_negative_beta(engine):
    reward = np.array([0.2, 0.9, 0.4, 1.0])
    assert draws_with_reward(engine, P, 1 - reward, 2.0) == draws_with_reward(
        engine, P, reward, -2.0
    )


def test_tilts_add_up(engine):
    reward = np.array([0.2, 0.9, 0.4, 1.0])
    tilted = np.exp(np.log(P) + reward)
    assert draws_with_reward(engine, tilted / tilted.sum(), reward, 2.0) == draws_with_reward(
        engine, P, reward, 3.0
    )


def hexadecimal(pieces: list[bytes]) -> list[str]:
    return [piece.hex() for piece in pieces]


def test_the_character_reward_does_not_fade_with_the_length_of_the_text(engine):
    """p(g) = .05 and beta = 5 give .886508 at lengths 0, 9 and 99; a fraction would be diluted."""
    tokens = hexadecimal([b"a", b"b", b"c", b"g", b""])
    path = [0, 3, 1, 2] * 25
    steps = engine.ask("rewards", tokens=tokens, characters="g", path=path)["steps"]
    for length in (0, 9, 99):
        assert steps[length] == [0, 0, 0, 1, 0]
        ids = draws_with_reward(engine, P, steps[length][:4], 5.0, seed=length)
        assert chi_square(ids, [0.059733, 0.035840, 0.017919, 0.886508]) < QUANTILE[3]


def test_the_character_reward_looks_at_the_last_whole_character(engine):
    pieces = {
        b"g": 1,
        b" dog": 1,
        b"go": 0,
        "é".encode(): 1,
        "ége".encode(): 0,
        b"\xc3": 0,
        b"\xa9": 0,
        b"\x80g": 1,
        b"g\xc3": 0,
        "\ufffd".encode(): 0,
        "aé".encode(): 1,
        b"": 0,
    }
    ask = {"tokens": hexadecimal(list(pieces)), "characters": "ggé", "path": [0]}
    assert engine.ask("rewards", **ask)["steps"] == [list(pieces.values())]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"characters": ""}, "no characters to reward"),
        ({"characters": "gx"}, "no token of the model's vocabulary ends with the character 'x'"),
        ({"characters": "gü"}, "ends with the character 'ü'"),
        ({"terms": []}, "no terms to reward"),
        ({"terms": ["g", ""]}, "one of the terms to reward is empty"),
        ({"terms": ["g" * 1001]}, "has 1001 characters"),
        ({"terms": ["gg", "gex"]}, "the term 'gex' cannot be written with the model's vocabulary"),
        ({"terms": ["Gü"]}, "the term 'Gü' cannot be written"),
    ],
)
def test_rewards_that_cannot_be_given_are_refused(engine, ask, message):
    answer = engine.ask("rewards", tokens=hexadecimal([b"g", b""]), path=[], **ask)
    assert answer["code"] == 3
    assert message in answer["error"]


@pytest.mark.parametrize("seed", range(6))
def test_a_term_is_refused_exactly_where_no_text_of_the_tokens_holds_it(engine, seed):
    """Against every text of up to five tokens, of vocabularies of pieces and halves of characters.

    The terms are so short that a text that holds one and is shorter would hold it too.
    """
    generator = random.Random(seed)
    letters = ["a", "B", "é", "É", " ", "-", "ſ", "s"]
    halves = [b"\xc3", b"\xa9", b"\x89", b"\xa9a", b" \xc3", b"a\xc3", b"\xc5", b"\xbf"]
    answers = []
    for _ in range(25):
        pieces = [
            "".join(generator.choices(letters, k=generator.randint(1, 3))).encode()
            for _ in range(2)
        ] + generator.sample(halves, 3)
        texts = set()
        for length in range(1, 6):
            for path in itertools.product(pieces, repeat=length):
                texts.add(fold(b"".join(path).decode("utf-8", "replace")))
        for _ in range(4):
            term = "".join(generator.choices(letters, k=generator.randint(1, 3)))
            pattern = re.compile(f"(?<!\\w){re.escape(fold(term))}(?!\\w)")
            found = any(pattern.search(text) for text in texts)
            ask = {"tokens": hexadecimal([*pieces, b""]), "terms": [term], "path": []}
            answer = engine.ask("rewards", **ask)
            assert ("steps" in answer) == found, (pieces, term)
            answers.append(found)
    assert 10 < sum(answers) < 90


def fold(text: str) -> str:
    """Case folding of single characters."""
    return "".join(c.casefold() if len(c.casefold()) == 1 else c for c in text)


def test_letters_and_case_are_those_of_python(engine):
    """Exactly those of the Unicode version of the tables; a newer one only adds to them."""
    answer = engine.ask("characters", first=0, end=sys.maxunicode + 1)
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    words = {ord(c) for c in re.findall(r"\w", everything)}
    ours = set(answer["words"])
    assert ours <= words
    folds = [ord(fold(chr(c))) for c in range(sys.maxunicode + 1)]
    different = [c for c in range(sys.maxunicode + 1) if folds[c] != answer["folds"][c]]
    if unicodedata.unidata_version == "14.0.0":
        assert ours == words
        assert different == []
    else:
        assert len(words - ours) < 10_000
        assert len(different) < 100


END = "\ue000"  # stands for a token without bytes; no letter, and in no term


def is_word(character: str) -> bool:
    return re.match(r"\w", character) is not None


class Text:
    """What a text is worth, straight from the rule: no trie, no automaton, no increments."""

    def __init__(self, terms: list[str]) -> None:
        self.terms = sorted({fold(term) for term in terms}, key=lambda term: -len(term))

    def read(self, pieces: list[bytes]) -> str:
        text = ""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for piece in pieces:
            text += decoder.decode(piece, final=not piece)
            text += END if not piece else ""
        return fold(text)

    def scan(self, text: str, start: int) -> tuple[list[str], int | None]:
        """Terms that are certain from `start` on, and where the match under way begins."""
        found, i = [], start
        while i < len(text):
            if i > 0 and is_word(text[i - 1]):
                i += 1
                continue
            if any(term.startswith(text[i:]) for term in self.terms):
                return found, i
            term = self.complete(text, i)
            if term:
                found.append(term)
            i += len(term) or 1
        return found, None

    def complete(self, text: str, i: int) -> str:
        """The longest term at `i` that a character which is no letter follows, or nothing."""
        for term in self.terms:
            end = i + len(term)
            if text.startswith(term, i) and end < len(text) and not is_word(text[end]):
                return term
        return ""

    def under_way(self, text: str, i: int, counted: set[str]) -> float:
        depth = len(text) - i
        longer = [len(t) for t in self.terms if t.startswith(text[i:]) and t not in counted]
        progress = depth / (min(longer) + 1) if longer else 0.0
        term = self.complete(text, i)
        found, left = self.scan(text, i + (len(term) or 1))
        certain = float(len({*found, *([term] if term else [])} - counted))
        if left is not None:
            certain += self.under_way(text, left, counted)
        return max(progress, certain)

    def worth(self, pieces: list[bytes]) -> float:
        text = self.read(pieces)
        found, left = self.scan(text, 0)
        more = 0.0 if left is None else self.under_way(text, left, set(found))
        return len(set(found)) + more


def matched(terms: list[str], text: str) -> set[str]:
    ordered = sorted({fold(term) for term in terms}, key=lambda term: -len(term))
    pattern = "(?<!\\w)(?:" + "|".join(map(re.escape, ordered)) + ")(?!\\w)"
    return set(re.findall(pattern, fold(text)))


CASES: dict[str, tuple[list[bytes], list[str]]] = {
    "letters": ([*(bytes([c]) for c in b"abcAB -."), b""], ["ab", "abc", "b", "a b", "ab c", "-a"]),
    "words in words": (
        [b"a", b"b", b"ab", b"a ", b" a", b" b", b" ab", b" a b", b"b a", b" ", b"  ", b""],
        ["a", "a b", "a b a", "b a b", "ab a b", "b", "ab ab ab"],
    ),
    "nothing but separators": (
        [b".", b"-", b".-", b"a", b" ", b""],
        [".", ".-.", "a.", "-a-", "- -"],
    ),
    "halves of characters": (
        [
            b"\xc3",
            b"\xa9",
            "é".encode(),
            "É".encode(),
            b"a",
            b"\xe2",
            b"\x80",
            b"\x94",
            b"\xa9a",
            b"\x94 \xc3",
            b"a\xc3",
            b" ",
            b"\xff",
            b"",
        ],
        ["é", "éa", "a é", "aé", "a—a", "\ufffd"],
    ),
    "sentences": (
        [
            b"gene",
            b" gene",
            b"Gene",
            b" therapy",
            b" ther",
            b"apy",
            b"s",
            b" and",
            b" general",
            b" editing",
            b";",
            b" ed",
            b"iting",
            b" the",
            b"ne",
            b" ge",
            b"",
            b"l",
        ],
        ["gene", "gene therapy", "editing", "and editing", "therapy gene"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_term_rewards_are_what_each_candidate_adds_to_the_texts_worth(engine, case):
    pieces, terms = CASES[case]
    text = Text(terms)
    generator = random.Random(case)
    rewarded = 0
    for _ in range(12):
        path = [generator.randrange(len(pieces)) for _ in range(40)]
        ask = {"tokens": hexadecimal(pieces), "terms": terms, "path": path}
        steps = engine.ask("rewards", **ask)["steps"]
        written: list[bytes] = []
        for token, rewards in zip(path, steps, strict=True):
            before = text.worth(written)
            expected = [text.worth([*written, piece]) - before for piece in pieces]
            assert rewards == pytest.approx(expected, abs=1e-12), written
            rewarded += sum(value != 0 for value in expected)
            written.append(pieces[token])
    assert rewarded > 500


@pytest.mark.parametrize("seed", range(8))
def test_term_rewards_of_random_terms_add_up_to_the_distinct_terms_matched(engine, seed):
    """The number is that of the regular expression, over texts of a small alphabet."""
    generator = random.Random(seed)
    alphabet = ["a", "b", "B", "é", " ", ".", "_"]
    matches = 0
    for _ in range(40):
        terms = ["".join(generator.choices(alphabet, k=generator.randint(1, 4))) for _ in range(6)]
        pieces = [c.encode() for c in alphabet]
        pieces += ["".join(generator.choices(alphabet, k=3)).encode() for _ in range(12)] + [b""]
        end = len(pieces) - 1
        path = [generator.randrange(end) for _ in range(100)] + [end]
        ask = {"tokens": hexadecimal(pieces), "terms": terms, "path": path}
        steps = engine.ask("rewards", **ask)["steps"]
        total = sum(step[token] for token, step in zip(path, steps, strict=True))
        written = b"".join(pieces[token] for token in path).decode()
        assert total == pytest.approx(len(matched(terms, written)), abs=1e-9)
        matches += round(total)
    assert matches > 40


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Gene therapy and gene editing; general genes", 3),
        ("gene gene gene gene", 1),
        ("general degeneration", 0),
        ("", 0),
        ("GENE THERAPY", 1),
        ("gene-therapy", 1),
    ],
)
def test_a_text_is_worth_its_distinct_terms(engine, text, count):
    tokenizer = CharTokenizer.from_text(text + "gene therapy editing")
    path = [*tokenizer.encode(text), tokenizer.end_of_text_id]
    tokens = hexadecimal(tokenizer.token_bytes)
    ask = {"tokens": tokens, "terms": ["gene", "gene therapy", "editing"], "path": path}
    steps = engine.ask("rewards", **ask)["steps"]
    assert sum(step[t] for t, step in zip(path, steps, strict=True)) == pytest.approx(count)


def test_a_vocabulary_of_words_is_rewarded_as_the_rule_says(engine):
    """2,000 tokens, so that most of them are told apart by their first characters only."""
    generator = random.Random(5)
    pieces = [bytes([c]) for c in range(256)]
    while len(pieces) < 2000:
        word = "".join(generator.choices("genthrapy", k=generator.randint(1, 5)))
        pieces.append(generator.choice([" ", "", "-", " G"]).encode() + word.encode())
    pieces.append(b"")
    terms = ["gene", "gene therapy", "gene thing", "the gene", "therapy", "gen", "general gene"]
    text = Text(terms)
    spelled = [
        b" gene",
        b" ",
        b"th",
        b"er",
        b"apy",
        b" ",
        b"the",
        b" gen",
        b"e",
        b"-",
        b"gen",
        b"e",
    ]
    path = [pieces.index(p) if p in pieces else pieces.index(p[:1]) for p in spelled]
    steps = engine.ask("rewards", tokens=hexadecimal(pieces), terms=terms, path=path)["steps"]
    written: list[bytes] = []
    for token, rewards in zip(path, steps, strict=True):
        before = text.worth(written)
        expected = [text.worth([*written, piece]) - before for piece in pieces]
        assert rewards == pytest.approx(expected, abs=1e-12), written
        written.append(pieces[token])


# The loop of generation.


def hashed_logits(tokens: list[int], vocab: int, scale: float) -> np.ndarray:
    """The same function of a context as in the program."""
    mask, state = 2**64 - 1, 0
    for token in tokens:
        state = ((state ^ (token + 1)) * 0x9E3779B97F4A7C15) & mask
        state ^= state >> 29
    mixed = (np.arange(vocab, dtype=np.uint64) + np.uint64(state)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0x94D049BB133111EB)
    unit = (mixed >> np.uint64(40)).astype(np.float64) / 16777216.0
    return ((unit - 0.5) * scale).astype(np.float32)


def write_in_python(
    prompt: list[int], vocab: int, block: int, new: int, scale: float = 8.0, **options: Any
) -> tuple[list[int], list[float]]:
    def next_logits(window: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(hashed_logits(window[0].tolist(), vocab, scale))[None]

    model = SimpleNamespace(
        config=SimpleNamespace(vocab_size=vocab, block_size=block),
        token_weight=torch.zeros(1),
        calibration_temperature=options.pop("calibration_temperature", None),
        next_logits=next_logits,
    )
    steps: Callable[..., Any] = stream
    out = list(
        steps(model, torch.tensor([prompt]), new, use_cache=False, probabilities=True, **options)
    )
    return [int(s.tokens) for s in out], [float(s.probabilities) for s in out]


@pytest.mark.parametrize("block", [1, 2, 3, 4, 7, 16, 128])
def test_windows_start_where_pythons_do(engine, block):
    starts = engine.ask("window_starts", block=block, until=500)["starts"]
    assert starts == [window_start(length, block) for length in range(1, 501)]


@pytest.mark.parametrize("block", [1, 3, 8, 16])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
@pytest.mark.parametrize(
    "filters",
    [Filters(), Filters(0.0), Filters(0.7, 9, 0.9, 0.01, 1.3), Filters(repetition_penalty=1e6)],
    ids=str,
)
def test_texts_equal_pythons_far_past_the_context(engine, block, length, filters):
    generator = random.Random(length * block)
    prompt = [generator.randrange(29) for _ in range(length)]
    options = {"seed": 2**63 + length, "filters": filters}
    ids, probabilities = write_in_python(
        prompt, 29, block, 60, first_row=3, calibration_temperature=1.7, **options
    )
    answer = engine.ask(
        "generate",
        vocab=29,
        block=block,
        prompt=prompt,
        max_new_tokens=60,
        row=3,
        seed=options["seed"],
        calibration_temperature=1.7,
        probabilities=True,
        filters={k: v for k, v in vars(filters).items() if v is not None},
    )
    assert answer["ids"] == ids
    assert answer["text"] == prompt + ids
    assert answer["probabilities"] == pytest.approx(probabilities, rel=1e-12)


def generate(engine: Engine, **changes: Any) -> dict[str, Any]:
    ask = {"vocab": 29, "block": 16, "prompt": [1, 2, 3], "max_new_tokens": 80, "seed": 5}
    return engine.ask("generate", **{**ask, **changes})


def test_seeds_and_rows_give_texts_of_their_own(engine):
    texts = {tuple(generate(engine, seed=seed, row=row)["ids"]) for seed in SEEDS for row in (0, 1)}
    assert len(texts) == 2 * len(SEEDS)
    assert generate(engine)["ids"] == generate(engine)["ids"]
    assert generate(engine)["probabilities"] == [0.0] * 80


def test_an_end_token_ends_the_text_and_is_not_given_out(engine):
    free = generate(engine)["ids"]
    for end in set(free):
        answer = generate(engine, eos=end)
        assert answer["ids"] == free[: free.index(end)]
        assert answer["text"] == [1, 2, 3, *answer["ids"]]
    missing = next(token for token in range(29) if token not in free)
    assert generate(engine, eos=missing)["ids"] == free


def test_a_text_can_be_empty(engine):
    assert generate(engine, max_new_tokens=0)["ids"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "a prompt holds at least one token"),
        ({"prompt": [29]}, "token 29 is outside the vocabulary of 29"),
        ({"prompt": [-1]}, "token -1 is outside"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, not -1"),
        ({"max_new_tokens": 2**32}, "a text of more than 4294967295 tokens"),
        ({"max_new_tokens": 2**63 - 1}, "a text of more than 4294967295 tokens"),
        ({"eos": 29}, "the end token 29 is outside the vocabulary of 29"),
        ({"calibration_temperature": 0.0}, "calibration temperature must be above 0"),
        ({"filters": {"top_k": 0}}, "top_k"),
    ],
)
def test_an_impossible_text_is_refused(engine, changes, message):
    answer = generate(engine, **changes)
    assert answer["code"] == 2
    assert message in answer["error"]


PIECES = hexadecimal([*(bytes([c]) for c in range(ord("a"), ord("a") + 27)), b" ", b""])


@pytest.mark.parametrize("reward", [{"characters": "eg"}, {"terms": ["ab", "cd e"]}], ids=str)
def test_without_beta_a_reward_changes_nothing(engine, reward):
    assert generate(engine, tokens=PIECES, beta=0.0, **reward)["ids"] == generate(engine)["ids"]


@pytest.mark.parametrize("beta", [-2.0, 0.7, 4.0])
def test_rewarded_texts_equal_a_loop_in_python(engine, beta):
    """Reward 1 for e and g, written out with nothing but the draw; the context is outgrown."""
    text, reward = [1, 2, 3], torch.zeros(29, dtype=torch.float64)
    reward[[4, 6]] = 1.0
    noise = GumbelNoise(5, 29, 1)
    for end in range(3, 83):
        logits = torch.from_numpy(hashed_logits(text[window_start(end, 16) :], 29, 8.0))
        kept = Filters(0.8, top_k=12).apply(logits[None])
        text.append(int((kept + beta * reward + noise.at(end)).argmax()))
    answer = generate(
        engine, tokens=PIECES, characters="eg", beta=beta, filters={"temperature": 0.8, "top_k": 12}
    )
    assert answer["text"] == text
    share = sum(token in (4, 6) for token in answer["ids"]) / 80
    assert share < 0.05 if beta < 0 else share > 0.1


def test_term_rewards_steer_a_text_to_its_terms(engine):
    """Flat logits find hardly a word; with beta every term comes, and no term over and over."""
    terms = ["gene", "gene therapy", "editing"]
    ask = {"tokens": PIECES, "terms": terms, "scale": 0.1, "max_new_tokens": 400}
    pieces = [bytes.fromhex(piece) for piece in PIECES]

    def found(beta: float) -> tuple[set[str], str]:
        ids = generate(engine, beta=beta, **ask)["ids"]
        text = b"".join(pieces[token] or b"\n" for token in ids).decode()
        return matched(terms, text), text

    assert found(0.0)[0] == set()
    all_found, text = found(40.0)
    assert all_found == set(terms)
    assert text.count("editing") < 5
