"""Runs that are killed at random moments, or stopped at random steps, and go on each time.

Every configuration is run once without interruption. Then the same command is started in forked
processes, which are killed or stopped, and started again until it finishes: the model file must be
the same bit by bit, the metrics and samples the same line by line without a gap or a repeat. After
each interruption no checkpoint that verified may be missing but for those that two newer ones
replace, a process that was told to end has saved the step that it was in and ends with the signal's
code, and the next process goes on from the newest checkpoint.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import checkpoint, cli, offline_rl, train
from nanogpt.run_directory import _problem_with

_CPU = ["--threads", "1", "--device", "cpu"]
_TINY = [
    "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "8",
    *_CPU,
]  # fmt: skip
_OUTPUT = ["--output", "{place}/model.safetensors"]
_FILES = [*_OUTPUT, "--run-dir", "{place}/run"]
_TRAIN = [
    "train", "--text", "{data}/text.txt", *_TINY, "--max-steps", "40", "--eval-interval", "4",
    "--sample-tokens", "8", "--no-tensorboard", *_FILES,
]  # fmt: skip
CONFIGURATIONS: dict[str, list[str]] = {
    "plain": _TRAIN,
    "accumulation": [*_TRAIN, "--micro-batch-size", "3"],
    "dropout": [*_TRAIN, "--dropout", "0.2", "--bias"],
    "bfloat16": [*_TRAIN, "--dtype", "bfloat16"],
    "float16": [*_TRAIN, "--dtype", "float16", "--micro-batch-size", "4", "--dropout", "0.1"],
    "rewards": [
        "advanced", "--offline-data", "{data}/rewards.txt", *_TINY, "--epochs", "2", *_FILES
    ],
    "rounds": [
        "advanced", "--align-terms", "times", "--init", "{data}/begin.pth", "--anchor-text",
        "{data}/text.txt", "--rounds", "2", "--num-generations", "16", "--max-completion-length",
        "12", "--batch-size", "8", *_CPU, *_FILES,
    ],
    "explore": [
        "explore", "--data", "{data}/table.csv", "--n-layer", "1", "--n-head", "1", "--n-embd", "8",
        "--epochs", "1", "--folds", "2", *_CPU, *_FILES,
    ],
    "calibrate": [
        "calibrate", "--model", "{data}/begin.pth", "--text", "{data}/text.txt", "--per-token",
        *_CPU, *_OUTPUT,
    ],
}  # fmt: skip
TRAINED = ("plain", "accumulation", "dropout", "bfloat16", "float16")
STEPPING = (*TRAINED, "rewards")
"""Configurations that can be stopped after any step."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
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
    begin = _command("plain", folder, folder / "begin")
    begin += ["--output", str(folder / "begin.pth")]
    assert _run(begin, folder / "log.txt") == 0, (folder / "log.txt").read_text()


def _command(name: str, data: Path, place: Path) -> list[str]:
    places = {"{data}": str(data), "{place}": str(place)}
    arguments = CONFIGURATIONS[name]
    for word, path in places.items():
        arguments = [each.replace(word, path) for each in arguments]
    return arguments


def _start(arguments: list[str], log: Path, prepare: Callable[[], None] | None = None) -> int:
    """Fork a process that runs a command as a new one would, after `prepare`."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        checkpoint._LEFT_OVER_SECONDS = -1
        if prepare is not None:
            prepare()
        code = cli.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run(arguments: list[str], log: Path, prepare: Callable[[], None] | None = None) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(_start(arguments, log, prepare), 0)[1])


def _outcome(place: Path) -> dict[str, Any]:
    """What a run leaves, without what the clock says."""
    run = place / "run"
    left: dict[str, Any] = {"model": (place / "model.safetensors").read_bytes()}
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = run / name
        rows = (
            [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        )
        left[name] = [{k: v for k, v in row.items() if k not in _UNEVEN} for row in rows]
    findings = run / "findings.json"
    left["findings.json"] = findings.read_bytes() if findings.exists() else None
    left["unfinished files"] = [path.name for path in place.rglob(".*.tmp")]
    return left


def _committed(place: Path) -> list[str]:
    """Checkpoints that verify, by their names; of explore, models that are kept."""
    folder = place / "run" / "checkpoints"
    if not folder.is_dir():
        return []
    found = [each for each in folder.iterdir() if not each.name.startswith(".")]
    return sorted(each.name for each in found if each.is_file() or _problem_with(each) is None)


def _lost(before: list[str], after: list[str]) -> list[str]:
    """What was committed before, and is neither there now nor replaced by two newer ones."""
    numbered = all(name.isdigit() for name in (*before, *after))
    kept = after[-2:] if numbered and len(after) >= 2 else []
    return [name for name in before if name not in after and not (kept and name < kept[0])]


@dataclass
class Report:
    """Counts by configuration, and everything that must not be.

    Attributes:
        rows: of each configuration its runs, its interruptions and its failures.
        points: (configuration, step) of every restart, where the step is known.
    """

    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    points: set[tuple[str, int]] = field(default_factory=set)

    @property
    def interruptions(self) -> int:
        return sum(row["interruptions"] for row in self.rows.values())

    def fail(self, name: str, what: str) -> None:
        self.failures.append(f"{name}: {what}")
        self.rows[name]["failures"] += 1

    def as_rows(self) -> list[dict[str, Any]]:
        """JSON-ready, a row for each configuration."""
        return [{"configuration": name, **row} for name, row in self.rows.items()]

    def __iadd__(self, other: "Report") -> "Report":
        for name, row in other.rows.items():
            mine = self.rows.setdefault(name, dict.fromkeys(row, 0))
            for key, count in row.items():
                mine[key] += count
        self.failures += other.failures
        self.points |= other.points
        return self


@dataclass
class _Whole:
    """An uninterrupted run: what it left, its seconds, its optimizer steps, its precision."""

    outcome: dict[str, Any]
    seconds: float
    steps: int
    precision: str | None


@dataclass
class _Stop:
    """How a process was interrupted.

    Attributes:
        code: its exit code, negative for the signal that ended it.
        number: the signal.
        steps: optimizer steps that it had done, where that is known.
    """

    code: int
    number: int
    steps: int = 0


Interrupt = Callable[["_Task", str, np.random.Generator, int], _Stop]


@dataclass
class _Task:
    """What the processes of the pool share."""

    folder: Path
    whole: dict[str, _Whole]
    interrupt: Interrupt
    most_of_a_run: int
    seed: int


def run(folder: Path, kills: int, **more: Any) -> Report:
    """Kill processes at random moments; SIGKILL mostly, and a tenth by what can be caught.

    Args:
        folder: empty; everything is made in it.
        more: see `_spread`.
    """
    return _spread(folder, kills, _killed, **more)


def restarts(folder: Path, points: int, **more: Any) -> Report:
    """Stop runs after random steps and have them go on.

    Args:
        folder: empty; everything is made in it.
        more: see `_spread`.
    """
    return _spread(folder, points, _stopped, **{"names": STEPPING, **more})


def _spread(
    folder: Path,
    interruptions: int,
    interrupt: Interrupt,
    *,
    seed: int = 0,
    names: Sequence[str] = tuple(CONFIGURATIONS),
    most_of_a_run: int = 8,
    workers: int = 1,
) -> Report:
    """Interrupt runs until it has happened that often, the configurations in turn.

    Args:
        most_of_a_run: interruptions after which a run is left alone, so that it finishes.
        workers: processes that do this beside one another.
    """
    make_data(folder)
    whole = {name: _run_whole(name, folder) for name in names}
    task = _Task(folder, whole, interrupt, most_of_a_run, seed)
    report = Report()
    share = -(-interruptions // workers)
    if workers == 1:
        return _work(task, 0, share)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for part in pool.map(_work, [task] * workers, range(workers), [share] * workers):
            report += part
    return report


def _precision(place: Path) -> str | None:
    """That of the run's products, which is chosen by measurement where no flag names one."""
    identity = place / "run" / "run.json"
    if not identity.exists():
        return None
    step = json.loads(identity.read_bytes()).get("step") or {}
    found: str | None = step.get("dtype")
    return found


def _run_whole(name: str, folder: Path, precision: str | None = None) -> _Whole:
    place = Path(tempfile.mkdtemp(prefix=f"{name}-whole-", dir=folder))
    counted = place / "steps.txt"
    started = time.perf_counter()
    command = _command(name, folder, place) + (["--dtype", precision] if precision else [])
    code = _run(command, place / "log.txt", lambda: _hook(lambda step: _note(counted)))
    seconds = time.perf_counter() - started
    assert code == 0, (place / "log.txt").read_text()
    steps = counted.stat().st_size if counted.exists() else 0
    return _Whole(_outcome(place), seconds, steps, _precision(place))


def _note(counted: Path) -> None:
    with counted.open("ab") as file:
        file.write(b".")


def _hook(before_step: Callable[[int], None]) -> None:
    """Have it called before every optimizer step of this process, with their number from 1."""
    number = 0

    def counting(step: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*arguments: Any) -> Any:
            nonlocal number
            number += 1
            before_step(number)
            return step(*arguments)

        return stepping

    train.optimizer_step = counting(train.optimizer_step)  # type: ignore[assignment]
    trainer: Any = offline_rl.RewardWeightedTrainer
    trainer.step = counting(trainer.step)


def _killed(task: _Task, name: str, rng: np.random.Generator, at: int) -> _Stop:
    """Run until a random moment."""
    place = _place(task, name, at)
    child = _start(_command(name, task.folder, place), place / "log.txt")
    time.sleep(float(rng.uniform(0, task.whole[name].seconds)))
    number = SIGNALS[int(rng.integers(2))] if rng.random() < 0.1 else signal.SIGKILL
    os.kill(child, number)
    return _Stop(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), number)


def _stopped(task: _Task, name: str, rng: np.random.Generator, at: int) -> _Stop:
    """Run for a random number of steps."""
    place = _place(task, name, at)
    steps = int(rng.integers(1, 2 + task.whole[name].steps // 3))
    number = SIGNALS[int(rng.integers(len(SIGNALS)))]

    def stop(step: int) -> None:
        if step == steps:
            os.kill(os.getpid(), number)

    code = _run(_command(name, task.folder, place), place / "log.txt", lambda: _hook(stop))
    return _Stop(code, number, steps)


def _place(task: _Task, name: str, at: int) -> Path:
    return task.folder / f"{name}-{at}"


def _work(task: _Task, at: int, share: int) -> Report:
    """A process of the pool: runs until the share of interruptions is done."""
    names = list(task.whole)
    report = Report({name: {"runs": 0, "interruptions": 0, "failures": 0} for name in names})
    rng = np.random.default_rng((task.seed, at))
    others: dict[tuple[str, str | None], _Whole] = {}
    number = at
    while report.interruptions < share:
        name = names[number % len(names)]
        place = _place(task, name, at)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if _go_through(report, task, name, rng, at):
            # On a busy machine a new run may measure that another precision is faster.
            precision, whole = _precision(place), task.whole[name]
            if precision != whole.precision:
                if (name, precision) not in others:
                    others[name, precision] = _run_whole(name, task.folder, precision)
                whole = others[name, precision]
            for what, expected in whole.outcome.items():
                if _outcome_or_none(place, what) != expected:
                    report.fail(
                        name, f"run {number} of seed {task.seed} in {precision}: another {what}"
                    )
        report.rows[name]["runs"] += 1
        number += 1
    return report


def _outcome_or_none(place: Path, what: str) -> Any:
    try:
        return _outcome(place)[what]
    except (OSError, ValueError):
        return None


def _go_through(report: Report, task: _Task, name: str, rng: np.random.Generator, at: int) -> bool:
    """One run to its end; every interruption counts in the report. False where it failed."""
    place = _place(task, name, at)
    step = 0
    for _ in range(task.most_of_a_run):
        before, told = _committed(place), _size(place / "log.txt")
        stop = task.interrupt(task, name, rng, at)
        step += stop.steps
        if stop.code == 0:
            _check_start(report, name, place, before, told)
            return True
        noted = stop.code == 128 + stop.number
        # In its first moments a process knows no signals yet.
        unprepared = stop.code == -stop.number and not stop.steps
        if not (noted or unprepared):
            report.fail(name, f"exit code {stop.code}: {_last_line(place / 'log.txt')}")
            return False
        report.rows[name]["interruptions"] += 1
        after = _committed(place)
        lost = _lost(before, after)
        if lost:
            report.fail(name, f"{lost[-1]} was committed and is lost")
        if stop.steps:
            report.points.add((name, step))
            if name in TRAINED and int(max(after, default="0")) != step:
                report.fail(name, f"stopped in step {step}, but {after} is what was saved")
            _check_start(report, name, place, before, told)
    before, told = _committed(place), _size(place / "log.txt")
    code = _run(_command(name, task.folder, place), place / "log.txt")
    if code:
        report.fail(name, f"exit code {code}: {_last_line(place / 'log.txt')}")
    _check_start(report, name, place, before, told)
    return code == 0


def _check_start(report: Report, name: str, place: Path, before: list[str], told: int) -> None:
    """Whether a process that has come so far went on from the newest checkpoint."""
    if not before or name not in TRAINED:
        return
    said = (place / "log.txt").read_bytes()[told:].decode(errors="replace")
    newest = int(before[-1])
    if f"going on from step {newest:,}" not in said and "is finished" not in said:
        report.fail(name, f"it did not go on from step {newest}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
