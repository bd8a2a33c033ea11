"""The long form of what `make test` does in short: `make faults`, or `python tests/faults`.

Counts go to standard output and into benchmarks/results/<device>/faults.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT)]

from recording import RESULTS, checked_out_commit, device_name, slug, write_checks  # noqa: E402

from faults import crash_points, damage, kills, lost_writes  # noqa: E402

Part = tuple[str, list[dict[str, Any]], list[str]]
"""What was counted in words, a table of it, and everything that must not be."""


def main() -> int:
    """Run the harnesses. Returns 1 where anything was found that must not be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--damaged", type=int, default=100_000, help="files to damage (100000)")
    parser.add_argument("--kills", type=int, default=2500, help="processes to kill (2500)")
    parser.add_argument("--restarts", type=int, default=1000, help="runs to stop (1000)")
    parser.add_argument("--power-cuts", type=int, default=5, help="recordings to cut off (5)")
    parser.add_argument("--crash-points", type=int, default=1, help="0 leaves them out (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes beside one another (2)")
    options = parser.parse_args()
    parts: dict[str, tuple[int, Callable[[int, argparse.Namespace], Part]]] = {
        "damaged files": (options.damaged, _damage),
        "crash points": (options.crash_points, _cut_off),
        "power cuts": (options.power_cuts, _cut_power),
        "kills": (options.kills, _kill),
        "restarts": (options.restarts, _stop),
    }
    found: dict[str, Any] = {}
    failures: list[str] = []
    for name, (number, carry_out) in parts.items():
        if not number:
            continue
        reason = crash_points.why_not() if carry_out in (_cut_off, _cut_power) else ""
        if reason:
            print(f"{name}: not tried, as {reason}")
            continue
        started = time.perf_counter()
        what, rows, bad = carry_out(number, options)
        summary = f"{what}, {len(bad)} failures, {time.perf_counter() - started:.0f} s"
        print(summary, flush=True)
        found[name] = {"summary": f"{summary}, commit {checked_out_commit()}", "rows": rows}
        failures += bad
    for failure in failures[:50]:
        print("FAILED:", failure)
    _record(found)
    return int(bool(failures))


def _damage(total: int, options: argparse.Namespace) -> Part:
    report = damage.run(total, seed=options.seed)
    return f"{report.total:,} damaged files", report.as_rows(), report.failures


def _cut_off(number: int, options: argparse.Namespace) -> Part:
    points = crash_points.run()
    loads = ", ".join(f"{what} loads: {count}" for what, count in points.outcomes.items())
    total = sum(points.tried.values())
    return f"{total} crash points of a save ({loads})", points.as_rows(), points.failures


def _cut_power(number: int, options: argparse.Namespace) -> Part:
    reports = {
        name: lost_writes.run(name, seed=options.seed, recordings=number, resume_every=1)
        for name in lost_writes.NAMES
    }
    cuts = sum(report.cuts for report in reports.values())
    disks = sum(report.disks for report in reports.values())
    rows = [{"run": name, **report.as_row()} for name, report in reports.items()]
    failures = [f"{name}: {each}" for name in reports for each in reports[name].failures]
    return f"{cuts:,} power cuts that left {disks:,} different disks", rows, failures


def _kill(total: int, options: argparse.Namespace) -> Part:
    return _interrupt("kills", kills.run, total, options)


def _stop(total: int, options: argparse.Namespace) -> Part:
    return _interrupt("restarts", kills.restarts, total, options)


def _interrupt(
    word: str, carry_out: Callable[..., kills.Report], total: int, options: argparse.Namespace
) -> Part:
    with tempfile.TemporaryDirectory() as folder:
        report = carry_out(Path(folder), total, seed=options.seed, workers=options.workers)
    runs = sum(row["runs"] for row in report.rows.values())
    what = f"{report.interruptions:,} {word} in {runs:,} runs"
    if report.points:
        what += f" at {len(report.points)} different steps"
    return what, report.as_rows(), report.failures


def _record(found: dict[str, Any]) -> None:
    """Replace the parts that were run."""
    folder = RESULTS / slug(device_name())
    path = folder / "faults.json"
    checks = json.loads(path.read_text())["checks"] if path.exists() else {"faults": {}}
    checks["faults"].update(found)
    write_checks(folder, "faults", checks, ceilings={}, command="make faults")


if __name__ == "__main__":
    sys.exit(main())
