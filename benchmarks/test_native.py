"""The generation binary against llama.cpp and the read limit: rates, start, memory.

pytest benchmarks/test_native.py --benchmark-only --llama-dir DIR

DIR holds llama-bench and llama-simple, which are built from the sources inside llama-cpp-python:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B llama -DCMAKE_BUILD_TYPE=Release \
        -DLLAMA_CURL=OFF && cmake --build llama --target llama-bench llama-simple

Both read files that `nanogpt.export` wrote from the same model with random weights. Processes take
turns, so that noise hits both sides alike; every figure is the median of its rounds.
"""

import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt import GPT
from nanogpt.export import export_model
from nanogpt.native import program
from nanogpt.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, byte_symbols

SHAPES = {
    "M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "bias": False},
    "L": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "bias": True},
}
DTYPES = {"none": "float32", "bf16": "bfloat16", "int8": "int8"}
THREADS, ROUNDS = 2, 5


def gpt2_sized_tokenizer() -> BPETokenizer:
    """50,257 ids whose merges are random: as much to load as GPT-2's, with nothing to download."""
    draw = random.Random(0)
    names = list(byte_symbols().values())
    letters = [name for name in names if name.isalpha()][:60]
    grown, merges, known = list(letters), [], set(names)
    while len(names) < 50256:
        first, second = draw.choice(grown), draw.choice(letters)
        if len(first) < 12 and first + second not in known:
            known.add(first + second)
            names.append(first + second)
            grown.append(first + second)
            merges.append([first, second])
    template = BPETokenizer.train(iter(["a"]), 257).to_dict()["tokenizer"]
    template["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    template["model"]["merges"] = merges
    template["added_tokens"][0]["id"] = len(names)
    return BPETokenizer(template)


def make_model(name: str) -> GPT:
    """Random weights; a vocabulary of 96 characters or one of GPT-2's size."""
    tokenizer: Tokenizer = (
        CharTokenizer("".join(map(chr, range(32, 127)))) if name == "M" else gpt2_sized_tokenizer()
    )
    torch.manual_seed(0)
    model = GPT(vocab_size=tokenizer.vocab_size, **SHAPES[name]).eval()
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="session")
def binary() -> Path:
    found = program()
    if found is None:
        pytest.skip("the generation binary is not built: make build")
    return found


@pytest.fixture(scope="session")
def llama(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--llama-dir")
    if folder is None:
        pytest.skip("llama.cpp is measured with --llama-dir, a folder with llama-bench")
    return Path(folder)


@pytest.fixture(scope="session", params=SHAPES)
def model(request: pytest.FixtureRequest) -> tuple[str, GPT]:
    return request.param, make_model(request.param)


@pytest.fixture(scope="session", params=DTYPES)
def files(
    request: pytest.FixtureRequest, model: tuple[str, GPT], tmp_path_factory: Any
) -> dict[str, Any]:
    """One model at one precision, in our format and in llama.cpp's."""
    name, gpt = model
    folder = tmp_path_factory.mktemp(f"{name}-{request.param}")
    ours, theirs = folder / "model.pt", folder / "model.gguf"
    export_model(gpt, ours, quantize=request.param, verify=False)
    export_model(gpt, theirs, format="gguf", quantize=request.param, verify=False)
    return {"name": name, "config": gpt.config, "quantize": request.param, "pt": ours,
            "gguf": theirs}  # fmt: skip


def run_json(command: list[Any]) -> Any:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def our_rates(binary: Path, files: dict[str, Any]) -> dict[str, float]:
    found = run_json(
        [binary, files["pt"], "--bench", "--json", "--threads", THREADS, "--repetitions", 3]
    )
    rates = {row["test"]: row["median"] for row in found["tests"]}
    return rates | {"read limit": found["read_limit_tokens_per_second"]}


def their_rates(llama: Path, files: dict[str, Any]) -> dict[str, float]:
    longest = min(512, files["config"].block_size)
    rows = run_json(
        [llama / "llama-bench", "-m", files["gguf"], "-t", THREADS, "-r", 3, "-o", "json",
         "-p", f"64,{longest}", "-n", 128]
    )  # fmt: skip
    return {
        f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}": statistics.median(
            row["samples_ts"]
        )
        for row in rows
    }


def test_rates_beside_llama_cpp(benchmark, record, binary, llama, files):
    """Prompt processing and decoding, in turns, at the same precision and number of threads."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(their_rates(llama, files))
        ours.append(our_rates(binary, files))
    benchmark.pedantic(lambda: our_rates(binary, files), rounds=1)

    def median(rounds: list[dict[str, float]], test: str) -> float:
        return statistics.median(found[test] for found in rounds)

    limit = median(ours, "read limit")
    for test in theirs[0]:
        record(
            "native",
            {"model": files["name"], "test": test, "threads": THREADS},
            DTYPES[files["quantize"]],
            1 / median(ours, test),
            {"llama.cpp": 1 / median(theirs, test)},
            1 / limit if test.startswith("tg") else None,
            tokens_per_second=median(ours, test),
        )


def whole_process(command: list[Any]) -> float:
    """Seconds from start to end of a process."""
    started = time.perf_counter()
    process = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    seconds = time.perf_counter() - started
    assert process.returncode == 0, command
    return seconds


def kv_cache_bytes(files: dict[str, Any]) -> int:
    """Keys and values of a full context; bfloat16 beside narrow weights."""
    shape = files["config"]
    width = 4 if files["quantize"] == "none" else 2
    return 2 * shape.n_layer * shape.block_size * shape.n_embd * width


LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(os.wait4(process.pid, 0)[2].ru_maxrss * 1024)
"""


def peak_bytes(command: list[Any]) -> int:
    """The most memory a process held. Its count begins with its parent's, so that one is small."""
    words = [sys.executable, "-S", "-E", "-c", LAUNCHER, *(str(part) for part in command)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def test_one_token_from_start_to_exit(benchmark, record, binary, llama, files):
    """Start, load, check, a prompt of five tokens, one token, exit; files in the page cache."""
    prompt = "abcde" if files["name"] == "M" else "a b c d e"
    ours = [binary, files["pt"], "--prompt", prompt, "--max-new-tokens", 1, "--temperature", 0,
            "--threads", THREADS]  # fmt: skip
    theirs = [llama / "llama-simple", "-m", files["gguf"], "-n", 1, prompt]
    commands = {"ours": ours, "llama.cpp": theirs}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        whole_process(command)
    for _ in range(15):
        for name, command in commands.items():
            taken[name].append(whole_process(command))
    benchmark.pedantic(lambda: whole_process(ours), rounds=3)
    seconds = {name: statistics.median(runs) for name, runs in taken.items()}
    peaks = {name: max(peak_bytes(command) for _ in range(3)) for name, command in commands.items()}
    record(
        "native",
        {"model": files["name"], "test": "whole process, one token", "threads": THREADS},
        DTYPES[files["quantize"]],
        seconds["ours"],
        {"llama.cpp": seconds["llama.cpp"]},
        peak_bytes=peaks["ours"],
        peer_peak_bytes=peaks["llama.cpp"],
        file_bytes=files["pt"].stat().st_size,
        kv_cache_bytes=kv_cache_bytes(files),
    )
