"""The sampling command: what it writes, how it stops, what it refuses."""

import json
import subprocess
import sys
import time

import pytest
import torch

from nanogpt import GPT, checkpoint, load
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
