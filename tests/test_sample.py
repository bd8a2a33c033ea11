"""The sampling command: what it writes, how it stops, what it refuses."""

import json
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from native_programs import native_program
from test_native import small_model

from nanogpt import GPT, checkpoint, confidence, load, native
from nanogpt.config import SampleConfig
from nanogpt.export import export_model
from nanogpt.rewards import char_reward_fn, combine, term_reward_fn
from nanogpt.sample import Drawn, Piece, Text
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer


@pytest.fixture
def model_path(tmp_path):
    """A small random character model."""
    torch.manual_seed(3)
    model = GPT(vocab_size=28, block_size=16, n_layer=1, n_head=2, n_embd=16)
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(20)
    model.tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxy\n ")
    checkpoint.save(model, tmp_path / "gpt.pth")
    return tmp_path / "gpt.pth"


@pytest.fixture
def sample(nanogpt, model_path):
    def run(*arguments):
        return nanogpt("sample", "--model", model_path, *arguments)

    return run


def test_it_writes_the_prompt_and_what_the_library_generates(sample, model_path):
    outcome = sample("--prompt", "abc", "--max-new-tokens", 40, "--seed", 5)
    model, tokenizer = load(model_path)
    tokens = model.generate(torch.tensor([tokenizer.encode("abc")]), 40, seed=5)
    assert outcome.out == tokenizer.decode(tokens[0].tolist()) + "\n"


def test_json_holds_texts_tokens_and_probabilities(sample, model_path):
    outcome = sample("--prompt", "abc", "--max-new-tokens", 9, "--seed", 5, "--json",
                     "--num-samples", 3)  # fmt: skip
    result = json.loads(outcome.out)
    model, tokenizer = load(model_path)
    assert len(result["samples"]) == 3
    assert len({s["text"] for s in result["samples"]}) == 3
    for row, entry in enumerate(result["samples"]):
        details = model.generate(
            torch.tensor([tokenizer.encode("abc")]), 9, seed=5, first_row=row, return_details=True
        )
        assert entry["tokens"] == details.sequences[0, 3:].tolist()
        assert entry["token_probs"] == pytest.approx(details.token_probabilities[0].tolist())
        assert entry["text"] == tokenizer.decode(entry["tokens"])


def test_several_samples_are_the_rows_of_one_batch(sample, model_path):
    outcome = sample("--prompt", "q", "--max-new-tokens", 20, "--seed", 1, "--num-samples", 2)
    model, tokenizer = load(model_path)
    batch = model.generate(torch.tensor([tokenizer.encode("q")] * 2), 20, seed=1)
    for row in batch.tolist():
        assert tokenizer.decode(row) in outcome.out


def test_an_empty_prompt_starts_a_new_document(sample, model_path):
    model, tokenizer = load(model_path)
    start = torch.tensor([[tokenizer.end_of_text_id]])
    want = tokenizer.decode(model.generate(start, 12, temperature=0.0)[0].tolist())
    assert sample("--max-new-tokens", 12, "--temperature", 0).out == want + "\n"


def test_a_stop_text_is_left_out(sample):
    free = sample("--prompt", "a", "--max-new-tokens", 60, "--seed", 2).out[1:]
    stop = free[30:32]
    outcome = sample("--prompt", "a", "--max-new-tokens", 60, "--seed", 2, "--stop", stop)
    assert outcome.out == "a" + free[: free.index(stop)] + "\n"


def test_a_prompt_can_come_from_a_file_or_standard_input(sample, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("hello")
    options = ("--max-new-tokens", 5, "--seed", 4)
    want = sample("--prompt", "hello", *options).out
    assert sample("--file", tmp_path / "prompt.txt", *options).out == want


def test_a_character_of_several_bytes_is_never_split(tmp_path):
    """A byte model that has learnt nothing writes broken UTF-8; what is printed is whole."""
    model = GPT(vocab_size=257, block_size=16, n_layer=1, n_head=1, n_embd=8)
    model.tokenizer = ByteTokenizer()
    checkpoint.save(model, tmp_path / "bytes.pth")
    command = [sys.executable, "-m", "nanogpt.sample", "--model", tmp_path / "bytes.pth"]
    done = subprocess.run(
        [*map(str, command), "--prompt", "é", "--max-new-tokens", "300", "--seed", "1"],
        capture_output=True, check=True,
    )  # fmt: skip
    text = done.stdout.decode("utf-8")  # strict: whatever came out is whole
    assert text.startswith("é")
    assert "�" in text


BAD = {
    "an unknown character": (["--prompt", "abc§"], 3, "'§'"),
    "a missing model": (["--model", "nowhere.pth"], 3, "there is no model file"),
    "a negative temperature": (["--temperature", "-1"], 2, "--temperature must be at least 0"),
    "a missing prompt file": (["--file", "nowhere.txt"], 3, "nowhere.txt"),
    "two prompts": (["--prompt", "a", "--file", "b"], 2, "exclude each other"),
    "an engine that does not exist": (["--engine", "jax"], 2, "native"),
    "a device that is not here": (["--device", "cuda:7"], 2, "CUDA"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_its_code_and_one_sentence(sample, case):
    arguments, code, message = BAD[case]
    outcome = sample(*arguments)
    assert outcome.code == code
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_a_damaged_model_is_refused(sample, model_path):
    raw = bytearray(model_path.read_bytes())
    raw[len(raw) // 2] ^= 255
    model_path.write_bytes(raw)
    outcome = sample("--prompt", "a")
    assert outcome.code == 3
    assert "damaged" in outcome.err


def chat(model_path, lines, *arguments):
    command = [sys.executable, "-m", "nanogpt.sample", "--model", str(model_path), "--chat"]
    return subprocess.run(
        [*command, "--max-new-tokens", "20", "--seed", "1", *map(str, arguments)],
        input="".join(line + "\n" for line in lines), capture_output=True, text=True,
    )  # fmt: skip


def test_chat_continues_its_history(model_path):
    done = chat(model_path, ["abc", "def"], "--stop", "zzz", "--temperature", 0)
    model, tokenizer = load(model_path)
    text = ""
    for line in ("abc", "def"):
        text += line + "\n"
        ids = tokenizer.encode(text)
        out = model.generate(torch.tensor([ids]), 20, temperature=0.0)[0, len(ids) :].tolist()
        answer = tokenizer.decode(out)
        assert answer in done.stdout
        text += answer + ("" if answer.endswith("\n") else "\n")
    assert done.returncode == 0


def test_chat_goes_on_after_an_unknown_character(model_path):
    done = chat(model_path, ["§", "abc", "/exit", "never read"], "--stop", "zzzz")
    assert done.returncode == 0
    assert "'§'" in done.stderr
    assert done.stdout.strip()


def test_chat_survives_an_interrupt_in_the_middle_of_an_answer(model_path):
    import os
    import pty
    import select
    import signal

    parent, child = pty.openpty()
    command = [sys.executable, "-m", "nanogpt.sample", "--model", str(model_path), "--chat"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "1000000", "--stop", "zzzz"],
        stdin=child, stdout=child, stderr=child, close_fds=True,
        # Whoever runs the tests in the background may have told them to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(child)

    seen = ""

    def read_until(mark: str) -> None:
        """Wait for `mark` after everything that earlier calls waited for."""
        nonlocal seen
        deadline = time.monotonic() + 60
        while mark not in seen:
            assert time.monotonic() < deadline, f"no {mark!r} in {seen[-500:]!r}"
            if select.select([parent], [], [], 1.0)[0]:
                seen += os.read(parent, 4096).decode("utf-8", "replace")
        seen = seen.split(mark, 1)[1]

    read_until("> ")
    os.write(parent, b"abc\n")
    read_until("abc\r\n")
    while len(seen) < 200:  # well into the answer
        seen += os.read(parent, 4096).decode("utf-8", "replace")
    process.send_signal(signal.SIGINT)
    read_until("(interrupted)")
    read_until("> ")
    os.write(parent, b"/exit\n")
    assert process.wait(30) == 0
    os.close(parent)


# Rewards and confidence.


@pytest.fixture
def varied_path(tmp_path):
    """A random model whose texts are neither all alike nor noise, as an export too."""
    model = small_model()
    model.calibration_temperature = 1.5
    checkpoint.save(model, tmp_path / "varied.pth")
    return tmp_path / "varied.pth"


@pytest.fixture
def varied(nanogpt, varied_path):
    def run(*arguments):
        common = ("--model", varied_path, "--prompt", "abc", "--max-new-tokens", 40, "--seed", 4)
        return nanogpt("sample", *common, *arguments)

    return run


@pytest.fixture(params=["native", "torch"])
def engine(request):
    if request.param == "native" and not native.available():
        pytest.skip(f"native engine: {native.why_not()}")
    return request.param


def only_sample(outcome):
    assert outcome.code == 0, outcome.err
    (entry,) = json.loads(outcome.out)["samples"]
    return entry


def test_confidence_is_a_table_on_standard_error_where_there_is_no_terminal(varied, engine):
    plain = varied("--engine", engine)
    shown = varied("--engine", engine, "--confidence")
    assert plain.err == ""
    assert shown.out == plain.out
    result = only_sample(varied("--engine", engine, "--json"))
    lines = shown.err.splitlines()
    assert lines[0] == "probability  token"
    rows = [line.split(maxsplit=1) for line in lines[1:41]]
    assert [float(p) for p, _ in rows] == pytest.approx(result["token_probs"], abs=1e-6)
    letters = "".join(token.strip('"') for _, token in rows)
    assert letters.replace("\\n", "\n").replace("<|endoftext|>", "") == result["text"]
    mean = sum(math.log(p) for p in result["token_probs"]) / 40
    assert lines[41].startswith(f"mean log-probability {mean:.4g} over 40 tokens")
    assert lines[41].endswith("calibrated at temperature 1.5")
    assert len(lines) == 42


def test_probabilities_are_at_the_calibration_temperature(varied, varied_path, engine):
    result = only_sample(varied("--engine", engine, "--json"))
    model, tokenizer = load(varied_path)
    text = tokenizer.encode("abc") + result["tokens"]
    with torch.inference_mode():
        logits = model(torch.tensor([text[:16]]))[0][0].double()
    for cold, agrees in ((1.5, True), (1.0, False)):
        p = (logits / cold).softmax(-1)
        ours = [float(p[2 + i, text[3 + i]]) for i in range(12)]
        assert (ours == pytest.approx(result["token_probs"][:12], abs=1e-5)) is agrees


def test_colours_are_of_each_token_and_leave_the_text_as_it_is(
    varied, varied_path, engine, monkeypatch
):
    plain = varied("--engine", engine)
    result = only_sample(varied("--engine", engine, "--json"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = varied("--engine", engine, "--confidence")
    assert re.sub("\x1b\\[[0-9;]*m", "", shown.out) == plain.out
    _, tokenizer = load(varied_path)
    letters = [tokenizer.decode([token]) for token in result["tokens"]]
    pairs = zip(letters, result["token_probs"], strict=True)
    assert shown.out == f"abc{''.join(confidence.coloured(c, p) for c, p in pairs)}\n"
    assert len(set(re.findall("38;5;([0-9]+)m", shown.out))) >= 3
    assert "probability  token" not in shown.err
    assert shown.err.count("\n") == 1
    monkeypatch.setenv("NO_COLOR", "1")
    assert varied("--engine", engine, "--confidence").out == plain.out


def test_a_terminal_shows_colours_without_being_asked(varied_path):
    import pty

    parent, child = pty.openpty()
    command = [sys.executable, "-m", "nanogpt.sample", "--model", str(varied_path), "--confidence"]
    forcing = {"NO_COLOR", "FORCE_COLOR", "TERM"}
    environment = {k: v for k, v in os.environ.items() if k not in forcing} | {"TERM": "xterm"}
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "20", "--seed", "4"],
        stdout=child, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    os.close(child)
    shown = b""
    while True:
        try:
            chunk = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    _, errors = process.communicate(timeout=60)
    os.close(parent)
    assert process.returncode == 0, errors
    assert b"\x1b[38;5;" in shown
    assert b"probability  token" not in errors
    assert b"mean log-probability" in errors


def pieces_of(raw: bytes, probabilities, **settings):
    """The pieces of a text of bytes with these probabilities, and the text."""
    steps = [Drawn(byte, p) for byte, p in zip(raw, probabilities, strict=True)]
    writer = SimpleNamespace(
        tokenizer=ByteTokenizer(),
        config=SampleConfig(confidence=True, **settings),
        draw=lambda ids, row: iter(steps),
    )
    text = Text(writer, [0], 0)
    return list(text), text


def test_a_character_of_several_tokens_has_the_least_of_their_probabilities():
    pieces, _ = pieces_of("aé€!".encode(), [0.9, 0.3, 0.8, 0.7, 0.5, 0.6, 1.0])
    assert pieces == [
        Piece("a", 0.9, False),
        Piece("é", 0.3, False),
        Piece("€", 0.5, False),
        Piece("!", 1.0, False),
    ]


def test_a_character_is_marked_where_one_of_its_tokens_is_low():
    pieces, text = pieces_of(
        "aé!".encode(), [0.9, 0.1, 0.9, 0.9], min_confidence=0.2, low_confidence="mark"
    )
    assert [piece.low for piece in pieces] == [False, True, False]
    assert text.low == [1]
    assert text.refused is None


def test_a_low_token_ends_the_text_before_it_and_what_was_held_back_is_given_out():
    pieces, text = pieces_of(
        b"abcxyz", [0.9, 0.5, 0.9, 0.9, 0.19, 0.9], min_confidence=0.2, stop=("cxyz",)
    )
    assert "".join(piece.text for piece in pieces) == "abcx"
    assert [piece.probability for piece in pieces] == [0.9, 0.5, 0.9, 0.9]
    assert [step.token for step in text.drawn] == [*b"abcx"]
    assert text.refused == Drawn(ord("y"), 0.19)


def test_a_probability_at_the_limit_is_not_below_it():
    pieces, text = pieces_of(b"ab", [0.2, 0.2], min_confidence=0.2)
    assert len(pieces) == 2
    assert text.refused is None


def test_text_that_a_stop_text_held_back_keeps_its_probabilities():
    """ "ab" begins the stop text, so that two tokens are held and given out in parts."""
    pieces, _ = pieces_of(b"xababc!", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], stop=("abc!",))
    assert [(piece.text, piece.probability) for piece in pieces] == [
        ("x", 0.1), ("a", 0.2), ("b", 0.3),
    ]  # fmt: skip


def test_a_token_that_a_stop_text_begins_inside_of_is_given_out_in_parts():
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes = [b"xab", b"cy", b"ab!", b"c", b""]
    steps = [Drawn(0, 0.1), Drawn(1, 0.2), Drawn(2, 0.3), Drawn(3, 0.4), Drawn(0, 0.5)]
    writer = SimpleNamespace(
        tokenizer=tokenizer, config=SampleConfig(stop=("abcd", "!c")), draw=lambda *_: iter(steps)
    )
    assert [(p.text, p.probability) for p in Text(writer, [0], 0)] == [
        ("x", 0.1), ("ab", 0.1), ("cy", 0.2), ("ab", 0.3),
    ]  # fmt: skip


def test_min_confidence_ends_a_text_and_says_so(varied, engine):
    free = only_sample(varied("--engine", engine, "--json"))
    at = min(range(40), key=lambda i: free["token_probs"][i])
    assert at > 1
    limit = ("--min-confidence", free["token_probs"][at] * 1.001)
    outcome = varied("--engine", engine, *limit)
    result = only_sample(varied("--engine", engine, *limit, "--json"))
    assert result["tokens"] == free["tokens"][:at]
    assert result["refused_prob"] == pytest.approx(free["token_probs"][at])
    assert result["low_confidence"] == []
    assert outcome.out == "abc" + result["text"] + "\n"
    assert f"a token of probability {free['token_probs'][at]:.4g}, below" in outcome.err
    assert outcome.err.count("\n") == 1


def test_min_confidence_can_mark_instead(varied, engine):
    free = only_sample(varied("--engine", engine, "--json"))
    least = sorted(free["token_probs"])[3] * 1.001
    low = [i for i, p in enumerate(free["token_probs"]) if p < least]
    limit = ("--min-confidence", least, "--low-confidence", "mark")
    result = only_sample(varied("--engine", engine, *limit, "--json"))
    assert result["low_confidence"] == low
    assert len(low) == 4
    assert result["text"] == free["text"]
    assert result["tokens"] == free["tokens"]
    outcome = varied("--engine", engine, *limit)
    assert outcome.out.replace("⟦", "").replace("⟧", "") == "abc" + free["text"] + "\n"
    assert outcome.out.count("⟦") == outcome.out.count("⟧") == 4


def test_json_says_what_confidence_comes_to(varied, engine):
    result = varied("--engine", engine, "--json", "--confidence")
    (entry,) = json.loads(result.out)["samples"]
    mean = sum(math.log(p) for p in entry["token_probs"]) / 40
    assert entry["mean_log_prob"] == pytest.approx(mean)
    assert json.loads(result.out)["calibration_temperature"] == 1.5
    assert "probability  token" in result.err


def test_a_stale_calibration_is_said(varied_path, nanogpt):
    """A model that was trained further keeps the record of the temperature it had."""
    common = ("--model", varied_path, "--max-new-tokens", 3, "--confidence")
    model, _ = load(varied_path)
    for stale, words in ((False, "; calibrated at temperature 1.5"), (True, "was fitted before")):
        model.calibration = {"temperature": 1.5, "stale": False}
        if stale:
            model.mark_calibration_stale()
        checkpoint.save(model, varied_path)
        assert words in nanogpt("sample", *common).err


def test_chat_shows_confidence_after_each_answer(varied_path):
    done = chat(varied_path, ["abc", "def"], "--confidence", "--min-confidence", 1e-9)
    assert done.returncode == 0
    assert done.stderr.count("mean log-probability") == 2
    assert done.stderr.count("probability  token") == 2


@pytest.mark.parametrize(
    ("rewards", "settings"),
    [
        (("--reward-chars", "ea ", "--beta", 1.5), ()),
        (("--reward-chars", "xyx"), ()),
        (("--reward-terms", "abc,the gene", "--beta", 20), ()),
        (("--reward-terms", "TERMS", "--reward-chars", "e", "--beta", 6), ("--top-k", 12)),
        (("--reward-chars", "a", "--beta", 30), ("--temperature", 0)),
    ],
    ids=str,
)
def test_rewarded_texts_are_those_of_the_binary(
    varied, varied_path, tmp_path, engine, rewards, settings
):
    program = native_program("nanogpt-generate")
    (tmp_path / "TERMS").write_text("gene\r\n\n the day \n")
    rewards = [tmp_path / "TERMS" if r == "TERMS" else r for r in rewards]
    exported = tmp_path / "varied.pt"
    export_model(load(varied_path)[0], exported, verify=False)
    ours = varied("--engine", engine, *rewards, *settings)
    assert ours.code == 0, ours.err
    common = ("--prompt", "abc", "--max-new-tokens", "40", "--seed", "4", *settings)
    theirs = subprocess.run(
        [program, exported, *map(str, (*common, *rewards))], capture_output=True, text=True
    )
    assert ours.out == theirs.stdout
    assert ours.out != varied("--engine", engine, *settings).out


def test_an_export_takes_rewards_and_shows_confidence(nanogpt, varied, varied_path, tmp_path):
    if not native.available():
        pytest.skip(f"native engine: {native.why_not()}")
    exported = tmp_path / "varied.pt"
    export_model(load(varied_path)[0], exported, verify=False)
    settings = ("--reward-terms", "abc,the gene", "--beta", 20, "--confidence")
    common = ("--prompt", "abc", "--max-new-tokens", 40, "--seed", 4, *settings)
    outcome = nanogpt("sample", "--model", exported, *common)
    want = varied(*settings)
    assert (outcome.out, outcome.err) == (want.out, want.err)
    refused = nanogpt("sample", "--model", exported, *common, "--num-particles", 2)
    assert refused.code == 2
    assert "--num-particles 2 is for --engine torch" in refused.err


def test_json_says_what_a_reward_came_to(varied, engine):
    settings = ("--reward-chars", "e", "--beta", 4, "--engine", engine, "--json")
    result = only_sample(varied(*settings))
    assert result["reward"] == result["text"].count("e")
    assert result["reward"] > 3
    # KL of q to p is beta E_q[r] - log Z at every step, so their sums are close to what came out.
    assert 0 < result["kl"] < 40 * math.log(28)
    assert result["log_z"] > 0
    assert "reward" not in only_sample(varied("--engine", engine, "--json"))
    unmoved = only_sample(varied(*settings, "--beta", 0, "--reward-top-k", 1))
    assert unmoved["tokens"] == only_sample(varied("--engine", engine, "--json"))["tokens"]
    assert (unmoved["kl"], unmoved["log_z"]) == (0, 0)
    narrow = only_sample(varied(*settings, "--reward-top-k", 2))
    assert narrow["tokens"] != result["tokens"]


PARTICLES = ("--reward-terms", "abc,the gene", "--reward-chars", "e", "--beta", 6,
             "--num-particles", 8)  # fmt: skip


def test_particles_write_what_the_library_draws(varied, varied_path):
    result = json.loads(varied(*PARTICLES, "--json", "--num-samples", 2).out)
    model, tokenizer = load(varied_path)
    terms = term_reward_fn(["abc", "the gene"], tokenizer)
    reward = combine([(char_reward_fn("e", tokenizer), 1.0), (terms, 1.0)])
    texts = set()
    for row, entry in enumerate(result["samples"]):
        made = model.generate_reward_augmented(
            torch.tensor([tokenizer.encode("abc")]), 40, reward, 6.0, seed=4, first_row=row,
            num_particles=8, return_details=True,
        )  # fmt: skip
        assert entry["tokens"] == made.sequences[0, 3:].tolist()
        assert entry["token_probs"] == made.token_probabilities[0].tolist()
        assert entry["log_z"] == pytest.approx(float(made.log_z))
        assert entry["reward"] == pytest.approx(float(made.rewards.sum()))
        assert entry["kl"] == pytest.approx(float(made.kl.sum()))
        assert abs(entry["log_z"] - float(made.log_normalisers.sum())) > 0.1
        texts.add(entry["text"])
    assert len(texts) == 2
    assert varied(*PARTICLES).out == "abc" + result["samples"][0]["text"] + "\n"


def test_a_text_of_particles_ends_at_a_stop_text_and_at_the_end_of_the_document(
    varied, varied_path
):
    stopped = only_sample(varied(*PARTICLES, "--json", "--stop", "e"))
    assert "e" not in stopped["text"]
    assert stopped["tokens"].index(6) == len(stopped["tokens"]) - 1 < 39
    shown = varied(*PARTICLES, "--stop", "e", "--confidence")
    assert shown.out == "abc" + stopped["text"] + "\n"
    assert shown.err.count("\n") == len(stopped["tokens"]) + 2
    mild = ("--reward-chars", "e", "--beta", 0.5, "--num-particles", 4, "--num-samples", 6)
    ended = json.loads(varied(*mild, "--json", "--no-ignore-eos", "--stop", "x").out)["samples"]
    model, tokenizer = load(varied_path)
    for row, entry in enumerate(ended):
        made = model.generate_reward_augmented(
            torch.tensor([tokenizer.encode("abc")]), 40, char_reward_fn("e", tokenizer), 0.5,
            seed=4, first_row=row, num_particles=4, eos_token_id=27, stop="x", return_details=True,
        )  # fmt: skip
        new = made.sequences[0, 3 : 3 + int(made.lengths)].tolist()
        assert entry["tokens"] == [token for token in new if token != 27]
        assert entry["log_z"] == pytest.approx(float(made.log_z))
    lasts = {entry["tokens"][-1] == tokenizer.stoi["x"] for entry in ended}
    assert lasts == {True, False}
    assert any(len(entry["tokens"]) < 40 for entry in ended)


def test_without_the_engine_torch_writes_rewarded_texts(varied, monkeypatch):
    settings = ("--reward-terms", "abc,the gene", "--beta", 20, "--json")
    with_engine = only_sample(varied(*settings))
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "it was not built")
    without = only_sample(varied(*settings))
    assert without["tokens"] == with_engine["tokens"]
    assert without["reward"] == pytest.approx(with_engine["reward"])
    assert without["kl"] == pytest.approx(with_engine["kl"], abs=1e-3)
    refused = varied(*settings, "--engine", "native")
    assert refused.code == 2
    assert "it was not built" in refused.err


BAD_REWARDS = {
    "a beta without a reward": (["--beta", 2], 2, "--beta multiplies a reward: give --rew"),
    "candidates without a reward": (["--reward-top-k", 2], 2, "--reward-top-k belongs to a reward"),
    "particles without a reward": (["--num-particles", 2], 2, "--num-particles belongs to a rewar"),
    "no characters": (["--reward-chars", ""], 2, "--reward-chars needs at least one character"),
    "no terms": (["--reward-terms", ""], 2, "--reward-terms needs at least one term"),
    "only commas": (["--reward-terms", " , "], 2, "--reward-terms needs at least one term"),
    "a beta that is no number": (["--reward-chars", "a", "--beta", "nan"], 2, "must be finite"),
    "no candidates": (["--reward-chars", "a", "--reward-top-k", 0], 2, "must be at least 1"),
    "no particles": (["--reward-chars", "a", "--num-particles", 0], 2, "must be at least 1"),
    "particles in the native engine": (
        ["--reward-chars", "a", "--num-particles", 2, "--engine", "native"], 2, "--engine torch"),
    "greedy particles": (
        ["--reward-chars", "a", "--num-particles", 2, "--temperature", 0, "--engine", "torch"],
        2, "--temperature must be above 0"),
    "particles in a chat": (
        ["--reward-chars", "a", "--num-particles", 2, "--chat"], 2, "not for --chat"),
    "a character that no token ends with": (["--reward-chars", "aé"], 3, "the character 'é'"),
    "a term that cannot be written": (["--reward-terms", "abc,a.b"], 3, "the term 'a.b' cannot be"),
    "a missing file of terms": (["--reward-terms", "nowhere.txt"], 3, "nowhere.txt"),
    "a limit above 1": (["--min-confidence", 1.5], 2, "--min-confidence must be at most 1"),
    "a limit of 0": (["--min-confidence", 0], 2, "--min-confidence must be above 0"),
    "what to do without a limit": (
        ["--low-confidence", "mark"], 2, "--low-confidence belongs to --min-confidence"),
    "something else to do": (
        ["--min-confidence", 0.5, "--low-confidence", "warn"], 2, "must be one of stop, mark"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_REWARDS)
def test_bad_rewards_and_limits_end_with_their_code_and_one_sentence(varied, engine, case):
    arguments, code, message = BAD_REWARDS[case]
    named = () if "--engine" in arguments else ("--engine", engine)
    outcome = varied(*named, *arguments)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("rewards", "code"),
    [(("--reward-terms", "abc,a.b"), 3), (("--reward-chars", "é"), 3), (("--beta", "2"), 2)],
)
def test_the_binary_refuses_rewards_in_the_same_words(varied, varied_path, tmp_path, rewards, code):
    program = native_program("nanogpt-generate")
    export_model(load(varied_path)[0], tmp_path / "varied.pt", verify=False)
    done = subprocess.run(
        [program, tmp_path / "varied.pt", *rewards], capture_output=True, text=True
    )
    ours = varied(*rewards)
    assert (done.returncode, ours.code) == (code, code)
    sentence = ours.err.removeprefix("nanogpt sample: ")
    assert done.stderr == f"nanogpt-generate: {sentence}"
    assert done.stdout == ""


def test_a_file_that_cannot_be_a_model_is_named_with_the_endings(nanogpt, model_path):
    other = model_path.rename(model_path.with_suffix(".bin"))
    outcome = nanogpt("sample", "--model", other)
    assert outcome.code == 3
    for part in (str(other), ".pth", ".safetensors", ".pt"):
        assert part in outcome.err


@pytest.mark.parametrize("command", ["sample", "export"])
def test_instructions_that_do_not_exist_are_refused_in_a_sentence(
    nanogpt, model_path, tmp_path, monkeypatch, command
):
    if not native.available():
        pytest.skip(f"native engine: {native.why_not()}")
    monkeypatch.setenv("NANOGPT_ISA", "mmx")
    output = ("--output", tmp_path / "model.pt") if command == "export" else ("--prompt", "a")
    outcome = nanogpt(command, "--model", model_path, *output)
    assert outcome.code == 2
    assert "NANOGPT_ISA=mmx is not one of" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "model.pt").exists()


def test_the_end_of_a_text_counts_in_its_reward_and_kl(nanogpt, tmp_path):
    """The sums are those of the library, whose last step draws the end-of-text token."""
    torch.manual_seed(1)
    tokenizer = CharTokenizer("ab ")
    model = GPT(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=1, n_embd=8)
    with torch.no_grad():
        model.token_weight.mul_(20)
    model.tokenizer = tokenizer
    checkpoint.save(model, tmp_path / "m.pth")
    done = nanogpt("sample", "--model", tmp_path / "m.pth", "--reward-terms", "a,b", "--beta", 2,
                   "--no-ignore-eos", "--engine", "torch", "--seed", 1, "--num-samples", 6,
                   "--max-new-tokens", 12, "--prompt", "a", "--json")  # fmt: skip
    assert done.code == 0, done.err
    samples = json.loads(done.out)["samples"]
    ended = 0
    for row, told in enumerate(samples):
        details = model.generate_reward_augmented(
            torch.tensor([tokenizer.encode("a")]), 12, term_reward_fn(["a", "b"], tokenizer), 2.0,
            seed=1, first_row=row, eos_token_id=tokenizer.end_of_text_id, return_details=True,
        )  # fmt: skip
        ended += len(told["tokens"]) < int(details.lengths)
        assert told["reward"] == pytest.approx(float(details.rewards.sum()))
        assert told["kl"] == pytest.approx(float(details.kl.sum()))
        assert told["log_z"] == pytest.approx(float(details.log_z))
    assert ended
