"""Make RESULTS.md and a table of the README from benchmarks/results/."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import speedrun  # noqa: E402
from recording import RESULTS  # noqa: E402

from nanogpt.measuring import bytes_rate, duration, flops_rate, in_words, rate  # noqa: E402

NO_GPU = "Every GPU figure:"
"""How the paragraph of the notes begins that stands until a GPU result exists."""

RATES = ("tokens_per_second", "tflops", "bytes_per_second")


README_BEGINS, README_ENDS = "<!-- make speedrun wrote this table -->", "<!-- to here -->"


def main() -> None:
    """Write RESULTS.md, and the README's table of the speedrun."""
    (ROOT / "RESULTS.md").write_text("\n".join(results(RESULTS)) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(with_speedrun(readme.read_text(), RESULTS))


def with_speedrun(text: str, folder: Path) -> str:
    """The README with the table of the newest speedrun between its two markers.

    Raises: ValueError where it has no such markers.
    """
    before, begins, rest = text.partition(README_BEGINS)
    _, ends, after = rest.partition(README_ENDS)
    if not begins or not ends:
        raise ValueError(f"the README lacks {README_BEGINS} … {README_ENDS}")
    newest: dict[str, Any] = {}
    for path in sorted(folder.glob("*/speedrun.json")):
        content = json.loads(path.read_text())
        if content["date"] >= newest.get("date", ""):
            newest = content
    lines = ["", "No speedrun has been recorded yet.", ""]
    if newest:
        made = f"{newest['device']}, {newest['date']}, torch {newest['versions']['torch']}"
        checks = newest["checks"]["speedrun"]
        lines = ["", f"Measured by `make speedrun`: {made}.", "", *speedrun.table(checks), ""]
    return "\n".join([before + begins, *lines, ends + after])


def results(folder: Path) -> list[str]:
    """The lines of RESULTS.md."""
    lines = [
        "# Results",
        "",
        "Made by `python benchmarks/make_results.py` from `benchmarks/results/`. Every row was",
        "measured with both sides in one run; ratio is the best peer's time over ours, and the",
        "fraction is that of the ceiling which the device showed in the same run.",
    ]
    paths = sorted(folder.glob("*/*.json"))
    for path in paths:
        lines += _suite(path.stem, json.loads(path.read_text()))
    notes = folder / "notes.md"
    if notes.exists():
        lines += _notes(notes.read_text(), any(path.stem.startswith("gpu-") for path in paths))
    return lines


def _suite(name: str, content: dict[str, Any]) -> list[str]:
    """One suite of one device."""
    lines = [
        "",
        f"## {name}: {content['device']}",
        "",
        f"{content['date']}, commit {content['commit']}, torch {content['versions']['torch']}, "
        f"`{content['command']}`; {_ceilings(content['ceilings'])}.",
        "",
    ]
    if "checks" in content:
        return lines + _checks(content["checks"])
    rated = any(rate(row) for row in content["rows"])
    noted = any(row.get("also") for row in content["rows"])
    heads = ["shape", "dtype", "ours", "best peer", "ratio", *["rate"] * rated, "of the ceiling"]
    heads += ["also"] * noted
    lines += [_line(heads), "|" + "---|" * len(heads)]
    for row in content["rows"]:
        best = row["best_peer"]
        fraction = row["fraction_of_ceiling"]
        cells = [
            in_words(row["shape"]),
            row["dtype"],
            duration(row["ours_seconds"]),
            f"{best} {duration(row['peers'][best])}" if best else "none",
            f"{row['ratio']:.2f}" if row["ratio"] else "",
            *[_rates(row)] * rated,
            f"{fraction:.0%}" if fraction else "",
            *[in_words(row.get("also") or {})] * noted,
        ]
        lines.append(_line(cells))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rates(row: dict[str, Any]) -> str:
    """Every rate that a row states, and the memory it took."""
    shown = [rate({key: row[key]}) for key in RATES if row.get(key)]
    if row.get("peak_bytes"):
        shown.append(f"{row['peak_bytes'] / 1e9:.1f} GB")
    return ", ".join(shown)


def _ceilings(ceilings: dict[str, float]) -> str:
    shown = [
        f"{word} {bytes_rate(ceilings[key])}"
        for word, key in (
            ("reading", "read_bytes_per_second"),
            ("copying", "copy_bytes_per_second"),
        )
        if key in ceilings
    ]
    if "matmul_flops" in ceilings:
        shown.append(f"products {flops_rate(ceilings['matmul_flops'])}")
    if "matmul_flops_bfloat16" in ceilings:
        shown[-1] += f" ({flops_rate(ceilings['matmul_flops_bfloat16'])} in bfloat16)"
    return ", ".join(shown or ["no ceilings measured"])


def _checks(checks: dict[str, Any]) -> list[str]:
    """What a suite that counts has counted."""
    if "faults" in checks:
        return _faults(checks["faults"])
    if "fuzz" in checks:
        return _fuzz(checks["fuzz"])
    if "explore" in checks:
        lines = [_line(["data", "found", "seconds", "peak memory"]), "|---|---|---|---|"]
        for row in (row for part in checks["explore"].values() for row in part):
            memory = f"{row['peak_bytes'] / 1e9:.2f} GB" if row["peak_bytes"] else ""
            lines.append(_line([row["what"], row["outcome"], f"{row['seconds']:.0f}", memory]))
        return lines
    if "speedrun" in checks:
        return speedrun.table(checks["speedrun"])
    if "memory" in checks:
        return _memory(checks["memory"])
    if "steps to a loss" in checks:
        return _table(checks["steps to a loss"])
    heads = ["kernel", "cases", "comparisons with float64", "failures", "not available"]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for kernel, counts in checks["kernels"].items():
        keys = ("cases", "comparisons", "failures", "not_available")
        lines.append(_line([kernel, *(str(counts[key]) for key in keys)]))
    return lines


def _faults(parts: dict[str, Any]) -> list[str]:
    """What was done to files and processes on purpose, and what came of it."""
    lines = []
    for part in parts.values():
        lines += [""] * bool(lines) + [f"{part['summary']}:", ""]
        lines += _table(part["rows"])
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of the same keys."""
    heads = list(rows[0])
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row[head] for head in heads]
        lines.append(_line([f"{c:,}" if isinstance(c, int) else str(c) for c in cells]))
    return lines


def _memory(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What was forecast before a run, and what it took."""
    heads = ["shape", "the program before it", "forecast", "measured peak", "ratio"]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in rows.values():
        sizes = (f"{row[key] / 1e6:,.0f} MB" for key in ("program", "forecast", "peak"))
        lines.append(_line([row["shape"], *sizes, f"{row['ratio']:.3f}"]))
    return lines


def _fuzz(rows: list[dict[str, Any]]) -> list[str]:
    """Mutants that every parser has read, over all runs of the fuzzers."""
    heads = ["parser", "language", "inputs", "inputs/s", "accepted", "findings"]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in rows:
        counts = (row["inputs"], row["inputs"] / row["seconds"], row["accepted"], row["findings"])
        lines.append(_line([row["parser"], row["language"], *(f"{n:,.0f}" for n in counts)]))
    return lines


def _notes(text: str, gpu_measured: bool) -> list[str]:
    """The notes, without what a GPU result makes untrue."""
    paragraphs = [part for part in text.strip().split("\n\n") if part]
    if gpu_measured:
        paragraphs = [part for part in paragraphs if not part.startswith(NO_GPU)]
    if all(part.startswith("#") for part in paragraphs):
        return []
    return ["", "\n\n".join(paragraphs)]


if __name__ == "__main__":
    main()
