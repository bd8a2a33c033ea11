"""How close the forecast of memory is: `python benchmarks/memory.py [SHAPE …]`.

Every shape is trained for three steps with two evaluations and two checkpoints by the real command,
in a process of its own, which says what it forecast before the first step and what its peak was:
of the process on a CPU, of what torch had allocated on a CUDA device.

The figures stand in benchmarks/results/<device>/memory.json, from which
benchmarks/make_results.py makes a table. It fails where a forecast is off by more than 15 %.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recording import RESULTS, device_name, slug, write_checks  # noqa: E402

LIMIT = 0.15
STEPS = 3


@dataclass(frozen=True)
class Shape:
    """A model, what is computed at once, and further flags.

    Attributes:
        layers, heads, width, block, vocabulary: of the model.
        batch: sequences computed at once.
    """

    layers: int
    heads: int
    width: int
    block: int
    vocabulary: int
    batch: int
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        shape = f"{self.layers} x {self.heads} x {self.width}, {self.block} tokens, "
        shape += f"vocabulary {self.vocabulary:,}, batch {self.batch}"
        return " ".join([shape, *self.flags])


S, M, LARGE = (4, 4, 128, 64, 65), (6, 6, 384, 256, 65), (12, 12, 768, 64, 50257)
SHAPES = {
    "S": Shape(*S, 12),
    "S-dropout": Shape(*S, 12, ("--dropout", "0.1")),
    "S-256": Shape(*S, 256),
    "S-1024": Shape(*S, 1024),
    "S-1024-recompute": Shape(*S, 1024, ("--recompute",)),
    "M": Shape(*M, 16),
    "M-dropout": Shape(*M, 16, ("--dropout", "0.1")),
    "M-recompute": Shape(*M, 16, ("--recompute",)),
    "M-recompute-dropout": Shape(*M, 16, ("--recompute", "--dropout", "0.1")),
    "M-accumulated": Shape(*M, 16, ("--micro-batch-size", "4")),
    "M-bfloat16": Shape(*M, 16, ("--dtype", "bfloat16")),
    "M-48": Shape(*M, 48),
    "M-48-recompute": Shape(*M, 48, ("--recompute",)),
    "large-vocabulary": Shape(*LARGE, 4),
    "large-vocabulary-32": Shape(*LARGE, 32),
    "large-vocabulary-recompute": Shape(*LARGE, 32, ("--recompute",)),
}


def main() -> int:
    """Measure the shapes that are named, all without names. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    unknown = set(options.shapes) - set(SHAPES)
    if unknown:
        parser.error(f"there is no shape {unknown.pop()!r}: {', '.join(SHAPES)}")
    path = RESULTS / slug(device_name()) / "memory.json"
    rows = json.loads(path.read_text())["checks"]["memory"] if path.exists() else {}
    for name in options.shapes or SHAPES:
        rows[name] = measure(SHAPES[name], options.device)
        print(describe(name, rows[name]), flush=True)
        ordered = {each: rows[each] for each in SHAPES if each in rows}
        command = "python benchmarks/memory.py"
        write_checks(path.parent, "memory", {"memory": ordered}, ceilings={}, command=command)
    worst = max(rows, key=lambda name: abs(rows[name]["ratio"] - 1))
    print("furthest off:", describe(worst, rows[worst]))
    return int(abs(rows[worst]["ratio"] - 1) > LIMIT)


def measure(shape: Shape, device: str = "auto") -> dict[str, Any]:
    """Train in a process of its own: forecast and peak, with and without the program."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(text_of(shape), encoding="utf-8")
        command = [sys.executable, "-m", "nanogpt.train", "--text", str(text), "--json"]
        sizes = {
            "--n-layer": shape.layers,
            "--n-head": shape.heads,
            "--n-embd": shape.width,
            "--block-size": shape.block,
            "--batch-size": shape.batch,
            "--max-steps": STEPS,
            "--eval-interval": 2,
            "--val-fraction": 0.04 if shape.vocabulary > 10_000 else 0.3,
            "--sample-tokens": 8,
            "--output": f"{folder}/model.pth",
            "--run-dir": f"{folder}/run",
            "--device": device,
        }
        command += [str(word) for pair in sizes.items() for word in pair]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NANOGPT_CACHE": folder}
        done = subprocess.run(
            [*command, "--no-tensorboard", *shape.flags],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{shape}: {done.stderr}")
    memory = json.loads(done.stdout)["memory_bytes"]
    return {"shape": str(shape), **memory, "ratio": memory["forecast"] / memory["peak"]}


def text_of(shape: Shape) -> str:
    """A text of so many different characters (one id is the end of a text), and long enough."""
    characters = [chr(code) for code in range(0x21, 0x20000) if chr(code).isprintable()]
    characters = characters[: shape.vocabulary - 1]
    n = max(len(characters), shape.batch * (shape.block + 1) * 2, 60_000)
    return "".join(characters[k % len(characters)] for k in range(n))


def describe(name: str, row: dict[str, Any]) -> str:
    """A row in one line."""
    sizes = f"forecast {row['forecast'] / 1e6:,.0f} MB, peak {row['peak'] / 1e6:,.0f} MB"
    program = f"of which the program {row['program'] / 1e6:,.0f} MB"
    return f"{name}: {sizes}, {program}, ratio {row['ratio']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
