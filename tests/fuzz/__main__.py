"""Feed every parser and reader with mutants: `make fuzz`, or `python tests/fuzz`.

What was tried is added up in benchmarks/results/<device>/fuzz.json. An input that must not be is
kept in build/fuzz-findings/.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT)]

from native_programs import missing_tools  # noqa: E402
from recording import RESULTS, device_name, slug, write_checks  # noqa: E402

from fuzz import loop, programs, readers  # noqa: E402

FINDINGS = ROOT / "build" / "fuzz-findings"


def main(arguments: list[str] | None = None) -> int:
    """Run all targets or some. Returns 1 where anything was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help="some of them by name (all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (60)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument(
        "--no-coverage", action="store_true", help="the plain loop, without libFuzzer"
    )
    parser.add_argument("--reproduce", metavar="FILE", help="give one target this input")
    options = parser.parse_args(arguments)
    known = {reader.name: reader for reader in readers.make_readers()}
    chosen = options.targets or [*programs.TARGETS, *known]
    unknown = set(chosen) - {*programs.TARGETS, *known}
    if unknown:
        parser.error(
            f"there is no target {min(unknown)!r}: {', '.join([*programs.TARGETS, *known])}"
        )
    native = [name for name in chosen if name in programs.TARGETS]
    folder = ROOT
    if native and missing_tools():
        print(f"the C++ parsers are left out: {missing_tools()}")
        native = []
    elif native:
        folder = programs.build(coverage=not options.no_coverage)
    if options.reproduce:
        return _reproduce(chosen[0], Path(options.reproduce), folder)
    failed = False
    for name in native:
        report = _run_program(name, folder, options.seconds, options.seed)
        failed |= _tell(report, "C++")
    for name in (name for name in chosen if name in known):
        report = loop.run(known[name], seed=options.seed, seconds=options.seconds)
        failed |= _tell(report, "Python")
    return int(failed)


def _run_program(name: str, folder: Path, seconds: float, seed: int) -> loop.Report:
    flags = (
        *(f"-max_total_time={seconds:.0f}", f"-seed={seed}", "-timeout=20"),
        *(f"-max_len={programs.TARGETS[name]}", "-rss_limit_mb=2048", "-verbosity=0"),
    )
    found = folder / "found" / name
    return programs.run(
        folder / f"fuzz_{name}", programs.CORPUS / name, FINDINGS, flags=flags, found=found
    )


def _tell(report: loop.Report, language: str) -> bool:
    """Print, keep and record what came of a target; whether anything was found."""
    rate = report.inputs / report.seconds if report.seconds else 0
    result = f"{len(report.findings)} FOUND" if report.findings else "nothing found"
    print(
        f"{report.name:18} {report.inputs:>12,} inputs {rate:>9,.0f}/s "
        f"{report.accepted:>11,} accepted  {result}",
        flush=True,
    )
    FINDINGS.mkdir(parents=True, exist_ok=True)
    for sentence, raw in report.findings:
        path = FINDINGS / loop.file_name(report.name, raw)
        path.write_bytes(raw)
        again = ["python", "tests/fuzz", report.name, "--reproduce", str(path.relative_to(ROOT))]
        print(f"  {sentence}\n  {shlex.join(again)}", flush=True)
    _record(report, language)
    return bool(report.findings)


def _record(report: loop.Report, language: str) -> None:
    """Add the counts to those of all runs before."""
    folder = RESULTS / slug(device_name())
    path = folder / "fuzz.json"
    rows = json.loads(path.read_text())["checks"]["fuzz"] if path.exists() else []
    fresh = {"parser": report.name, "language": language}
    row = next((row for row in rows if row["parser"] == report.name), None)
    if row is None:
        row = {**fresh, "inputs": 0, "accepted": 0, "seconds": 0, "findings": 0}
        rows.append(row)
    row["inputs"] += report.inputs
    row["accepted"] += report.accepted
    row["seconds"] = round(row["seconds"] + report.seconds, 1)
    row["findings"] += len(report.findings)
    rows.sort(key=lambda row: (row["language"], row["parser"]))
    write_checks(folder, "fuzz", {"fuzz": rows}, ceilings={}, command="make fuzz")


def _reproduce(name: str, path: Path, folder: Path) -> int:
    """What a target makes of one input, in full."""
    if name in programs.TARGETS:
        return subprocess.run([folder / f"fuzz_{name}", path], check=False).returncode
    report = loop.run(loop.with_input(readers.named(name), path.read_bytes()), seed=0, runs=1)
    for sentence, _ in report.findings:
        print(sentence)
    print(f"{len(report.findings)} found; {'accepted' if report.accepted else 'not accepted'}")
    return int(bool(report.findings))


if __name__ == "__main__":
    sys.exit(main())
