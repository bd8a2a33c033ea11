"""The long form of what `make test` does in short: `make faults`, or `python tests/faults`.

Counts go to standard output and into benchmarks/results/<device>/faults.json.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT)]

from recording import RESULTS, device_name, slug, write_checks  # noqa: E402

from faults import crash_points, damage, kills  # noqa: E402


def main() -> int:
    """Run the harnesses. Returns 1 where anything was found that must not be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--damaged", type=int, default=100_000, help="files to damage (100000)")
    parser.add_argument("--kills", type=int, default=2500, help="processes to kill (2500)")
    parser.add_argument("--no-crash-points", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failures: list[str] = []
    found: dict[str, Any] = {}
    if options.damaged:
        failures += _damage(options.damaged, options.seed, found)
    if not options.no_crash_points:
        failures += _cut_off(found)
    if options.kills:
        failures += _kill(options.kills, options.seed, found)
    for failure in failures[:50]:
        print("FAILED:", failure)
    _record(found)
    return int(bool(failures))


def _damage(total: int, seed: int, found: dict[str, Any]) -> list[str]:
    started = time.perf_counter()
    report = damage.run(total, seed=seed)
    seconds = time.perf_counter() - started
    print(f"{report.total:,} damaged files, {len(report.failures)} failures, {seconds:.0f} s")
    found["damaged"] = report.as_rows()
    return report.failures


def _cut_off(found: dict[str, Any]) -> list[str]:
    reason = crash_points.why_not()
    if reason:
        print(f"crash points of a save were not tried: {reason}")
        return []
    points = crash_points.run()
    loads = ", ".join(f"{what} loads: {count}" for what, count in points.outcomes.items())
    total = sum(points.tried.values())
    print(f"{total} crash points of a save, {len(points.failures)} failures; {loads}")
    found["crash points"] = points.as_rows()
    return points.failures


def _kill(total: int, seed: int, found: dict[str, Any]) -> list[str]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        killed = kills.run(Path(folder), total, seed=seed)
    runs = sum(row["runs"] for row in killed.rows.values())
    seconds = time.perf_counter() - started
    print(
        f"{killed.kills:,} kills in {runs:,} runs, {len(killed.failures)} failures, {seconds:.0f} s"
    )
    found["kills"] = killed.as_rows()
    return killed.failures


def _record(found: dict[str, Any]) -> None:
    """Replace the parts that were run."""
    folder = RESULTS / slug(device_name())
    path = folder / "faults.json"
    checks = json.loads(path.read_text())["checks"] if path.exists() else {"faults": {}}
    checks["faults"].update(found)
    write_checks(folder, "faults", checks, ceilings={}, command="make faults")


if __name__ == "__main__":
    sys.exit(main())
