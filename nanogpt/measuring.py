"""Measurements: clocks, what the device can do at most, and rows of ours beside others'.

Both `nanogpt bench` and the suites under benchmarks/ are made of these.
"""

import math
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 2**30
"""Written before every timed run on a GPU: empties the L2 and lets the host run ahead."""


_LONGEST_PRODUCT = 1.0
"""Seconds of one of the products that show the device's rate."""


def median_seconds(
    functions: dict[str, Callable[..., Any]],
    rounds: int | None = None,
    *,
    device: str = "cpu",
    prepare: dict[str, Callable[[], Any]] | None = None,
    budget_seconds: float | None = None,
    outrun: float = math.inf,
) -> dict[str, float]:
    """Median time of each function, their runs interleaved so that noise hits all alike.

    Args:
        functions: by name; each runs once before it is timed.
        rounds: timed runs of each; None takes what fits about 60 ms a function, 5 to 50.
        device: "cuda" times with events after emptying the L2, "cpu" with the host's clock.
        prepare: by name, untimed work before each run; its result is the function's argument.
        budget_seconds: without `rounds`, about how long all of it may take; one round at least.
        outrun: one whose first timed run takes more than this many times the shortest is left at
            that run: bfloat16 on a processor without it is a hundred times slower than float32.
    """
    if not functions:
        return {}
    timed = {"cuda": timed_on_gpu, "mps": _timed_on_mps}.get(device, _timed_on_host)
    prepare = prepare or {}

    def run(name: str) -> Callable[[], float]:
        given = [prepare[name]()] if name in prepare else []
        return timed(lambda: functions[name](*given))

    started = time.perf_counter()
    for name in functions:
        run(name)()
    if rounds is None and budget_seconds is not None:
        # The first runs were slower than those to come, if anything.
        taken = max(time.perf_counter() - started, 1e-9)
        rounds = max(1, min(50, int(budget_seconds / taken) - 1))
    elif rounds is None:
        slowest = max(run(name)() for name in functions)
        rounds = max(5, min(50, int(0.06 / slowest)))
    found = {name: [run(name)] for name in functions}
    if rounds > 1 and math.isfinite(outrun):
        first = {name: reads[0]() for name, reads in found.items()}
        functions = {
            name: each
            for name, each in functions.items()
            if first[name] <= outrun * min(first.values())
        }
    for _ in range(rounds - 1):
        for name in functions:
            found[name].append(run(name))
    return {name: statistics.median(read() for read in reads) for name, reads in found.items()}


def _timed_on_host(work: Callable[[], Any]) -> Callable[[], float]:
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return lambda: seconds


def _timed_on_mps(work: Callable[[], Any]) -> Callable[[], float]:
    def finished() -> None:
        work()
        torch.mps.synchronize()

    return _timed_on_host(finished)


_flush: list[torch.Tensor] = []


def timed_on_gpu(work: Callable[[], Any]) -> Callable[[], float]:
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


_VECTORS = {"avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}


def device_name(device: str | None = None) -> str:
    """GPU, or processor, vector instructions and threads; None takes the GPU where there is one."""
    if torch.cuda.is_available() and device in (None, "cuda"):
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = _processor(info.read_text()) or name
    return f"{name}, {torch.get_num_threads()} threads"


def _processor(info: str) -> str | None:
    """Of /proc/cpuinfo; one model name covers generations that differ in what they compute with."""
    model = re.search(r"^model name\s*:\s*(.+)", info, re.MULTILINE)
    if model is None:
        return None
    found = re.search(r"^flags\s*:(.*)", info, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    vectors = next((shown for flag, shown in _VECTORS.items() if flag in flags), None)
    return f"{model[1]} ({vectors})" if vectors else model[1]


def measure_ceilings(quick: bool = False, device: str | None = None) -> dict[str, float]:
    """What the device just showed: reading, copying (read plus written), large products.

    "matmul_flops" is the rate of the precision that training takes without being asked: bfloat16 on
    a GPU, float32 elsewhere; "matmul_flops_bfloat16" stands beside it on a CPU.

    Args:
        quick: a 64th of the work, for trials.
        device: "cuda" or "cpu"; None takes the GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size, side = (2**26, 2048) if device == "cpu" else (2**30, 8192)
    if quick:
        size, side = size // 64, side // 4
    x = torch.ones(size, device=device).uniform_()
    y = torch.empty_like(x)
    times = median_seconds(
        {"read": x.sum, "copy": lambda: y.copy_(x)},
        rounds=9,
        device=device,
    )
    found = {
        "read_bytes_per_second": x.numel() * 4 / times["read"],
        "copy_bytes_per_second": 2 * x.numel() * 4 / times["copy"],
    }
    if device == "cuda":
        return found | {"matmul_flops": _matmul_flops(torch.bfloat16, side, device)}
    return found | {
        "matmul_flops": _matmul_flops(torch.float32, side, device),
        "matmul_flops_bfloat16": _matmul_flops(torch.bfloat16, side, device),
    }


def matmul_ceiling(ceilings: dict[str, float], dtype: torch.dtype) -> float:
    """Operations a second of products in a precision, of what `measure_ceilings` gives."""
    precise = ceilings["matmul_flops"]
    return ceilings.get("matmul_flops_bfloat16", precise) if dtype != torch.float32 else precise


def _matmul_flops(dtype: torch.dtype, side: int, device: str) -> float:
    """The rate of a product of two (side, side) matrices, smaller where it would take seconds.

    (A processor without bfloat16 may take a thousand times as long.)
    """

    def seconds(side: int, rounds: int) -> float:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        return median_seconds({"matmul": lambda: a @ b}, rounds, device=device)["matmul"]

    small = min(256, side)
    taken = seconds(small, 1)
    while side > small and taken * (side / small) ** 3 > _LONGEST_PRODUCT:
        side //= 2
    return 2 * side**3 / seconds(side, 9)


def make_row(
    suite: str,
    shape: dict[str, Any],
    dtype: str,
    ours_seconds: float,
    peers: dict[str, float],
    floor_seconds: float | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One row of a suite.

    Args:
        peers: name -> seconds of the same work.
        floor_seconds: the least time that its bytes or products allow.
        extra: what else is known: "tokens_per_second", "tflops", "bytes_per_second", "peak_bytes",
            or "also", words and numbers that stand beside the row.
    """
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
    shown += f"ours {duration(row['ours_seconds'])}"
    if row["best_peer"]:
        peer = row["peers"][row["best_peer"]]
        shown += f", {row['best_peer']} {duration(peer)}, ratio {row['ratio']:.2f}"
    if rate(row):
        shown += f", {rate(row)}"
    if row.get("also"):
        shown += f", {in_words(row['also'])}"
    if row["fraction_of_ceiling"] is not None:
        shown += f", {row['fraction_of_ceiling']:.0%} of the ceiling"
    return shown


def duration(seconds: float) -> str:
    """A time as it is shown: milliseconds, and seconds from ten on."""
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds * 1e3:.3f} ms"


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
