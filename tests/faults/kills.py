"""Runs that are killed at random moments, again and again, and go on each time.

Every configuration is run once without interruption. Then the same command is started in forked
processes, killed at random moments, and started again until it finishes: the model file must be
the same bit by bit, the metrics the same line by line without a gap or a repeat, and no checkpoint
that was there before a kill may be missing after it.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import cli

_TINY = [
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--n-embd",
    "16",
    "--block-size",
    "16",
    "--batch-size",
    "8",
    "--threads",
    "1",
    "--device",
    "cpu",
]
_TRAIN = [
    "train", "--text", "{data}/text.txt", *_TINY, "--max-steps", "40", "--eval-interval", "4",
    "--sample-tokens", "8", "--no-tensorboard",
]  # fmt: skip
CONFIGURATIONS: dict[str, list[str]] = {
    "plain": _TRAIN,
    "accumulation": [*_TRAIN, "--micro-batch-size", "3"],
    "dropout": [*_TRAIN, "--dropout", "0.2", "--bias"],
    "bfloat16": [*_TRAIN, "--dtype", "bfloat16"],
    "rewards": ["advanced", "--offline-data", "{data}/rewards.txt", *_TINY, "--epochs", "2"],
    "rounds": [
        "advanced", "--align-terms", "times", "--init", "{data}/begin.pth", "--anchor-text",
        "{data}/text.txt", "--rounds", "2", "--num-generations", "16", "--max-completion-length",
        "12", "--batch-size", "8", "--threads", "1", "--device", "cpu",
    ],
    "explore": [
        "explore", "--data", "{data}/table.csv", "--n-layer", "1", "--n-head", "1", "--n-embd", "8",
        "--epochs", "1", "--folds", "2", "--threads", "1", "--device", "cpu",
    ],
}  # fmt: skip
_UNEVEN = ("seconds", "tokens_per_second")  # of metrics.jsonl: what the clock says


def make_data(folder: Path) -> None:
    """A text, rewarded lines, a table and a model to begin with."""
    lines = [f"{n} times {m} is {n * m}.\n" for n in range(2, 22) for m in range(2, 22)]
    (folder / "text.txt").write_text("".join(lines))
    rewarded = [f"{line.strip()}|{(-1) ** k}\n" for k, line in enumerate(lines[:120])]
    (folder / "rewards.txt").write_text("".join(rewarded))
    rng = np.random.default_rng(0)
    rows = [f"{a},{a * 2},{rng.choice(['x', 'y'])}\n" for a in rng.integers(0, 4, 60).tolist()]
    (folder / "table.csv").write_text("a,b,c\n" + "".join(rows))
    begin = [*_TRAIN, "--output", "{data}/begin.pth", "--run-dir", "{data}/begin"]
    assert _run(_filled(begin, folder), folder / "log.txt") == 0, (folder / "log.txt").read_text()


def _filled(arguments: Sequence[str], data: Path) -> list[str]:
    return [each.replace("{data}", str(data)) for each in arguments]


def _start(arguments: list[str], log: Path) -> int:
    """Fork a process that runs a command as a new one would."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = cli.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run(arguments: list[str], log: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(_start(arguments, log), 0)[1])


def _outcome(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The model file and the metrics, without what the clock says."""
    metrics = []
    path = run / "run" / "metrics.jsonl"
    if path.exists():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            metrics.append({k: v for k, v in record.items() if k not in _UNEVEN})
    return (run / "model.safetensors").read_bytes(), metrics


def _committed(run: Path) -> set[str]:
    """Checkpoints that are complete; of explore, models that are kept."""
    folder = run / "run" / "checkpoints"
    if not folder.is_dir():
        return set()
    return {each.name for each in folder.iterdir() if not each.name.startswith(".")}


@dataclass
class Report:
    """Counts by configuration, and everything that must not be."""

    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(row["kills"] for row in self.rows.values())

    def as_rows(self) -> list[dict[str, Any]]:
        """JSON-ready: of each configuration its runs and kills."""
        return [{"configuration": name, **row} for name, row in self.rows.items()]


def run(
    folder: Path,
    kills: int,
    *,
    seed: int = 0,
    names: Sequence[str] = tuple(CONFIGURATIONS),
    most_of_a_run: int = 8,
) -> Report:
    """Kill until `kills` processes have been killed, the configurations in turn.

    Args:
        folder: empty; everything is made in it.
        most_of_a_run: kills after which a run is left alone, so that it finishes.
    """
    report = Report({name: {"runs": 0, "kills": 0, "failures": 0} for name in names})
    make_data(folder)
    whole, seconds = {}, {}
    for name in names:
        place = folder / f"{name}-whole"
        place.mkdir()
        started = time.perf_counter()
        code = _run(_command(name, folder, place), place / "log.txt")
        seconds[name] = time.perf_counter() - started
        assert code == 0, (place / "log.txt").read_text()
        whole[name] = _outcome(place)
    rng = np.random.default_rng(seed)
    number = 0
    while report.kills < kills:
        name = names[number % len(names)]
        place = folder / f"{name}-killed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        _one_run(report, name, folder, place, seconds[name], rng, most_of_a_run)
        if _outcome_or_none(place) != whole[name]:
            report.failures.append(f"{name}, run {number} of seed {seed}: another outcome")
            report.rows[name]["failures"] += 1
        report.rows[name]["runs"] += 1
        number += 1
    return report


def _command(name: str, data: Path, place: Path) -> list[str]:
    files = ["--output", str(place / "model.safetensors"), "--run-dir", str(place / "run")]
    return [*_filled(CONFIGURATIONS[name], data), *files]


def _outcome_or_none(place: Path) -> tuple[bytes, list[dict[str, Any]]] | None:
    try:
        return _outcome(place)
    except (OSError, ValueError):
        return None


def _one_run(
    report: Report, name: str, data: Path, place: Path, seconds: float,
    rng: np.random.Generator, most: int,
) -> None:  # fmt: skip
    """One run to its end; every kill counts in the report."""
    before: set[str] = set()
    for attempt in range(most + 1):
        child = _start(_command(name, data, place), place / "log.txt")
        if attempt < most:
            time.sleep(float(rng.uniform(0, seconds)))
            number = signal.SIGTERM if rng.random() < 0.1 else signal.SIGKILL
            os.kill(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
            report.rows[name]["kills"] += 1
        elif code == 0:
            return
        else:
            report.failures.append(f"{name}: exit code {code}: {_last_line(place / 'log.txt')}")
            report.rows[name]["failures"] += 1
            return
        after = _committed(place)
        if max(before, default="") > max(after, default=""):
            report.failures.append(f"{name}: {max(before)} was committed and is lost")
            report.rows[name]["failures"] += 1
        before = after


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
