"""Ours on a GPU: the ceilings, correctness, every kernel beside its peers, training, writing.

python benchmarks/gpu.py                      everything, in eight minutes
python benchmarks/gpu.py attention ffn        some parts
python benchmarks/gpu.py tune                 other tiles than those of the tables
python benchmarks/gpu.py --quick              small shapes; on a machine with no GPU, tiny ones

Each part runs in a process of its own, under its share of the time: one that fails, hangs or
loses the device is reported, and the rest goes on. The package need not be installed.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Part, unit (what runs in one process), seconds of its share, module, function, argument.
_KERNELS = (
    ("attention", 75),
    ("ffn", 25),
    ("cross_entropy", 20),
    ("linear_cross_entropy", 15),
    ("layer_norm", 20),
)
UNITS: tuple[tuple[str, str, float, str, str, str | None], ...] = (
    ("ceilings", "ceilings", 12, "gpu_session", "run_ceilings", None),
    *(
        ("correctness", f"correctness-{name}", share, "gpu_correctness", "run_correctness", name)
        for name, share in _KERNELS
    ),
    ("attention", "attention", 90, "gpu_kernels", "run_attention", None),
    ("ffn", "ffn", 60, "gpu_kernels", "run_ffn", None),
    ("cross_entropy", "cross_entropy", 35, "gpu_kernels", "run_cross_entropy", None),
    ("layer_norm", "layer_norm", 30, "gpu_kernels", "run_layer_norm", None),
    ("training", "training", 110, "gpu_training", "run_training", None),
    ("decode", "decode", 25, "gpu_training", "run_decode", None),
    ("tune", "tune", 120, "gpu_tuning", "run_tuning", None),
)
# Parts that run only where they are named.
ON_DEMAND = ("tune",)
PARTS = tuple(dict.fromkeys(unit[0] for unit in UNITS))
GRACE_SECONDS = 20
"""What a unit may take beyond its share before it counts as hung."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subset", nargs="*", metavar="SUBSET", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, help="folder of the JSON files")
    parser.add_argument("--budget-seconds", type=float, default=480, help="default 480")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats")
    parser.add_argument(
        "--impl", choices=("triton", "auto", "torch"), default="triton", help="what stands as ours"
    )
    parser.add_argument("--commit", help="what to write down where this is no git checkout")
    parser.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        help="a process of its own for each part (default: on a GPU)",
    )
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    parser.add_argument("--unit-seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.subset if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if options.budget_seconds <= 0:
        parser.error("--budget-seconds must be more than 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    """0 done; 1 something failed; 2 impossible here."""
    options = parse(arguments)
    if options.unit:
        run_unit(options)
        return 0
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        print(
            "this machine has no CUDA device; --quick proves the script on a CPU", file=sys.stderr
        )
        return 2
    started = time.monotonic()
    wanted = options.subset or [part for part in PARTS if part not in ON_DEMAND]
    chosen = [unit for unit in UNITS if unit[0] in wanted]
    if chosen[0][0] != "ceilings":
        chosen.insert(0, UNITS[0])  # fractions are of what the device shows in the same run
    found = Findings()
    with tempfile.TemporaryDirectory() as folder:
        for index, (_, unit, share, *_rest) in enumerate(chosen):
            left = options.budget_seconds - (time.monotonic() - started)
            seconds = left * share / sum(other[2] for other in chosen[index:])
            if left < 2:
                found.skipped.append(f"all of {unit}")
                continue
            print(f"\n== {unit}, {seconds:.0f} s", flush=True)
            journal = Path(folder) / f"{unit}.jsonl"
            journal.touch()
            isolated = cuda if options.isolate is None else options.isolate
            problem = None
            if isolated:
                problem = _in_a_process_of_its_own(options, unit, seconds, journal, found.ceilings)
            else:
                _in_this_process(options, unit, seconds, journal, found.ceilings)
            found.read(journal)
            if problem:
                found.failures.append(f"{unit}: {problem}")
                print(f"FAILED {unit}: {problem}", flush=True)
            found.write(options)
    found.summarise(time.monotonic() - started)
    return 1 if found.failures else 0


def run_unit(options: argparse.Namespace) -> None:
    """One unit, in this process."""
    _, _, _, module, function, argument = next(u for u in UNITS if u[1] == options.unit)
    if options.unit.startswith(("correctness", "attention")):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products
    import torch
    from gpu_session import DeviceLost, Session, last_lines

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # tiny shapes: threads only wait for each other
    session = Session(
        device=device,
        quick=options.quick,
        impl=options.impl,
        seconds=options.unit_seconds,
        journal=options.journal,
        ceilings=options.ceilings,
    )
    try:
        run: Callable[..., None] = getattr(importlib.import_module(module), function)
        run(session, *([argument] if argument else []))
    except DeviceLost as error:
        session.fail(options.unit, f"the device was lost, the rest of this part too: {error}")
    except Exception as error:
        session.fail(options.unit, last_lines(error))


def _in_this_process(
    options: argparse.Namespace,
    unit: str,
    seconds: float,
    journal: Path,
    ceilings: dict[str, float],
) -> None:
    """The unit reports by itself what went wrong."""
    given = {"unit": unit, "unit_seconds": seconds, "journal": journal, "ceilings": ceilings}
    run_unit(argparse.Namespace(**(vars(options) | given)))


def _in_a_process_of_its_own(
    options: argparse.Namespace,
    unit: str,
    seconds: float,
    journal: Path,
    ceilings: dict[str, float],
) -> str | None:
    """What went wrong, or None. The unit's own output goes straight through."""
    command = [sys.executable, __file__, "--unit", unit, "--unit-seconds", str(seconds)]
    command += ["--journal", str(journal), "--ceilings", json.dumps(ceilings)]
    command += ["--impl", options.impl, *(["--quick"] if options.quick else [])]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds + GRACE_SECONDS:.0f} s: it hung, or one step took too long"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"its process ended with exit code {code}" if code else None


class Findings:
    """What all units found so far."""

    def __init__(self) -> None:
        self.ceilings: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        self.checks: dict[str, dict[str, int]] = {}
        self.curves: dict[str, list[float]] = {}
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.skipped: list[str] = []

    def read(self, journal: Path) -> None:
        """Take in what a unit wrote, up to a last line that it may not have finished."""
        for line in journal.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                self.failures.append(f"{journal.stem}: its journal ends in the middle of a line")
                break
            kind = entry.pop("kind")
            if kind == "row":
                self.rows.append(entry["row"])
            elif kind == "ceilings":
                self.ceilings = entry["ceilings"]
            elif kind == "checks":
                self.checks[entry.pop("kernel")] = entry
            elif kind == "curve":
                self.curves[entry["impl"]] = entry["losses"]
            elif kind == "failure":
                self.failures.append(f"{entry['what']}: {entry['why']}")
            elif kind == "skipped":
                self.skipped.append(entry["what"])
            else:
                self.notes.append(entry["text"])

    def write(self, options: argparse.Namespace) -> None:
        """All suites so far, so that a run that is cut off has left what it found."""
        import recording

        folder = options.output
        if folder is None:
            if options.quick:
                return  # a trial leaves no results
            folder = recording.RESULTS / recording.slug(recording.device_name())
        command = " ".join(["python benchmarks/gpu.py", *options.subset])
        command += " --quick" if options.quick else ""
        facts: dict[str, Any] = {
            "ceilings": self.ceilings, "command": command, "commit": options.commit
        }  # fmt: skip
        rows = [row for row in self.rows if row["suite"] != "gpu-training"]
        recording.write_suites(folder, rows, **facts)
        training = [row for row in self.rows if row["suite"] == "gpu-training"]
        recording.write_suites(folder, training, **facts, loss_curves=self.curves)
        if self.checks:
            failures = [line for line in self.failures if line]
            checks = {"kernels": self.checks, "failures": failures}
            recording.write_checks(folder, "gpu-correctness", checks, **facts)

    def summarise(self, seconds: float) -> None:
        """A short table last."""
        from gpu_summary import summary

        print("\n".join(["", *summary(self, seconds)]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
