"""What this machine offers: device, precision, threads, memory, versions."""

import contextlib
import functools
import gc
import math
import os
import platform
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata as distributions
from pathlib import Path

import torch

from nanogpt import kernels
from nanogpt.errors import UsageError

_PRODUCT_SIDE = 256
"""Of the square matrices whose product is timed: a few milliseconds even where it is emulated."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
"""Limit and use of the group of processes that this one belongs to, in its two versions."""


def resolve_device(name: str) -> torch.device:
    """The device for --device. A GPU that is named by its number becomes torch's current one.

    Raises: UsageError where it does not exist here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UsageError(f"--device {name}: this machine has no CUDA device; use cpu or auto")
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: this machine has {count} CUDA device(s), from 0")
        if device.index:
            torch.cuda.set_device(device)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError(f"--device {name}: this machine has no Apple GPU; use cpu or auto")
    elif device.type != "cpu":
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}")
    return device


@functools.cache
def has_matrix_tiles() -> bool:
    """Whether the CPU has AMX, with which torch's products of bfloat16 are hard to beat."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def resolve_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of the products for --dtype, and why.

    Raises: UsageError where the device cannot compute in it.
    """
    if name == "auto":
        if device.type != "cuda":
            return torch.float32, "auto: the exact choice on this device"
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "auto: this GPU has bfloat16"
        return torch.float16, "auto: this GPU has no bfloat16"
    if name == "float16" and device.type == "mps":
        raise UsageError("--dtype float16 needs loss scaling, which mps lacks: use float32")
    return DTYPES[name], "asked for"


def products_slowdown(dtype: torch.dtype) -> float:
    """How many times as long the CPU takes for torch's products in a precision as in float32.

    One thread computes them: threads that wait for each other on a busy machine hide it.
    """
    seconds = dict.fromkeys((torch.float32, dtype), math.inf)
    operands = {each: torch.ones(_PRODUCT_SIDE, _PRODUCT_SIDE, dtype=each) for each in seconds}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(3):  # by turns, so that another program's work falls on both
            for each, one in operands.items():
                started = time.perf_counter()
                one @ one
                seconds[each] = min(seconds[each], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return seconds[dtype] / seconds[torch.float32]


def check_kernels(impl: str, device: torch.device) -> str:
    """What --kernels resolves to on a device, in words.

    Raises: UsageError where a named implementation cannot run there.
    """
    reason = kernels.unsupported(impl, device)
    if reason is not None:
        raise UsageError(f"--kernels {impl}: {reason}; use auto")
    return kernels.describe(impl, device)


def set_threads(threads: int | None) -> str:
    """Apply --threads; says what was picked."""
    if threads is not None:
        torch.set_num_threads(threads)
        return f"{threads} (asked for)"
    return f"{torch.get_num_threads()} (auto: one per core)"


def resident_bytes() -> int:
    """What this process takes of the main memory now; 0 where the system does not say."""
    return _status("VmRSS")


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has taken since `forget_peak`: of the device, else main."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def give_back_memory() -> None:
    """Give back what torch keeps of a computation that was cut off."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_bytes(device: torch.device) -> int | None:
    """Memory that a run may still take on a device, or None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for later and does not use is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [size] if (size := _available_in_system()) is not None else []
    for limit, used in _GROUP_FILES:
        # "max" stands where a group of processes has no limit.
        with contextlib.suppress(OSError, ValueError):
            limits.append(max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(max(0, soft - _status("VmSize")))
    return min(limits, default=None)


def _available_in_system() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def _status(name: str) -> int:
    """A size in /proc/self/status, in bytes; 0 where there is none."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return 0
    return 0 if found is None else int(found[1]) * 1024


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Products in `dtype`, weights in float32."""
    if dtype == torch.float32:
        yield
    else:
        with torch.autocast(device.type, dtype=dtype):
            yield


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the processor."""
    found = {"python": platform.python_version()}
    for name, distribution in (
        ("nanogpt", "personal-nanogpt"),
        ("torch", "torch"),
        ("triton", "triton"),
        ("numpy", "numpy"),
        ("tokenizers", "tokenizers"),
    ):
        try:
            found[name] = distributions.version(distribution)
        except distributions.PackageNotFoundError:
            found[name] = "not installed"
    found["system"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
