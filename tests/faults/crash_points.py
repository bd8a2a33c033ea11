"""A save that is cut off at every system call that writes, syncs, names or removes anything.

A forked process saves a checkpoint beside an older one under strace, which makes one of its calls
fail, or kills the process before or after it. Whatever happens, the newest checkpoint that loads
is the older one or the whole new one, it is the new one where the save said that it was done, and
the next save succeeds. A short write is one into a file that may grow no further.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from faults.damage import _content_of_model, tiny_model
from nanogpt import checkpoint
from nanogpt.run_directory import RunDirectory

CALLS = (
    "write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2",
    "link", "linkat", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "ftruncate", "truncate",
)  # fmt: skip
FAULTS = {
    "kill before": "error=EINTR:signal=KILL",
    "kill after": "signal=KILL",
    "ENOSPC": "error=ENOSPC",
    "EIO": "error=EIO",
}
OLDER, NEW, NEXT = (1, 2), 3, 4
"""Steps of the checkpoints; the oldest goes when the new one is there."""
_SAVED, _FAILED = 0, 3
Save = Callable[[Path], None]


def why_not() -> str:
    """Why the harness cannot run here, or ""."""
    if shutil.which("strace") is None:
        return "strace is not installed (apt-get install strace)"
    probe = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "strace may not trace processes here"


def trainer_state(step: int) -> dict[str, Any]:
    """What stands in for an optimizer."""
    return {"optimizer": {"step": step, "m": torch.full((8,), float(step))}}


def save_checkpoint(path: Path, step: int = NEW) -> None:
    """The project's own save, into a run directory."""
    with RunDirectory(path, warn=lambda sentence: None) as folder:
        folder.save(step, tiny_model(step), trainer_state(step), {}, tiny_model(9))


def save_carelessly(path: Path) -> None:
    """A save that is not atomic: over the older checkpoint's file, in its place."""
    newest = max((path / "checkpoints").iterdir())
    with (newest / "model.safetensors").open("wb") as file:
        checkpoint.write_tensors(dict(tiny_model(NEW).state_dict()), file)


def make_run(path: Path) -> None:
    """A run directory with two checkpoints."""
    with RunDirectory(path, warn=lambda sentence: None) as folder:
        folder.begin({"identity": {}}, {})
    for step in OLDER:
        save_checkpoint(path, step)


@dataclass
class Report:
    """Counts of what was injected by call and fault, and what came of it.

    Attributes:
        tried: (call, fault) to how often.
        outcomes: "the older one" or "the new one", to how often.
        failures: sentences.
    """

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def as_rows(self) -> list[dict[str, Any]]:
        """JSON-ready: for each call how often each fault was tried."""
        calls = list(dict.fromkeys(call for call, _ in self.tried))
        kinds = list(dict.fromkeys(kind for _, kind in self.tried))
        return [{"call": call, **{k: self.tried[call, k] for k in kinds}} for call in calls]


def run(save: Save = save_checkpoint, *, every: int = 1, short_writes: int = 40) -> Report:
    """Every call times every fault; with `every` above 1 a part of them, evenly."""
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder / "run")
        expected = {step: _content_of_model(tiny_model(step), None)[3] for step in (*OLDER, NEW)}
        numbers = _count_calls(save, folder)
        points = [(call, n) for call, count in numbers.items() for n in range(1, count + 1)]
        trials = [(call, n, fault) for call, n in points for fault in FAULTS]
        for call, n, fault in trials[::every]:
            how = f"inject={call}:{FAULTS[fault]}:when={n}"
            ended = _in_a_copy(save, folder, trace=how)
            _judge(report, folder, expected, ended, (call, fault), f"{call} {n}, {fault}")
        largest = max(p.stat().st_size for p in (folder / "run").rglob("*") if p.is_file())
        for number in range(0, short_writes, every):
            limit = 1 + largest * number // short_writes
            ended = _in_a_copy(save, folder, limit=limit)
            what = f"files of {limit:,} bytes at most"
            _judge(report, folder, expected, ended, ("write", "short write"), what)
    return report


def _count_calls(save: Save, folder: Path) -> dict[str, int]:
    log = folder / "calls.txt"
    status = _in_a_copy(save, folder, trace=f"trace={','.join(CALLS)}", log=log)
    assert status == _SAVED, f"the save failed with nothing injected: {status}"
    names = re.findall(r"^(?:\[pid +\d+\] |\d+ +)?(\w+)\(", log.read_text(), re.MULTILINE)
    counts = Counter(name for name in names if name in CALLS)
    return {call: counts[call] for call in CALLS if counts[call]}


def _in_a_copy(
    save: Save, folder: Path, *, trace: str = "", log: Path | None = None, limit: int = 0
) -> int:
    """Fork, save in a copy of the run under strace; the exit status, negative for a signal."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / "run", work)
    hold, release = os.pipe()
    child = os.fork()
    if child == 0:
        status = _FAILED
        try:
            torch.set_num_threads(1)
            os.close(release)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.read(hold, 1)
            if limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save(work)
            status = _SAVED
        except OSError:
            pass
        finally:
            os._exit(status)
    os.close(hold)
    tracer = None
    if trace:
        tracer = attach(child, "-e", trace, "-o", str(log or os.devnull))
    os.write(release, b".")
    os.close(release)
    _, status = os.waitpid(child, 0)
    if tracer is not None:
        tracer.communicate()
    return os.waitstatus_to_exitcode(status)


def attach(child: int, *flags: str) -> "subprocess.Popen[str]":
    """strace on a process and its threads; returns once it watches."""
    command = ["strace", "-f", "-p", str(child), *flags]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    attached = tracer.stderr.readline()
    assert "attached" in attached, attached
    return tracer


def _judge(
    report: Report,
    folder: Path,
    expected: dict[int, Any],
    ended: int,
    key: tuple[str, str],
    what: str,
) -> None:
    """Whether the run is as it must be after a save that ended so."""
    work = folder / "work"
    report.tried[key] += 1
    try:
        with RunDirectory(work, warn=lambda sentence: None) as directory:
            newest = directory.newest()
            if newest is None:
                report.failures.append(f"{what}: no checkpoint loads")
                return
            step = newest.state["step"]
            model = checkpoint.load(newest.folder / "model.safetensors")[0]
            newest.load_trainer()
        if _content_of_model(model, None)[3] != expected[step]:
            report.failures.append(f"{what}: the checkpoint {step} is not what was saved")
        if ended == _SAVED and step != NEW:
            report.failures.append(f"{what}: the save said that it was done, and is lost")
        if step < OLDER[-1]:
            report.failures.append(f"{what}: the newest of the older ones is lost")
        save_checkpoint(work, NEXT)
        with RunDirectory(work, warn=lambda sentence: None) as directory:
            newest = directory.newest()
            if newest is None or newest.state["step"] != NEXT:
                report.failures.append(f"{what}: the next save is not found")
            elif any(p.name.endswith(".tmp") for p in (work / "checkpoints").iterdir()):
                report.failures.append(f"{what}: something unfinished is left for ever")
        report.outcomes["the new one" if step == NEW else "the older one"] += 1
    except Exception as error:
        report.failures.append(f"{what}: {type(error).__name__}: {error}")
