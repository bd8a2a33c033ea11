"""What explore finds and what it costs: `python benchmarks/explore.py [PART …]`.

planted    five tables whose truth is known: what of it is found, and above what
shuffled   forty of the same tables with every column shuffled: how many report anything
files      the command on real files, from $NANOGPT_DATA
rows       the command on 100,000 rows of eight fields: time and memory

Every part of the figures stands in benchmarks/results/<device>/explore.json, from which
benchmarks/make_results.py makes a table.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from planted_table import judge, planted_table  # noqa: E402
from recording import RESULTS, device_name, slug, write_checks  # noqa: E402

from nanogpt.explore import KnowledgeDiscovery  # noqa: E402

FILES = ("penguins.csv", "titanic.csv", "humaneval.jsonl", "movie_reviews.txt")
PARTS = ("planted", "shuffled", "files", "rows")


def main() -> None:
    """Run the parts that are named, all without names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, help="tables of planted or shuffled")
    parser.add_argument("--first", type=int, default=0, help="seed of the first table")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {unknown.pop()!r}: {', '.join(PARTS)}")
    folder = RESULTS / slug(device_name())
    torch.set_num_threads(options.threads)
    for part in options.parts or PARTS:
        seeds = range(options.first, options.first + (options.runs or 40))
        if part == "planted":
            found = _planted(range(options.first, options.first + (options.runs or 5)))
        elif part == "shuffled":
            found = _shuffled(seeds)
        else:
            found = _files() if part == "files" else _rows()
        path = folder / "explore.json"
        checks = json.loads(path.read_text())["checks"] if path.exists() else {"explore": {}}
        again = {row["what"] for row in found}
        kept = [row for row in checks["explore"].get(part, []) if row["what"] not in again]
        checks["explore"][part] = kept + found
        command = "python benchmarks/explore.py"
        write_checks(folder, "explore", checks, ceilings={}, command=command)


def _planted(seeds: range) -> list[dict[str, Any]]:
    """What is found of each table, and which findings are none of it."""
    rows = []
    for seed in seeds:
        table, started = planted_table(seed), time.perf_counter()
        findings = KnowledgeDiscovery(seed=seed).fit(table.rows).discover()
        verdict = judge(table, [each.as_dict() for each in findings])
        found = ", ".join(f"{name} {a} of {b}" for name, (a, b) in verdict.found.items())
        outcome = f"{found}; {len(verdict.unplanted)} findings that were not planted, "
        outcome += f"{len(verdict.outranked)} planted ones below these"
        rows.append(_row(f"planted table, seed {seed}", outcome, time.perf_counter() - started))
        for sentence in verdict.unplanted:
            print("  not planted:", sentence)
    return rows


def _shuffled(seeds: range) -> list[dict[str, Any]]:
    """How many of the shuffled tables report anything."""
    started, reported = time.perf_counter(), []
    for seed in seeds:
        findings = KnowledgeDiscovery(seed=seed).fit(planted_table(seed, shuffled=True).rows)
        found = findings.discover()
        print(f"shuffled, seed {seed}: {[each.sentence for each in found]}", flush=True)
        if found:
            reported.append(seed)
    outcome = f"{len(reported)} report anything" + (f": seeds {reported}" if reported else "")
    what = f"{len(seeds)} shuffled tables, seeds {seeds.start} to {seeds.stop - 1}"
    return [_row(what, outcome, (time.perf_counter() - started) / len(seeds))]


def _files() -> list[dict[str, Any]]:
    data = Path(os.environ["NANOGPT_DATA"])
    return [_row(name, *_command(data / name)) for name in FILES]


def _rows() -> list[dict[str, Any]]:
    """Two related categories, two related numbers, and four fields that go with nothing."""
    n, rng = 100_000, np.random.default_rng(0)
    area = rng.integers(0, 20, n)
    size = rng.gamma(2.0, 10.0, n)
    columns = {
        "area": [f"area {k}" for k in area],
        "region": [f"region {k // 5}" for k in area],
        "size": [f"{value:.1f}" for value in size],
        "price": [f"{value:.2f}" for value in 3 * size + rng.normal(0, 20, n)],
        "day": [f"2024-{k // 28 + 1:02d}-{k % 28 + 1:02d}" for k in rng.integers(0, 336, n)],
        "kind": rng.choice(["a", "b", "c", "d"], n).tolist(),
        "score": [f"{value:.3f}" for value in rng.normal(size=n)],
        "flag": rng.choice(["yes", "no"], n).tolist(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        with path.open("w") as file:
            file.write(",".join(columns) + "\n")
            file.writelines(",".join(row) + "\n" for row in zip(*columns.values(), strict=True))
        return [_row("100,000 rows of 8 fields", *_command(path))]


def _command(path: Path) -> tuple[str, float, float]:
    """The whole command: outcome, seconds, peak bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "nanogpt.explore", "--data", str(path)]
        command += ["--output", f"{folder}/model.pth", "--run-dir", f"{folder}/run", "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        before, started = _peak(), time.perf_counter()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        seconds = time.perf_counter() - started
        findings = json.loads(done.stdout)["findings"]
    kinds: dict[str, int] = {}
    for each in findings:
        kinds[each["kind"]] = kinds.get(each["kind"], 0) + 1
    words = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in kinds.items())
    # The largest of all children: parts that took less before it do not count.
    return words or "nothing", seconds, float(max(before, _peak()))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _row(
    what: str, outcome: str, seconds: float, peak_bytes: float | None = None
) -> dict[str, Any]:
    print(f"{what}: {outcome}, {seconds:.0f} s", flush=True)
    return {"what": what, "outcome": outcome, "seconds": seconds, "peak_bytes": peak_bytes}


if __name__ == "__main__":
    main()
