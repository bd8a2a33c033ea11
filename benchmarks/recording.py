"""What every benchmark shares: rows collected and written as JSON files."""

import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nanogpt import machine
from nanogpt.measuring import describe_row, device_name, make_row, timed_on_gpu

RESULTS = Path(__file__).parent / "results"


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
    reads = [timed_on_gpu(graph.replay) for _ in range(replays)]
    return statistics.median(read() for read in reads) / len(calls)


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


def nanogpt_model(folder: Path) -> ModuleType:
    """model.py of a checkout of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_peer", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_peer"] = module
    spec.loader.exec_module(module)
    return module


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
