"""The generation binary: what it writes, how it streams and ends, what it refuses."""

import dataclasses
import json
import math
import os
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanogpt import GPT, checkpoint, cli, load
from nanogpt.config import SampleConfig
from nanogpt.export import torchscript
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer

ROOT = Path(__file__).resolve().parent.parent
NAME = "nanogpt-generate"
PLUGIN = "nanogpt_torchscript.so"
LETTERS = "abcdefghijklmnopqrstuvwxyz\n ."


@pytest.fixture(scope="session")
def binary():
    """The binary beside Python, or else the one of CMake's folder."""
    places = [Path(sys.executable).with_name(NAME), ROOT / "build" / "native" / NAME]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        pytest.skip(f"no {NAME}: `make build` builds it where there is a compiler")
    return found


@pytest.fixture(scope="session")
def plugin(binary):
    """The TorchScript plug-in, for NANOGPT_PLUGIN."""
    places = [
        binary.with_name(PLUGIN),
        binary.parent.parent / "lib" / "nanogpt" / PLUGIN,
        ROOT / "build" / "torchscript" / PLUGIN,
    ]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        pytest.skip(f"no {PLUGIN}: `make build` builds it where there is a compiler")
    return found


def export(model, path, quantize="none"):
    with path.open("wb") as file:
        torchscript.write(model, quantize, file)
    return path


def random_model(tokenizer, **shape):
    """Random weights, large enough that texts are neither all alike nor noise."""
    torch.manual_seed(3)
    sizes = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, **shape}
    model = GPT(vocab_size=tokenizer.vocab_size, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 if "wte" in name else 20)
    model.tokenizer = tokenizer
    return model.eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """char.pt, char-bf16.pt, char-int8.pt and char.safetensors of one random model."""
    folder = tmp_path_factory.mktemp("models")
    model = random_model(CharTokenizer(LETTERS))
    checkpoint.save(model, folder / "char.safetensors")
    export(model, folder / "char.pt")
    export(model, folder / "char-bf16.pt", "bf16")
    export(model, folder / "char-int8.pt", "int8")
    return folder


WRITTEN = "Le café, naïve 日本語 und 𝄞! "


@pytest.fixture(scope="session")
def writer_path(tmp_path_factory):
    """A byte model that has learned to repeat a line with characters of one to four bytes."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    model = GPT(vocab_size=257, block_size=48, n_layer=1, n_head=2, n_embd=32, dropout=0.0)
    model.tokenizer = tokenizer
    ids = torch.tensor(tokenizer.encode(WRITTEN * 4))
    period = len(WRITTEN.encode())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, steps this small wait for each other
    for step in range(150):
        starts = torch.arange(8) * 5 + step
        windows = torch.stack([ids[s % period : s % period + 49] for s in starts.tolist()])
        _, loss = model(windows[:, :-1], windows[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return export(model.eval(), tmp_path_factory.mktemp("writer") / "writer.pt")


@pytest.fixture
def generate(binary):
    """Run the binary: generate(MODEL, *arguments) -> CompletedProcess with text in UTF-8."""

    def run(*arguments, **options):
        options.setdefault("timeout", 120)
        return subprocess.run(
            [binary, *map(str, arguments)], capture_output=True, encoding="utf-8", **options
        )

    return run


@pytest.fixture
def sample(nanogpt, folder):
    """The Python command on the same model, computed by torch."""

    def run(*arguments):
        model = ("--model", folder / "char.safetensors", "--engine", "torch", "--device", "cpu")
        return nanogpt("sample", *model, *arguments)

    return run


@pytest.fixture
def refusal(generate):
    """Run what must fail: refusal(code, *arguments) -> the sentence."""

    def run(code, *arguments, **options):
        outcome = generate(*arguments, **options)
        assert outcome.returncode == code, outcome.stderr
        assert outcome.stdout == ""
        assert outcome.stderr.startswith(f"{NAME}: ")
        assert outcome.stderr.endswith("\n")
        assert outcome.stderr.count("\n") == 1, "one sentence on one line"
        return outcome.stderr.removeprefix(f"{NAME}: ").removesuffix("\n")

    return run


def test_help_needs_no_model_and_names_every_flag(generate):
    outcome = generate("--help")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    named = set(re.findall(r"--[a-z][a-z-]+", outcome.stdout))
    wanted = """--prompt --file --max-new-tokens --temperature --top-k --top-p --min-p
        --repetition-penalty --stop --seed --reward-chars --reward-terms --beta --confidence
        --threads --ignore-eos --no-ignore-eos --json --bench --engine --help --version"""
    assert named >= set(wanted.split())


def test_the_version_is_the_package_s(generate):
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert generate("--version").stdout == f"{NAME} {declared.group(1)}\n"


def test_defaults_are_those_of_sample(generate):
    help_text = re.sub(r"\n {30,}", " ", generate("--help").stdout)
    shown = dict(re.findall(r"^  (--[a-z-]+).*\(default: (.*)\)$", help_text, re.M))
    fields = {"--" + f.name.replace("_", "-"): f for f in dataclasses.fields(SampleConfig)}
    common = (shown.keys() & fields.keys()) - {"--threads", "--engine"}
    assert len(common) >= 11
    assert {f: shown[f] for f in common} == {f: cli._shown_default(fields[f]) for f in common}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--temperature", "-1"),
        ("--temperature", "warm"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", ""),
        ("--top-k", "0"),
        ("--top-k", "-3"),
        ("--top-k", "2.5"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--min-p", "-0.25"),
        ("--min-p", "2"),
        ("--repetition-penalty", "0"),
        ("--max-new-tokens", "-1"),
        ("--max-new-tokens", "many"),
        ("--seed", "-1"),
        ("--seed", "0x10"),
        ("--threads", "0"),
    ],
)
def test_values_are_refused_in_sample_s_words_before_any_file_is_read(
    refusal, nanogpt, flag, value
):
    there = nanogpt("sample", "--model", "missing.pth", f"{flag}={value}")
    assert there.code == 2
    here = refusal(2, "missing.pt", f"{flag}={value}")
    assert here == there.err.removeprefix("nanogpt sample: ").rstrip("\n")
    assert refusal(2, "missing.pt", flag, value) == here


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "which model"),
        (["m.pt", "other.pt"], "unexpected argument 'other.pt'"),
        ([""], "path is empty"),
        (["m.pt", "--tempratur", "1"], "no flag --tempratur; the nearest is --temperature"),
        (["m.pt", "--temp", "1"], "no flag --temp; the nearest is --temperature"),
        (["m.pt", "--top_k=3"], "no flag --top_k; the nearest is --top-k"),
        (["m.pt", "--no-ignore-eso"], "the nearest is --no-ignore-eos"),
        (["m.pt", "--zzzzzzzzzzzzzz"], "no flag --zzzzzzzzzzzzzz"),
        (["m.pt", "--prompt"], "--prompt needs a value"),
        (["m.pt", "--prompt", "--json"], "--prompt needs a value; write --prompt=--json"),
        (["m.pt", "--json=yes"], "--json takes no value"),
        (["m.pt", "--seed", str(2**64)], f"--seed must be below 2^64, not '{2**64}'"),
        (["m.pt", "--max-new-tokens", "9" * 30], "--max-new-tokens must be at most"),
        (["m.pt", "--threads", "1000000"], "--threads must be at most"),
        (["m.pt", "--temperature", "1e999"], "--temperature must be a number that fits"),
        (["m.pt", "--prompt", "a", "--file", "b"], "--prompt and --file exclude each other"),
        (["m.pt", "--engine", "onnx"], "--engine must be one of native, torchscript"),
        (["m.pt", "--beta", "2"], "--beta multiplies a reward"),
        (["m.pt", "--reward-chars", ""], "--reward-chars needs at least one character"),
        (["m.pt", "--reward-terms", ""], "--reward-terms needs at least one term"),
        (["m.pt", "--bench", "--prompt", "a"], "--bench writes no text, so it takes no --prompt"),
        (["m.pt", "-r", "3"], "--repetitions belongs to --bench"),
        (["m.safetensors", "--engine", "torchscript"], "not a .safetensors file"),
    ],
)
def test_what_is_wrong_with_the_flags_is_said_in_one_sentence(refusal, arguments, words):
    assert words in refusal(2, *arguments)


def test_bytes_that_are_no_text_are_refused(refusal, binary):
    for flag in ("--prompt", "--stop", "--reward-chars"):
        outcome = subprocess.run([binary, "m.pt", flag, b"a\xff"], capture_output=True)
        assert outcome.returncode == 2
        assert outcome.stderr.decode() == rf"{NAME}: {flag} is not UTF-8 text: 'a\xff'" + "\n"


def test_a_value_may_begin_with_a_dash(generate, folder, tmp_path):
    model = random_model(CharTokenizer("-ab"), block_size=8)
    path = export(model, tmp_path / "dash.pt")
    common = ("--max-new-tokens", 0, "--", path)
    assert generate("--prompt", "-a", *common).stdout == "-a\n"
    assert generate("--prompt=--a", *common).stdout == "--a\n"


def test_a_missing_empty_or_foreign_model_is_refused(refusal, tmp_path):
    missing = tmp_path / "missing.pt"
    assert str(missing) in refusal(3, missing)
    empty = tmp_path / "empty.pt"
    empty.touch()
    assert str(empty) in refusal(3, empty)
    assert str(tmp_path) in refusal(3, tmp_path)
    foreign = tmp_path / "foreign.pt"
    foreign.write_text("A letter to a friend.\n" * 100)
    assert str(foreign) in refusal(3, foreign)


def test_a_path_in_an_error_neither_breaks_the_line_nor_commands_the_terminal(refusal):
    assert r"no\x1b[31m\nmodel.pt" in refusal(3, "no\x1b[31m\nmodel.pt")


@pytest.mark.parametrize("name", ["char.pt", "char-int8.pt", "char.safetensors"])
def test_one_flipped_bit_anywhere_is_refused_before_a_word_is_written(
    refusal, folder, tmp_path, name
):
    raw = (folder / name).read_bytes()
    copy = tmp_path / name
    for at in range(3, len(raw), len(raw) // 40):
        copy.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        assert str(copy) in refusal(3, copy, "--prompt", "abc", "--seed", 1), at


def test_a_model_of_train_is_refused_with_the_way_out(refusal, folder, tmp_path):
    model, _ = load(folder / "char.safetensors")
    checkpoint.save(model, tmp_path / "gpt.pth")
    sentence = refusal(3, tmp_path / "gpt.pth")
    assert str(tmp_path / "gpt.pth") in sentence
    assert "nanogpt export" in sentence


def test_an_instruction_set_that_is_not_there_is_refused(refusal, folder):
    named = {**os.environ, "NANOGPT_ISA": "mmx"}
    assert "mmx" in refusal(2, folder / "char.pt", env=named)


def test_a_model_that_is_cut_while_it_writes_ends_with_a_sentence(binary, folder, tmp_path):
    copy = shutil.copy(folder / "char.pt", tmp_path / "copy.pt")
    with start(binary, copy, *ENDLESS) as process:
        read_until(process, 200)
        os.truncate(copy, 0)
        _, messages = process.communicate(timeout=60)
    assert process.returncode == 3
    assert b"the model file was shortened" in messages


def test_a_file_cut_short_is_refused(refusal, folder, tmp_path):
    raw = (folder / "char.pt").read_bytes()
    copy = tmp_path / "short.pt"
    for length in (1, 100, len(raw) // 2, len(raw) - 1):
        copy.write_bytes(raw[:length])
        assert str(copy) in refusal(3, copy)


def test_a_model_without_a_tokenizer_can_be_measured_but_not_write(refusal, generate, tmp_path):
    model = random_model(CharTokenizer(LETTERS))
    model.tokenizer = None
    path = export(model, tmp_path / "bare.pt")
    assert "holds no tokenizer, so it cannot write text" in refusal(3, path, "--prompt", "a")
    assert generate(path, "--bench", "-r", 1).returncode == 0


def test_a_character_that_the_vocabulary_lacks_is_named_as_sample_names_it(refusal, sample, folder):
    there = sample("--prompt", "abcé")
    here = refusal(3, folder / "char.pt", "--prompt", "abcé")
    assert here == there.err.removeprefix("nanogpt sample: ").rstrip("\n")
    assert "'é' (U+00E9) at position 3" in here


def test_a_prompt_file_that_cannot_be_read_is_refused(refusal, folder, tmp_path):
    path = folder / "char.pt"
    assert "cannot read the prompt" in refusal(3, path, "--file", tmp_path / "none.txt")
    assert "cannot read the prompt" in refusal(3, path, "--file", tmp_path)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("abé".encode("latin-1"))
    assert "is not UTF-8 text: bad byte at 2" in refusal(3, path, "--file", latin)


def test_terms_that_cannot_be_read_are_refused(refusal, folder, tmp_path):
    path = folder / "char.pt"
    assert "none.txt" in refusal(3, path, "--reward-terms", tmp_path / "none.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    assert "holds no terms" in refusal(3, path, "--reward-terms", empty)
    assert "needs at least one term" in refusal(2, path, "--reward-terms", " , ")


SETTINGS = [
    (),
    ("--temperature", 0),
    ("--temperature", 0.7, "--top-k", 5),
    ("--top-p", 0.6, "--min-p", 0.05),
    ("--repetition-penalty", 1.6, "--temperature", 1.3),
    ("--no-ignore-eos",),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(map(str, s)) or "plain")
def test_the_text_is_sample_s_for_the_same_seed_beyond_the_context(
    generate, sample, folder, settings
):
    for seed in (1, 2**64 - 1):
        arguments = ("--prompt", "abc", "--max-new-tokens", 120, "--seed", seed, *settings)
        there = sample(*arguments)
        here = generate(folder / "char.pt", *arguments)
        assert here.returncode == 0, here.stderr
        assert here.stdout == there.out


@pytest.mark.parametrize(
    "architecture", [{"rotary": True}, {"qk_norm": True}, {"rotary": True, "qk_norm": True}]
)
def test_every_architecture_is_written_as_python_writes_it(
    generate, plugin, tmp_path, architecture
):
    model = random_model(CharTokenizer(LETTERS), **architecture)
    checkpoint.save(model, tmp_path / "m.safetensors")
    path = export(model, tmp_path / "m.pt")
    prompt = torch.tensor([model.tokenizer.encode("abc")])
    tokens = model.generate(prompt, 60, seed=5, engine="torch")[0, 3:].tolist()
    assert len(set(tokens)) > 5, "a constant text would prove little"
    named = {**os.environ, "NANOGPT_PLUGIN": str(plugin)}
    for way in ((path,), (path, "--engine", "torchscript"), (tmp_path / "m.safetensors",)):
        outcome = generate(*way, "--prompt", "abc", "--max-new-tokens", 60, "--seed", 5, "--json",
                           "--threads", 1, env=named)  # fmt: skip
        assert outcome.returncode == 0, outcome.stderr
        assert json.loads(outcome.stdout)["tokens"] == tokens


def test_the_two_kinds_of_model_file_write_the_same(generate, folder):
    arguments = ("--prompt", "q", "--max-new-tokens", 60, "--seed", 4)
    texts = {generate(folder / n, *arguments).stdout for n in ("char.pt", "char.safetensors")}
    assert len(texts) == 1


@pytest.mark.parametrize("quantize", ["bf16", "int8"])
def test_quantized_weights_write_the_text_of_what_they_stand_for(
    generate, folder, tmp_path, quantize
):
    from nanogpt.export import quantize as weights

    model, tokenizer = load(folder / "char.safetensors")
    plain = weights.dequantized(weights.weights_of(model, quantize))
    model.load_state_dict(plain, strict=False)
    tokens = model.generate(torch.tensor([tokenizer.encode("ab")]), 12, temperature=0.0)
    outcome = generate(folder / f"char-{quantize}.pt", "--prompt", "ab",
                       "--max-new-tokens", 12, "--temperature", 0)  # fmt: skip
    assert outcome.stdout == tokenizer.decode(tokens[0].tolist()) + "\n"


def test_json_holds_what_sample_s_holds_and_the_timings(generate, sample, folder):
    arguments = ("--prompt", "abc", "--max-new-tokens", 30, "--seed", 5, "--json")
    there = json.loads(sample(*arguments).out)
    outcome = generate(folder / "char.pt", *arguments)
    assert outcome.stderr == ""
    assert outcome.stdout.count("\n") == 1
    here = json.loads(outcome.stdout)
    assert list(here) == ["text", "tokens", "token_probs", "prompt_tokens", "timings", "seed"]
    sample = there["samples"][0]
    assert here["text"] == sample["text"]
    assert here["tokens"] == sample["tokens"]
    assert here["token_probs"] == pytest.approx(sample["token_probs"], rel=1e-4)
    assert (here["prompt_tokens"], here["seed"]) == (3, 5)
    timings = here["timings"]
    assert list(timings) == [
        "load_ms",
        "first_token_ms",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    ]
    assert 0 < timings["load_ms"] < timings["first_token_ms"]
    assert timings["prefill_tokens_per_second"] > 0
    assert timings["decode_tokens_per_second"] > 0


def test_probabilities_are_at_the_calibration_temperature(generate, tmp_path):
    model = random_model(CharTokenizer(LETTERS))
    model.calibration_temperature = 2.5
    path = export(model, tmp_path / "calibrated.pt")
    outcome = generate(path, "--prompt", "abc", "--max-new-tokens", 10, "--seed", 5, "--json")
    details = model.generate(
        torch.tensor([model.tokenizer.encode("abc")]), 10, seed=5, return_details=True
    )
    want = details.token_probabilities[0].tolist()
    assert json.loads(outcome.stdout)["token_probs"] == pytest.approx(want, rel=1e-4)
    outcome = generate(path, "--max-new-tokens", 1, "--confidence")
    assert "calibrated at temperature 2.5" in outcome.stderr


def test_without_a_seed_texts_differ_and_the_seed_that_is_told_repeats_one(generate, folder):
    common = (folder / "char.pt", "--max-new-tokens", 40, "--json")
    one, other = (json.loads(generate(*common).stdout) for _ in range(2))
    assert one["seed"] != other["seed"]
    assert one["tokens"] != other["tokens"]
    assert max(one["seed"], other["seed"]) < 2**62
    again = json.loads(generate(*common, "--seed", one["seed"]).stdout)
    assert again["tokens"] == one["tokens"]
    told = generate(*common[:-1], "--seed", 77).stderr
    assert re.search(r"; seed 77$", told.strip())


def test_an_empty_prompt_starts_a_new_document(generate, folder):
    model, tokenizer = load(folder / "char.safetensors")
    start = torch.tensor([[tokenizer.end_of_text_id]])
    want = tokenizer.decode(model.generate(start, 12, temperature=0.0)[0].tolist())
    arguments = ("--max-new-tokens", 12, "--temperature", 0)
    assert generate(folder / "char.pt", *arguments).stdout == want + "\n"
    assert generate(folder / "char.pt", *arguments, "--prompt", "").stdout == want + "\n"


def test_the_prompt_can_come_from_a_file_or_standard_input(generate, folder, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("hello there.\n" * 5)
    common = (folder / "char.pt", "--max-new-tokens", 20, "--seed", 3)
    want = generate(*common, "--prompt", "hello there.\n" * 5).stdout
    assert want.startswith("hello there.\n" * 5)
    assert generate(*common, "--file", prompt).stdout == want
    assert generate(*common, "--file", "-", input="hello there.\n" * 5).stdout == want


def test_no_new_tokens_is_only_the_prompt(generate, folder):
    outcome = generate(folder / "char.pt", "--prompt", "abc", "--max-new-tokens", 0)
    assert (outcome.returncode, outcome.stdout) == (0, "abc\n")
    result = json.loads(generate(folder / "char.pt", "--max-new-tokens", 0, "--json").stdout)
    assert (result["text"], result["tokens"], result["token_probs"]) == ("", [], [])
    assert result["timings"]["first_token_ms"] is None
    assert result["timings"]["decode_tokens_per_second"] is None


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_text_does_not_depend_on_the_threads(generate, folder, threads):
    common = (folder / "char-bf16.pt", "--max-new-tokens", 60, "--seed", 9)
    want = generate(*common).stdout
    assert generate(*common, "--threads", threads).stdout == want


def test_the_end_of_text_token_ends_the_text_where_it_is_obeyed(generate, tmp_path):
    model = random_model(CharTokenizer("ab"))
    path = export(model, tmp_path / "eos.pt")
    lengths = []
    for seed in range(10):
        common = (path, "--prompt", "a", "--max-new-tokens", 50, "--seed", seed, "--json")
        free = json.loads(generate(*common, "--ignore-eos").stdout)
        ended = json.loads(generate(*common, "--no-ignore-eos").stdout)
        assert len(free["tokens"]) == 50
        whole = free["tokens"]
        until = whole.index(2) if 2 in whole else len(whole)
        assert ended["tokens"] == whole[:until]
        lengths.append(until)
    assert min(lengths) < 50, "no text ended: the test has shown nothing"


def test_a_stop_text_ends_the_text_and_is_left_out(generate, sample, folder):
    common = ("--prompt", "a", "--max-new-tokens", 100, "--seed", 2)
    free = generate(folder / "char.pt", *common).stdout[1:-1]
    for stop in (free[30:32], free[7], free[60:70]):
        here = generate(folder / "char.pt", *common, "--stop", stop)
        assert here.stdout == "a" + free[: free.index(stop)] + "\n"
        there = sample(*common, f"--stop={stop}")
        assert here.stdout == there.out


def test_the_first_of_several_stop_texts_counts(generate, folder):
    common = (folder / "char.pt", "--prompt", "a", "--max-new-tokens", 100, "--seed", 2)
    free = generate(*common).stdout[1:-1]
    stops = [free[50:53], free[20:23], "never to be seen"]
    flags = [word for stop in stops for word in ("--stop", stop)]
    end = min(free.index(stop) for stop in stops[:2])
    result = json.loads(generate(*common, *flags, "--json").stdout)
    assert result["text"] == free[:end]
    assert len(result["tokens"]) < 100


def test_what_looked_like_a_stop_text_at_the_end_is_given_out(generate, folder):
    common = (folder / "char.pt", "--prompt", "a", "--max-new-tokens", 40, "--seed", 2)
    free = generate(*common).stdout
    assert generate(*common, "--stop", free[-4:-1] + "#").stdout == free


def test_a_prompt_that_holds_the_stop_text_does_not_end(generate, folder):
    common = (folder / "char.pt", "--prompt", "abc", "--max-new-tokens", 5, "--seed", 2)
    assert len(generate(*common, "--stop", "bc").stdout) >= len("abc\n")
    assert generate(*common, "--stop", "bc").stdout.startswith("abc")


def test_bytes_become_the_characters_that_they_make(generate, writer_path):
    outcome = generate(writer_path, "--prompt", WRITTEN, "--max-new-tokens", 200,
                       "--temperature", 0)  # fmt: skip
    text = outcome.stdout.removesuffix("\n")
    endless = WRITTEN * 10
    cut = (endless.encode()[: len(WRITTEN.encode()) + 200]).decode("utf-8", "replace")
    assert text == cut


def test_a_character_cut_by_the_end_becomes_a_replacement(generate, writer_path):
    before = WRITTEN[: WRITTEN.index("日")]
    outcome = generate(writer_path, "--prompt", before, "--max-new-tokens", 2, "--temperature", 0)
    assert outcome.stdout == before + "\N{REPLACEMENT CHARACTER}\n"


def test_bytes_that_are_no_characters_are_replaced_as_python_replaces_them(generate, tmp_path):
    model = random_model(ByteTokenizer())
    path = export(model, tmp_path / "bytes.pt")
    for seed in range(5):
        outcome = generate(path, "--max-new-tokens", 150, "--seed", seed, "--json")
        result = json.loads(outcome.stdout)
        assert result["text"] == model.tokenizer.decode(result["tokens"])
        assert "\N{REPLACEMENT CHARACTER}" in result["text"]


def test_a_stop_text_of_several_bytes_is_found(generate, writer_path):
    outcome = generate(writer_path, "--prompt", "Le caf", "--max-new-tokens", 100,
                       "--temperature", 0, "--stop", "本")  # fmt: skip
    assert outcome.stdout == WRITTEN[: WRITTEN.index("本")] + "\n"


def test_confidence_is_a_table_on_standard_error(generate, folder):
    common = (folder / "char.pt", "--prompt", "abc", "--max-new-tokens", 25, "--seed", 5)
    plain, shown = generate(*common), generate(*common, "--confidence")
    assert shown.stdout == plain.stdout
    result = json.loads(generate(*common, "--json").stdout)
    lines = shown.stderr.splitlines()
    start = lines.index("probability  token") + 1
    rows = [line.split(maxsplit=1) for line in lines[start : start + 25]]
    assert [float(p) for p, _ in rows] == pytest.approx(result["token_probs"], abs=1e-6)
    _, tokenizer = load(folder / "char.safetensors")
    names = [tokenizer.decode([token]).replace("\n", "\\n") for token in result["tokens"]]
    ends = ["<|endoftext|>" if t == tokenizer.end_of_text_id else None for t in result["tokens"]]
    assert [t for _, t in rows] == [e or f'"{n}"' for n, e in zip(names, ends, strict=True)]
    logs = [math.log(p) for p in result["token_probs"]]
    summary = re.search(
        r"mean probability ([\d.e-]+), perplexity ([\d.e+]+) over 25 tokens", shown.stderr
    )
    mean, perplexity = map(float, summary.groups())
    assert mean == pytest.approx(statistics.fmean(result["token_probs"]), rel=1e-3)
    assert perplexity == pytest.approx(math.exp(-statistics.fmean(logs)), rel=1e-3)


def test_a_strong_reward_for_characters_leaves_no_others(generate, folder):
    common = (folder / "char.pt", "--prompt", "a", "--max-new-tokens", 40, "--seed", 1)
    plain = generate(*common).stdout[1:-1]
    steered = generate(*common, "--reward-chars", "xz", "--beta", 1000).stdout[1:-1]
    assert set(plain) - set("xz")
    assert set(steered) == {"x", "z"}
    assert generate(*common, "--reward-chars", "xz", "--beta", 0).stdout[1:-1] == plain
    avoided = generate(*common, "--reward-chars", plain, "--beta", -1000).stdout[1:-1]
    assert not set(plain) & set(avoided)


def test_a_strong_reward_for_terms_writes_them(generate, folder, tmp_path):
    terms = tmp_path / "terms.txt"
    terms.write_text("gene therapy\r\n\nquark\n")
    common = (folder / "char.pt", "--prompt", "a ", "--max-new-tokens", 60, "--seed", 1)
    assert "quark" not in generate(*common).stdout
    listed = generate(*common, "--reward-terms", "gene therapy, quark", "--beta", 200).stdout
    assert "gene therapy" in listed
    assert "quark" in listed
    assert generate(*common, "--reward-terms", terms, "--beta", 200).stdout == listed


def test_two_rewards_add_up(generate, folder):
    common = (folder / "char.pt", "--prompt", "a ", "--max-new-tokens", 30, "--seed", 1)
    both = ("--reward-chars", "quark", "--reward-terms", "quark", "--beta", 300)
    assert "quark" in generate(*common, *both).stdout
    assert set(generate(*common, *both).stdout[2:-1]) <= set("quark ")


def start(binary, *arguments, sigint=signal.SIG_DFL, **options):
    """A process with its output in pipes and SIGINT as a terminal's child has it."""
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.Popen(
        [binary, *map(str, arguments)],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
        **options,
    )


ENDLESS = ("--max-new-tokens", 2**31 - 1)


def read_until(process, count):
    """Chunks as they come, until they have `count` bytes together."""
    chunks = []
    while sum(map(len, chunks)) < count:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        assert ready, "no text for a minute"
        chunk = os.read(process.stdout.fileno(), 2**20)
        assert chunk, process.stderr.read()
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_text_comes_while_it_is_made_and_an_interruption_ends_it_whole(
    binary, writer_path, number, code
):
    with start(binary, writer_path, "--prompt", "Le", "--temperature", 0, *ENDLESS) as process:
        chunks = read_until(process, 2000)
        assert process.poll() is None
        assert len(chunks) > 1
        for chunk in chunks:
            chunk.decode("utf-8")  # no chunk ends inside a character
        process.send_signal(number)
        rest, messages = process.communicate(timeout=60)
    assert process.returncode == code
    text = (b"".join(chunks) + rest).decode("utf-8")
    assert text.startswith(WRITTEN * 3)
    assert text.endswith("\n")
    assert "interrupted" in messages.decode()
    assert "seed" in messages.decode(), "what was measured is told all the same"


def test_an_interrupted_json_is_whole(binary, folder):
    with start(binary, folder / "char.pt", "--json", "--stop", "#", *ENDLESS) as process:
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    result = json.loads(out)
    assert len(result["tokens"]) == len(result["token_probs"]) > 0


def test_an_interruption_while_the_prompt_is_awaited_ends_at_once(binary, folder):
    with start(binary, folder / "char.pt", "--file", "-", stdin=subprocess.PIPE) as process:
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert process.stdout.read() == b""


def test_an_interruption_that_was_ignored_before_stays_ignored(binary, folder):
    with start(binary, folder / "char.pt", *ENDLESS, sigint=signal.SIG_IGN) as process:
        read_until(process, 200)
        process.send_signal(signal.SIGINT)
        read_until(process, 2000)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_reader_that_stopped_reading_does_not_hold_up_an_interruption(binary, folder):
    with start(binary, folder / "char.pt", *ENDLESS) as process:
        time.sleep(1.5)  # the pipe is full and the process waits
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


def test_a_reader_that_left_ends_it_quietly(binary, folder):
    with start(binary, folder / "char.pt", *ENDLESS) as process:
        read_until(process, 10)
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize(
    "arguments", [("--max-new-tokens", 5), ("--json",), ("--bench", "-r", 1), ("--help",)]
)
def test_a_full_disk_is_an_error(binary, folder, arguments):
    with open("/dev/full", "wb") as full:
        outcome = subprocess.run(
            [binary, folder / "char.pt", *map(str, arguments)], stdout=full, stderr=subprocess.PIPE
        )
    assert outcome.returncode == 1
    assert outcome.stderr.decode() == f"{NAME}: standard output: the disk is full\n"


def test_a_closed_standard_output_is_an_error(binary, folder):
    script = '"$0" "$1" --max-new-tokens 3 >&-'
    outcome = subprocess.run(["sh", "-c", script, binary, folder / "char.pt"], capture_output=True)
    assert outcome.returncode == 1
    assert b"cannot write to standard output" in outcome.stderr


def test_bench_measures_prompts_and_writing_over_repetitions(generate, folder, tmp_path):
    model = random_model(CharTokenizer(LETTERS), block_size=96)
    path = export(model, tmp_path / "bench.pt", "bf16")
    outcome = generate(path, "--bench", "-r", 4, "--json", "--threads", 1)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    result = json.loads(outcome.stdout)
    assert [t["test"] for t in result["tests"]] == ["pp64", "pp96", "tg96"], "cut to the context"
    assert (result["engine"], result["threads"], result["quantize"]) == ("native", 1, "bf16")
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert 2 * result["parameters"] <= result["weight_bytes"] < 4 * result["parameters"]
    for test in result["tests"]:
        rates = test["tokens_per_second"]
        assert len(rates) == 4
        assert min(rates) > 0
        assert test["mean"] == pytest.approx(statistics.fmean(rates))
        assert test["standard_deviation"] == pytest.approx(statistics.stdev(rates))
        assert test["median"] == pytest.approx(statistics.median(rates))
    assert result["read_limit_tokens_per_second"] > 0
    *table, limit = generate(path, "--bench", "--repetitions=1").stdout.splitlines()
    assert re.fullmatch(r"reading the weights once a token would allow [\d.]+ t/s", limit)
    assert len({len(line) for line in table}) == 1, "columns stand below each other"
    tests = [row.split("|")[7].strip() for row in table]
    assert (tests[0], set(tests[1]), tests[2:]) == ("test", {"-"}, ["pp64", "pp96", "tg96"])
    assert re.search(r"[\d.]+ ± 0\.00", table[2])


def test_a_short_context_is_measured_once(generate, folder):
    result = json.loads(generate(folder / "char.pt", "--bench", "-r", 1, "--json").stdout)
    assert [t["test"] for t in result["tests"]] == ["pp16", "tg16"]


def test_an_interrupted_bench_ends_with_130(binary, folder):
    with start(binary, folder / "char.pt", "--bench", "-r", 1000000) as process:
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")


def test_it_is_small_and_needs_only_the_c_library(binary):
    assert binary.stat().st_size < 3 * 2**20
    if not sys.platform.startswith("linux"):
        pytest.skip("ldd is Linux's")
    needs = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
    names = {Path(line.split()[0]).name.partition(".so")[0] for line in needs.splitlines()}
    vague = {name for name in names if name.startswith(("ld-", "linux-"))}
    assert names - vague <= {"libc", "libm", "libdl", "libpthread"}


def test_it_holds_no_path_of_the_machine_that_built_it(binary):
    assert str(ROOT).encode() not in binary.read_bytes()


def test_without_the_plug_in_it_says_how_to_build_it(refusal, binary, folder, tmp_path):
    lonely = tmp_path / "bin" / NAME
    lonely.parent.mkdir()
    shutil.copy2(binary, lonely)
    environment = {k: v for k, v in os.environ.items() if k != "NANOGPT_PLUGIN"}
    outcome = subprocess.run(
        [lonely, folder / "char.pt", "--engine", "torchscript"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert outcome.returncode == 2
    assert "`make build` builds it" in outcome.stderr
    missing = {**environment, "NANOGPT_PLUGIN": str(tmp_path / "none.so")}
    arguments = (folder / "char.pt", "--engine", "torchscript")
    assert "none.so, which cannot be read" in refusal(2, *arguments, env=missing)
    foreign = tmp_path / "foreign.so"
    foreign.write_text("not a library")
    named = {**environment, "NANOGPT_PLUGIN": str(foreign)}
    assert "foreign.so cannot be loaded" in refusal(2, *arguments, env=named)


FAKE = """
#include "generate/plugin.h"
#include <stdio.h>
static void loaded(char* version, size_t size) { snprintf(version, size, "9.8.7"); }
static const NanogptPlugin plugin = {ABI, "1.2.3", loaded, 0, 0, 0, 0, 0};
const NanogptPlugin* SYMBOL(void) { return &plugin; }
"""


@pytest.mark.parametrize(
    ("abi", "symbol", "words"),
    [
        ("NANOGPT_PLUGIN_ABI", "nanogpt_torchscript_plugin",
         "was built against torch 1.2.3, but torch 9.8.7 is installed: run `make build` again"),
        ("NANOGPT_PLUGIN_ABI + 1", "nanogpt_torchscript_plugin", "build both with `make build`"),
        ("NANOGPT_PLUGIN_ABI", "another_name", "is not a plug-in of nanogpt"),
    ],
)  # fmt: skip
def test_a_plug_in_that_does_not_fit_is_refused_in_words(
    refusal, folder, tmp_path, abi, symbol, words
):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "fake.c", tmp_path / "fake.so"
    source.write_text(FAKE)
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-DABI={abi}", f"-DSYMBOL={symbol}",
         source, "-o", library],
        check=True,
    )  # fmt: skip
    for name in (library, library.name):  # the second as it is named in its own folder
        named = {**os.environ, "NANOGPT_PLUGIN": str(name)}
        arguments = (folder / "char.pt", "--engine", "torchscript")
        assert words in refusal(2, *arguments, env=named, cwd=tmp_path)


@pytest.mark.parametrize(
    ("quantize", "count", "tolerance"),
    # Beside narrow weights the native engine keeps keys and values in bfloat16, which torch does
    # not; over a long text that may turn a near tie.
    [("", 60, 1e-3), ("-bf16", 20, 0.05), ("-int8", 20, 0.05)],
)
def test_torchscript_writes_what_the_native_engine_writes_beyond_the_context(
    generate, folder, plugin, quantize, count, tolerance
):
    common = (folder / f"char{quantize}.pt", "--prompt", "abc", "--max-new-tokens", count,
              "--temperature", 0, "--json")  # fmt: skip
    native = json.loads(generate(*common).stdout)
    named = {**os.environ, "NANOGPT_PLUGIN": str(plugin)}
    outcome = generate(*common, "--engine", "torchscript", "--threads", 1, env=named)
    assert outcome.returncode == 0, outcome.stderr
    scripted = json.loads(outcome.stdout)
    assert scripted["tokens"] == native["tokens"]
    assert scripted["token_probs"] == pytest.approx(native["token_probs"], rel=tolerance)


def test_torchscript_can_be_measured(generate, folder, plugin):
    named = {**os.environ, "NANOGPT_PLUGIN": str(plugin)}
    arguments = (folder / "char.pt", "--bench", "-r", 1, "--json", "--engine", "torchscript")
    result = json.loads(generate(*arguments, env=named).stdout)
    assert (result["engine"], result["instruction_set"]) == ("torchscript", None)
    assert [t["test"] for t in result["tests"]] == ["pp16", "tg16"]


def test_several_tokens_may_follow_a_context_in_the_plug_in(folder, plugin):
    """The interface itself, in a process without torch: one call after another, or all at once."""
    script = """
import ctypes as c, json, sys
class Plugin(c.Structure):
    _fields_ = [
        ("abi", c.c_uint32), ("built", c.c_char_p), ("loaded", c.c_void_p),
        ("open", c.CFUNCTYPE(c.c_int, c.c_char_p, c.c_size_t, c.c_int, c.POINTER(c.c_void_p),
                             c.c_char_p, c.c_size_t)),
        ("append", c.CFUNCTYPE(c.c_int, c.c_void_p, c.POINTER(c.c_int32), c.c_int64,
                               c.POINTER(c.c_float), c.c_int64, c.c_char_p, c.c_size_t)),
        ("reset", c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_char_p, c.c_size_t)),
        ("length", c.CFUNCTYPE(c.c_int64, c.c_void_p)),
        ("close", c.CFUNCTYPE(None, c.c_void_p)),
    ]
find = c.CDLL(sys.argv[1]).nanogpt_torchscript_plugin
find.restype = c.POINTER(Plugin)
plugin, model, error = find().contents, c.c_void_p(), c.create_string_buffer(500)
vocab = int(sys.argv[3])
archive = open(sys.argv[2], "rb").read()
assert plugin.open(archive, len(archive), 1, c.byref(model), error, 500) == 0, error.value
del archive
logits = (c.c_float * vocab)()
def append(*ids):
    code = plugin.append(model, (c.c_int32 * len(ids))(*ids), len(ids), logits, vocab, error, 500)
    return [code, plugin.length(model), list(logits), error.value.decode()]
out = [append(1, 2, 3), append(4, 5)]
plugin.reset(model, error, 500)
out += [[plugin.length(model)], append(1, 2, 3, 4, 5), append(vocab)]
plugin.close(model)
out.append([plugin.open(b"none", 4, 1, c.byref(model), error, 500), error.value.decode()])
print(json.dumps(out))
"""
    model, tokenizer = load(folder / "char.safetensors")
    vocab = tokenizer.vocab_size
    outcome = subprocess.run(
        [sys.executable, "-c", script, plugin, folder / "char.pt", str(vocab)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second, emptied, whole, outside, none = json.loads(outcome.stdout)
    with torch.inference_mode():
        wanted = model.next_logits(torch.tensor([[1, 2, 3, 4, 5]]))[0].tolist()
    assert [first[:2], second[:2], emptied, whole[:2]] == [[0, 3], [0, 5], [0], [0, 5]]
    assert second[2] == pytest.approx(wanted, abs=1e-4)
    assert whole[2] == pytest.approx(wanted, abs=1e-4)
    assert outside[0] != 0
    assert f"outside the vocabulary of {vocab}" in outside[3]
    assert none[0] != 0
    assert "archive" in none[1]
