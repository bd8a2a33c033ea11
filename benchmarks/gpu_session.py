"""What every part of the GPU suite has: its share of the time, its journal, its failures.

A part writes what it finds into a journal, one JSON object a line, as soon as it has it: a part
that hangs or dies leaves what it had.
"""

import gc
import json
import math
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from nanogpt.measuring import describe_row, make_row, measure_ceilings, median_seconds

_UNAVAILABLE = re.compile(r"cannot run: (.*)", re.S)


class DeviceLost(Exception):
    """The device answers nothing any more, as after an illegal memory access."""


class Session:
    """One part while it runs.

    Args:
        device: "cuda" or "cpu".
        quick: tiny shapes, few repeats.
        impl: the implementation that stands as ours.
        seconds: the part's share of the time.
        journal: the file of what it finds.
        ceilings: of the device, in this run.
    """

    def __init__(
        self,
        *,
        device: str,
        quick: bool,
        impl: str,
        seconds: float,
        journal: Path,
        ceilings: dict[str, float],
    ) -> None:
        self.device = device
        self.quick = quick
        self.impl = impl
        self.ceilings = ceilings
        self.tiny = quick and device == "cpu"
        self.fell_back = False
        self._deadline = time.monotonic() + seconds
        self._journal = journal

    def say(self, text: str) -> None:
        print(text, flush=True)

    def emit(self, kind: str, **content: Any) -> None:
        with self._journal.open("a") as file:
            file.write(json.dumps({"kind": kind, **content}) + "\n")

    def left(self) -> float:
        """Seconds left of the share."""
        return self._deadline - time.monotonic()

    def has_time(self, what: str, seconds: float = 1.0) -> bool:
        """Whether that much is left; says what is skipped where it is not."""
        if self.left() >= seconds:
            return True
        self.say(f"SKIPPED, out of time: {what}")
        self.emit("skipped", what=what)
        return False

    def note(self, text: str) -> None:
        self.say(text)
        self.emit("note", text=text)

    def fail(self, what: str, why: str) -> None:
        self.say(f"FAILED {what}: {why}")
        self.emit("failure", what=what, why=why)

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Report a failure inside and go on, unless the device is lost."""
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            self.fail(what, last_lines(error))
            self.check_device()
        finally:
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def check_device(self) -> None:
        """Raises: DeviceLost where the device answers no more."""
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceLost(str(error).splitlines()[0]) from None

    def runs(self, what: str, function: Callable[[], Any], *, peer: bool = False) -> bool:
        """Whether a function runs here; says why not. A peer's error is a note, ours a failure."""
        try:
            function()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return True
        except Exception as error:
            reason = unavailable(error)
            if reason is not None or peer:
                self.note(f"not available: {what}: {reason or one_line(error)}")
            else:
                self.fail(what, last_lines(error))
            self.check_device()
        return False

    def ours(
        self, what: str, variants: dict[str, Callable[[str], Callable[[], Any]]]
    ) -> dict[str, Callable[[], Any]]:
        """The variants that run, under their full names.

        Args:
            variants: name of the variant ("" for the plain one) -> implementation -> function.
        """
        found: dict[str, Callable[[], Any]] = {}
        for impl in (self.impl, "auto"):
            for variant, make in variants.items():
                name = f"{impl}, {variant}" if variant else impl
                function = make(impl)
                if self.runs(f"{name} of {what}", function):
                    found[name] = function
            # A trial run on a CPU proves the script, not the kernels.
            if found or not self.tiny or self.impl == "auto":
                break
        return found

    def peers(
        self, what: str, functions: dict[str, Callable[[], Any]]
    ) -> dict[str, Callable[[], Any]]:
        """Those that run here."""
        return {
            name: function
            for name, function in functions.items()
            if self.runs(f"{name} of {what}", function, peer=True)
        }

    def times(
        self,
        functions: dict[str, Callable[..., Any]],
        prepare: dict[str, Callable[[], Any]] | None = None,
    ) -> dict[str, float]:
        """Median seconds of each."""
        rounds = 2 if self.tiny else 5 if self.quick else None
        return median_seconds(functions, rounds, device=self.device, prepare=prepare)

    def row(
        self,
        suite: str,
        shape: dict[str, Any],
        dtype: torch.dtype,
        ours_seconds: float,
        peers: dict[str, float],
        *,
        flops: float | None = None,
        nbytes: float | None = None,
        **extra: Any,
    ) -> None:
        """Print and keep a row; its operations or bytes give the rate and the floor."""
        floor = None
        if flops is not None:
            extra["tflops"] = flops / ours_seconds * 1e-12
            floor = flops / self.ceilings.get("matmul_flops", math.inf)
        elif nbytes is not None:
            extra["bytes_per_second"] = nbytes / ours_seconds
            floor = nbytes / self.ceilings.get("copy_bytes_per_second", math.inf)
        name = str(dtype).removeprefix("torch.")
        row = make_row(suite, shape, name, ours_seconds, peers, floor, **extra)
        self.say(describe_row(row))
        self.emit("row", row=row)

    def peak_bytes(self, function: Callable[[], Any]) -> int | None:
        """The most memory a function takes beside what is there already; None on a CPU."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def compiled(self, function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
        """torch.compile, for these shapes alone; without code generation in a trial on a CPU."""
        if self.tiny:
            return torch.compile(function, backend="aot_eager", dynamic=False)
        return torch.compile(function, dynamic=False, mode=mode)


def run_ceilings(session: Session) -> None:
    """What this device does in this run."""
    found = measure_ceilings(session.quick)
    session.emit("ceilings", ceilings=found)
    session.say(
        f"ceilings: copy {found['copy_bytes_per_second'] * 1e-12:.3f} TB/s (read plus written), "
        f"read {found['read_bytes_per_second'] * 1e-12:.3f} TB/s, "
        f"matmul {found['matmul_flops'] * 1e-12:.1f} TFLOP/s"
    )


def unavailable(error: Exception) -> str | None:
    """The reason where an implementation says that it cannot run, or None for an error."""
    found = _UNAVAILABLE.search(str(error)) if isinstance(error, RuntimeError) else None
    return one_line(found[1]) if found else None


def one_line(error: Exception | str) -> str:
    """The first line that says something, not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else repr(error)
    return text if len(text) <= 160 else text[:157] + "…"


def last_lines(error: Exception) -> str:
    """Where it happened and what it said, in a few lines."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames]
    message = [line for line in str(error).splitlines() if line.strip()]
    return "\n    ".join([type(error).__name__, *message[-3:], "at " + " > ".join(places)])


@contextmanager
def deterministic(fill: bool = False) -> Iterator[None]:
    """Only operations that two runs repeat bit for bit; `fill` poisons uninitialised memory."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
