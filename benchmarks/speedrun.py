"""From a text to a binary that writes, with the real commands: `make speedrun`.

train -> align with terms -> calibrate -> export -> nanogpt-generate, one after the other, in
minutes on a CPU. The last tenth of the text is kept from training and calibrates. What every step
took and gave stands in benchmarks/results/<device>/speedrun.json, from which
benchmarks/make_results.py makes RESULTS.md and the table in the README. --quick tries the steps on
a few thousand characters and records nothing but where --result says.
"""

import argparse
import json
import math
import os
import pydoc_data.topics
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recording import RESULTS, device_name, slug, write_checks  # noqa: E402

RECIPE = "speed"
LENGTHS: dict[str, dict[str, Any]] = {
    "full": {
        "train": {"--epochs": 1},
        "align": {"--rounds": 2, "--num-generations": 512, "--max-completion-length": 96},
        "write": {"--max-new-tokens": 500},
    },
    "quick": {
        "train": {
            "--max-steps": 20,
            "--batch-size": 8,
            "--n-layer": 1,
            "--n-head": 2,
            "--n-embd": 32,
            "--block-size": 32,
        },
        "align": {"--rounds": 1, "--num-generations": 16, "--max-completion-length": 24},
        "write": {"--max-new-tokens": 40},
    },
}
QUICK_CHARACTERS = 20_000
TERMS = 8
LEAST_LETTERS = 6


class StepFailedError(Exception):
    """A command ended with another code than 0."""


def main(argv: list[str] | None = None) -> int:
    """Run the steps, print and record what they gave. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a text; without it tinyshakespeare or the built-in corpus")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "speedrun")
    parser.add_argument("--quick", action="store_true", help="try the steps in seconds")
    parser.add_argument("--result", type=Path, help="folder of speedrun.json")
    options = parser.parse_args(argv)
    name, text = read_text(options.text)
    if options.quick:
        text = text[:QUICK_CHARACTERS]
    try:
        checks = speedrun(name, text, options.folder, "quick" if options.quick else "full")
    except StepFailedError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(table(checks)))
    print(f"\nwritten by the binary:\n{checks['text_written']}")
    folder = options.result or (None if options.quick else RESULTS / slug(device_name()))
    if folder is not None:
        content = {"speedrun": checks}
        print(write_checks(folder, "speedrun", content, ceilings={}, command="make speedrun"))
    return 0


def read_text(path: str | None) -> tuple[str, str]:
    """A text and its name: the one that is named, tinyshakespeare, or what comes with Python."""
    if path is None:
        real = Path(os.environ.get("NANOGPT_DATA") or "", "tinyshakespeare.txt")
        path = str(real) if real.is_file() else None
    if path is None:
        topics = pydoc_data.topics.topics
        return "the Python language reference", "\n".join(topics[key] for key in sorted(topics))
    return Path(path).name, Path(path).read_text(encoding="utf-8")


def speedrun(name: str, text: str, folder: Path, lengths: str) -> dict[str, Any]:
    """All steps in a folder. Returns seconds and figures of each.

    Raises: StepFailedError naming the command that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cut = len(text) * 9 // 10
    (folder / "text.txt").write_text(text[:cut], encoding="utf-8")
    (folder / "unseen.txt").write_text(text[cut:], encoding="utf-8")
    terms, chosen = frequent_words(text[:cut]), LENGTHS[lengths]
    steps: dict[str, dict[str, Any]] = {}

    def step(name: str, command: list[Any]) -> dict[str, Any]:
        print(f"{name}: {' '.join(map(str, command))}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        done = subprocess.run(
            [str(word) for word in command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            raise StepFailedError(f"{name} ended with exit code {done.returncode}")
        steps[name] = {"seconds": seconds}
        return dict(json.loads(done.stdout))

    def module(name: str, flags: dict[str, Any]) -> list[Any]:
        return [sys.executable, "-m", f"nanogpt.{name}", "--json", *flat(flags)]

    flags = {
        "--recipe": RECIPE,
        "--text": "text.txt",
        "--output": "gpt.pth",
        "--run-dir": "train",
        "--resume": "never",
    }
    said = step("train", module("train", flags | chosen["train"]))
    steps["train"] |= {
        "steps": said["steps"],
        "val_loss": said["val_loss"],
        "bits_per_byte": said["val_bits_per_byte"],
        "baselines": said["baselines_bits_per_byte"],
        "bytes": (folder / "gpt.pth").stat().st_size,
    }
    flags = {
        "--align-terms": ",".join(terms),
        "--init": "gpt.pth",
        "--anchor-text": "text.txt",
        "--output": "aligned.pth",
        "--run-dir": "align",
        "--resume": "never",
    }
    said = step("align", module("advanced", flags | chosen["align"]))
    kept = {row["round"]: row for row in said["rounds"]}
    steps["align"] |= {
        "terms": terms,
        "term_rate_before": kept[0]["term_rate"],
        "term_rate_after": kept[said["round"]]["term_rate"],
    }
    flags = {"--model": "aligned.pth", "--text": "unseen.txt", "--output": "calibrated.pth"}
    said = step("calibrate", module("calibrate", flags))
    steps["calibrate"] |= {
        "temperature": said["temperature"],
        "ece_before": said["before"]["ece"],
        "ece_after": said["after"]["ece"],
        "bits_per_byte": said["after"]["bits_per_byte"],
    }
    step("export", module("export", {"--model": "calibrated.pth", "--output": "model.pt"}))
    steps["export"] |= {"bytes": (folder / "model.pt").stat().st_size}
    binary = Path(sys.executable).parent / "nanogpt-generate"
    if not binary.is_file():
        raise StepFailedError("nanogpt-generate is not built: make build needs a C++ compiler")
    said = step("write", [binary, "model.pt", "--seed", 7, "--json", *flat(chosen["write"])])
    timings = said["timings"]
    steps["write"] |= {
        "bytes": binary.stat().st_size,
        "tokens": len(said["tokens"]),
        "load_ms": timings["load_ms"],
        "first_token_ms": timings["first_token_ms"],
        "tokens_per_second": timings["decode_tokens_per_second"],
    }
    return {
        "text": name,
        "characters": len(text),
        "recipe": RECIPE,
        "seconds": sum(each["seconds"] for each in steps.values()),
        "steps": steps,
        "text_written": said["text"],
    }


def flat(flags: dict[str, Any]) -> list[Any]:
    return [word for pair in flags.items() for word in pair]


def frequent_words(text: str) -> list[str]:
    """The most frequent long words of a text, in lower case: what to write more of."""
    words = Counter(re.findall(rf"[a-z]{{{LEAST_LETTERS},}}", text.lower()))
    return [word for word, _ in sorted(words.items(), key=lambda pair: (-pair[1], pair[0]))][:TERMS]


def table(checks: dict[str, Any]) -> list[str]:
    """What every step took and gave, as a table for people."""
    steps = checks["steps"]
    train, align, calibrated = steps["train"], steps["align"], steps["calibrate"]
    written = steps["write"]
    peers = ", ".join(f"{name} {bits:.2f}" for name, bits in train["baselines"].items())
    gave = {
        "train": f"{train['steps']:,} steps, recipe {checks['recipe']}: validation "
        f"{train['val_loss']:.3f} nats a character, {train['bits_per_byte']:.3f} bits a byte "
        f"({peers})",
        "align": f"terms in 1,000 tokens: {per_thousand(align['term_rate_before'])} before, "
        f"{per_thousand(align['term_rate_after'])} after",
        "calibrate": f"temperature {calibrated['temperature']:.3f}; ECE "
        f"{calibrated['ece_before']:.4f} before, {calibrated['ece_after']:.4f} after",
        "export": f"one file of {steps['export']['bytes'] / 1e6:.1f} MB, compared with the model",
        "write": f"{written['tokens_per_second']:,.0f} tokens/s, the first after "
        f"{written['first_token_ms']:.1f} ms, from a binary of {written['bytes'] / 1e6:.1f} MB",
    }
    lines = ["| step | seconds | what came of it |", "|---|---|---|"]
    lines += [f"| {name} | {steps[name]['seconds']:.0f} | {gave[name]} |" for name in steps]
    return [*lines, f"| all | {checks['seconds']:.0f} | on {checks['text']} |"]


def per_thousand(rate: float) -> str:
    return f"{rate:.3g}" if math.isfinite(rate) else "none"


if __name__ == "__main__":
    sys.exit(main())
