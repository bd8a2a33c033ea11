"""Measurements: ours, the peers and the floor in one run, as rows that RESULTS.md is made from.

pytest benchmarks --benchmark-only                       this machine
pytest benchmarks --benchmark-only --write-results       … and benchmarks/results/<device>/
pytest benchmarks --benchmark-only --peer-dir DIR        … beside a checkout of nanoGPT
"""

import importlib.util
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nanogpt import machine

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="write benchmarks/results/")
    parser.addoption("--peer-dir", help="a checkout of nanoGPT to measure beside ours")


@pytest.fixture(scope="session")
def nanogpt_peer(request: pytest.FixtureRequest) -> ModuleType:
    """nanoGPT's model.py from --peer-dir, where the user has a checkout."""
    folder = request.config.getoption("--peer-dir")
    if folder is None:
        pytest.skip("the peer is measured with --peer-dir pointing at a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_peer", Path(folder) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_peer"] = module
    spec.loader.exec_module(module)
    return module


def median_seconds(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each function, their runs interleaved so that noise hits all alike."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


class Recorder:
    """Collects rows of one session and writes them where asked to."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __call__(
        self,
        suite: str,
        shape: dict[str, Any],
        dtype: str,
        ours_seconds: float,
        peers: dict[str, float],
        floor_seconds: float | None = None,
    ) -> None:
        """Add a row; a floor is the least time that the operation's bytes or products allow."""
        best = min(peers, key=lambda name: peers[name]) if peers else None
        ratio = peers[best] / ours_seconds if best else None
        fraction = floor_seconds / ours_seconds if floor_seconds else None
        self.rows.append(
            {
                "suite": suite,
                "shape": shape,
                "dtype": dtype,
                "ours_seconds": ours_seconds,
                "peers": peers,
                "best_peer": best,
                "ratio": ratio,
                "fraction_of_ceiling": fraction,
            }
        )
        shown = f"{suite} {shape} {dtype}: ours {ours_seconds * 1e3:.3f} ms"
        if ratio is not None:
            shown += f", {best} {peers[best] * 1e3:.3f} ms, ratio {ratio:.2f}"
        if fraction is not None:
            shown += f", {fraction:.0%} of the ceiling"
        print(shown)

    def write(self) -> None:
        """One JSON file for each suite, under the name of the device."""
        device = device_name()
        for suite in sorted({row["suite"] for row in self.rows}):
            content = {
                "device": device,
                "versions": machine.versions(),
                "commit": _commit(),
                "date": time.strftime("%Y-%m-%d"),
                "command": "pytest benchmarks --benchmark-only --write-results",
                "ceilings": measure_ceilings(),
                "rows": [row for row in self.rows if row["suite"] == suite],
            }
            folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{suite}.json").write_text(json.dumps(content, indent=1) + "\n")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Any:
    """Recorder of the session."""
    recorder = Recorder()
    yield recorder
    if request.config.getoption("--write-results"):
        recorder.write()


def device_name() -> str:
    """GPU, or processor and threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def measure_ceilings() -> dict[str, float]:
    """What the device just showed: reading speed and the rate of a large product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.ones(2**26, device=device)
    a = torch.randn(2048, 2048, device=device, dtype=dtype)

    def synchronised(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            work()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    times = median_seconds(
        {"read": synchronised(lambda: x.sum()), "matmul": synchronised(lambda: a @ a)}, rounds=9
    )
    return {
        "read_bytes_per_second": x.numel() * 4 / times["read"],
        "matmul_flops": 2 * 2048**3 / times["matmul"],
    }


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """Measured once a session."""
    return measure_ceilings()


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULTS,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
