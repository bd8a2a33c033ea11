"""How long a user waits before anything happens: whole processes, from start to end.

The floor is a Python that does nothing; the peer is one that imports torch.
"""

import statistics
import subprocess
import sys
import time

import pytest

ROUNDS = 15
FLOOR, TORCH = ["-c", "pass"], ["-c", "import torch"]
PROCESSES = {
    "import nanogpt": ["-c", "import nanogpt"],
    "nanogpt --help": ["-m", "nanogpt", "--help"],
    "train --help": ["-m", "nanogpt.train", "--help"],
}


def whole_process(arguments: list[str]) -> float:
    """Seconds from start to end."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True
    )
    return time.perf_counter() - started


@pytest.mark.parametrize("name", PROCESSES)
def test_startup(benchmark, record, name):
    """In turns, files in the page cache."""
    variants = {"ours": PROCESSES[name], "floor": FLOOR, "torch": TORCH}
    taken: dict[str, list[float]] = {variant: [] for variant in variants}
    for arguments in variants.values():
        whole_process(arguments)
    for _ in range(ROUNDS):
        for variant, arguments in variants.items():
            taken[variant].append(whole_process(arguments))
    benchmark.pedantic(lambda: whole_process(PROCESSES[name]), rounds=3)
    seconds = {variant: statistics.median(each) for variant, each in taken.items()}
    peers = {'python -c "import torch"': seconds["torch"]}
    record("startup", {"process": name}, "none", seconds["ours"], peers, seconds["floor"])
