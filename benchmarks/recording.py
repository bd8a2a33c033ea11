"""What every benchmark shares: clocks, rows, the ceilings of the device, JSON files."""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from nanogpt import machine

RESULTS = Path(__file__).parent / "results"
FLUSH_BYTES = 2**30
"""Written before every timed run on a GPU: empties the L2 and lets the host run ahead."""


def median_seconds(
    functions: dict[str, Callable[..., Any]],
    rounds: int | None = None,
    *,
    device: str = "cpu",
    prepare: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, float]:
    """Median time of each function, their runs interleaved so that noise hits all alike.

    Args:
        functions: by name; each runs once before it is timed.
        rounds: timed runs of each; None takes what fits about 60 ms a function, 5 to 50.
        device: "cuda" times with events after emptying the L2, "cpu" with the host's clock.
        prepare: by name, untimed work before each run; its result is the function's argument.
    """
    timed = _on_gpu if device == "cuda" else _on_host
    prepare = prepare or {}

    def run(name: str) -> Callable[[], float]:
        given = [prepare[name]()] if name in prepare else []
        return timed(lambda: functions[name](*given))

    for name in functions:
        run(name)()
    if rounds is None:
        slowest = max(run(name)() for name in functions)
        rounds = max(5, min(50, int(0.06 / slowest)))
    found: dict[str, list[Callable[[], float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name in functions:
            found[name].append(run(name))
    return {name: statistics.median(read() for read in reads) for name, reads in found.items()}


def _on_host(work: Callable[[], Any]) -> Callable[[], float]:
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return lambda: seconds


_flush: list[torch.Tensor] = []


def _on_gpu(work: Callable[[], Any]) -> Callable[[], float]:
    """Enqueue the work between two events; the time is read later, which waits for it."""
    if not _flush:
        _flush.append(torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda"))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush[0].zero_()
    start.record()
    work()
    end.record()

    def read() -> float:
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return read


def graph_seconds(calls: list[Callable[[], Any]], replays: int = 20) -> float:
    """Mean time of one of `calls`, recorded as one CUDA graph so that launching costs nothing.

    Args:
        calls: the same work on different inputs, larger together than the L2.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    reads = [_on_gpu(graph.replay) for _ in range(replays)]
    return statistics.median(read() for read in reads) / len(calls)


def make_row(
    suite: str,
    shape: dict[str, Any],
    dtype: str,
    ours_seconds: float,
    peers: dict[str, float],
    floor_seconds: float | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One row of a suite; a floor is the least time that its bytes or products allow."""
    best = min(peers, key=lambda name: peers[name]) if peers else None
    return {
        "suite": suite,
        "shape": shape,
        "dtype": dtype,
        "ours_seconds": ours_seconds,
        "peers": peers,
        "best_peer": best,
        "ratio": peers[best] / ours_seconds if best else None,
        "fraction_of_ceiling": floor_seconds / ours_seconds if floor_seconds else None,
        **extra,
    }


def describe_row(row: dict[str, Any]) -> str:
    """A row in one line."""
    shown = f"{row['suite']} {in_words(row['shape'])}, {row['dtype']}: "
    shown += f"ours {row['ours_seconds'] * 1e3:.3f} ms"
    if row["best_peer"]:
        peer = row["peers"][row["best_peer"]]
        shown += f", {row['best_peer']} {peer * 1e3:.3f} ms, ratio {row['ratio']:.2f}"
    if rate(row):
        shown += f", {rate(row)}"
    if row["fraction_of_ceiling"] is not None:
        shown += f", {row['fraction_of_ceiling']:.0%} of the ceiling"
    return shown


def in_words(shape: dict[str, Any]) -> str:
    """A shape as RESULTS.md shows it."""
    return ", ".join(f"{key} {value}" for key, value in shape.items())


def rate(row: dict[str, Any]) -> str:
    """What a row did per second, in its own unit; empty where it does not say."""
    if row.get("tokens_per_second"):
        return f"{row['tokens_per_second']:,.0f} tokens/s"
    if row.get("tflops"):
        return f"{row['tflops']:.3g} TFLOP/s"
    if row.get("bytes_per_second"):
        return bytes_rate(row["bytes_per_second"])
    return ""


def bytes_rate(value: float) -> str:
    """Bytes a second with a unit that suits them."""
    return f"{value / 1e12:.2f} TB/s" if value >= 1e12 else f"{value / 1e9:.1f} GB/s"


def flops_rate(value: float) -> str:
    """Operations a second with a unit that suits them."""
    return f"{value / 1e12:.0f} TFLOP/s" if value >= 1e13 else f"{value / 1e9:.0f} GFLOP/s"


def write_suites(
    folder: Path,
    rows: Iterable[dict[str, Any]],
    *,
    ceilings: dict[str, float],
    command: str,
    commit: str | None = None,
    **extra: Any,
) -> list[Path]:
    """One JSON file for each suite in `folder`; `extra` stands in each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, written = list(rows), []
    for suite in sorted({row["suite"] for row in rows}):
        chosen = [row for row in rows if row["suite"] == suite]
        content = {**_head(ceilings, command, commit), **extra, "rows": chosen}
        written.append(_write(folder / f"{suite}.json", content))
    return written


def write_checks(
    folder: Path,
    suite: str,
    checks: dict[str, Any],
    *,
    ceilings: dict[str, float],
    command: str,
    commit: str | None = None,
) -> Path:
    """A suite that counts instead of timing."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**_head(ceilings, command, commit), "checks": checks, "rows": []}
    return _write(folder / f"{suite}.json", content)


def _head(ceilings: dict[str, float], command: str, commit: str | None) -> dict[str, Any]:
    return {
        "device": device_name(),
        "versions": machine.versions(),
        "commit": commit or checked_out_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "ceilings": ceilings,
    }


def _write(path: Path, content: dict[str, Any]) -> Path:
    """Replace a result only by a complete one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
    return path


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


def slug(device: str) -> str:
    """The name of a device's folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def checked_out_commit() -> str:
    """Short hash of the checkout, or "unknown" outside one."""
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def measure_ceilings(quick: bool = False) -> dict[str, float]:
    """What the device just showed: reading, copying (read plus written), a large product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size, side = (2**26, 2048) if device == "cpu" else (2**30, 8192)
    if quick:
        size, side = size // 64, side // 4
    x = torch.ones(size, device=device).uniform_()
    y = torch.empty_like(x)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = median_seconds(
        {"read": x.sum, "copy": lambda: y.copy_(x), "matmul": lambda: a @ b},
        rounds=9,
        device=device,
    )
    return {
        "read_bytes_per_second": x.numel() * 4 / times["read"],
        "copy_bytes_per_second": 2 * x.numel() * 4 / times["copy"],
        "matmul_flops": 2 * side**3 / times["matmul"],
    }


class Recorder:
    """Collects the rows of one pytest session and writes them where asked to."""

    def __init__(self, ceilings: dict[str, float]) -> None:
        self.ceilings = ceilings
        self.rows: list[dict[str, Any]] = []

    def __call__(self, *arguments: Any, **extra: Any) -> None:
        """Add a row; see `make_row`."""
        row = make_row(*arguments, **extra)
        self.rows.append(row)
        print(describe_row(row))

    def write(self) -> None:
        """One JSON file for each suite, under the name of the device."""
        command = "pytest benchmarks --benchmark-only --write-results"
        folder = RESULTS / slug(device_name())
        write_suites(folder, self.rows, ceilings=self.ceilings, command=command)
