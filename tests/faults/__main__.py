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
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    report = damage.run(options.damaged, seed=options.seed)
    for row in report.as_rows():
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    for failure in report.failures[:50]:
        print("FAILED:", failure)
    seconds = time.perf_counter() - started
    print(f"{report.total:,} damaged files, {len(report.failures)} failures, {seconds:.0f} s")
    found = {"damaged": report.as_rows()}
    failed = bool(report.failures)
    reason = crash_points.why_not()
    if reason:
        print(f"crash points of a save were not tried: {reason}")
    else:
        points = crash_points.run()
        total = sum(points.tried.values())
        for failure in points.failures:
            print("FAILED:", failure)
        print(f"{total} crash points of a save, {len(points.failures)} failures; ", end="")
        print(", ".join(f"{what} loads: {count}" for what, count in points.outcomes.items()))
        found["crash points"] = points.as_rows()
        failed |= bool(points.failures)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        killed = kills.run(Path(folder), options.kills, seed=options.seed)
    for failure in killed.failures:
        print("FAILED:", failure)
    runs = sum(row["runs"] for row in killed.rows.values())
    seconds = time.perf_counter() - started
    print(
        f"{killed.kills:,} kills in {runs:,} runs, {len(killed.failures)} failures, {seconds:.0f} s"
    )
    found["kills"] = killed.as_rows()
    failed |= bool(killed.failures)
    _record(found)
    return int(failed)


def _record(found: dict[str, Any]) -> None:
    """Replace the parts that were run."""
    folder = RESULTS / slug(device_name())
    path = folder / "faults.json"
    checks = json.loads(path.read_text())["checks"] if path.exists() else {"faults": {}}
    checks["faults"].update(found)
    write_checks(folder, "faults", checks, ceilings={}, command="make faults")


if __name__ == "__main__":
    sys.exit(main())
