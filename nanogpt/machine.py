"""What this machine offers: device, precision, threads, versions."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata as distributions

import torch

from nanogpt import kernels
from nanogpt.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device for --device.

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
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError(f"--device {name}: this machine has no Apple GPU; use cpu or auto")
    elif device.type != "cpu":
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}")
    return device


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
