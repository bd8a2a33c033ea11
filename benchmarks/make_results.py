"""Make RESULTS.md from benchmarks/results/: `python benchmarks/make_results.py`."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "benchmarks" / "results" / "notes.md"


def main() -> None:
    """Write RESULTS.md."""
    lines = [
        "# Results",
        "",
        "Made by `python benchmarks/make_results.py` from `benchmarks/results/`. Every row was",
        "measured with both sides in one run; ratio is the best peer's time over ours, and the",
        "fraction is that of the ceiling which the device showed in the same run.",
    ]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        content = json.loads(path.read_text())
        ceilings = content["ceilings"]
        lines += [
            "",
            f"## {path.stem}: {content['device']}",
            "",
            f"{content['date']}, commit {content['commit']}, torch {content['versions']['torch']}, "
            f"`{content['command']}`; reading {ceilings['read_bytes_per_second'] / 1e9:.1f} GB/s, "
            f"products {ceilings['matmul_flops'] / 1e9:.0f} GFLOP/s.",
            "",
            "| shape | dtype | ours | best peer | ratio | of the ceiling |",
            "|---|---|---|---|---|---|",
        ]
        for row in content["rows"]:
            shape = ", ".join(f"{key} {value}" for key, value in row["shape"].items())
            best = row["best_peer"]
            peer = f"{best} {row['peers'][best] * 1e3:.3f} ms" if best else "none"
            ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
            fraction = row["fraction_of_ceiling"]
            of_ceiling = f"{fraction:.0%}" if fraction else ""
            ours = f"{row['ours_seconds'] * 1e3:.3f} ms"
            lines.append(f"| {shape} | {row['dtype']} | {ours} | {peer} | {ratio} | {of_ceiling} |")
    if NOTES.exists():
        lines += ["", NOTES.read_text().strip()]
    (ROOT / "RESULTS.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
