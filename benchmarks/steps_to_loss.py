"""How many steps a finished run took to a validation loss, beside a published run.

python benchmarks/steps_to_loss.py --run-dir DIR --model FILE [--loss 1.4697]
    [--peer-steps 5000] [--write-results]

DIR is the run directory of a `nanogpt train` that has ended, FILE the model that it wrote. Steps
and losses alone are compared, as nanoGPT's README tells them for its 10.7M parameters on
tinyshakespeare: 5,000 steps of 16,384 tokens, of which the best had a validation loss of 1.4697 (by
an estimate from 200 batches; ours is over the whole validation part). The clock is not: the
published run is another machine's.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402
from recording import RESULTS, device_name, slug, write_checks  # noqa: E402

import nanogpt  # noqa: E402

LEFT_OUT = ("text", "run-dir", "output", "sample-tokens", "tensorboard", "json", "config", "resume")


def main() -> int:
    """Compare, print, write. Returns 1 where the run never came so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--loss", type=float, default=1.4697, help="default 1.4697")
    parser.add_argument("--peer-steps", type=int, default=5000, help="default 5,000")
    parser.add_argument("--peer-tokens", type=int, default=16_384, help="of its step")
    parser.add_argument("--write-results", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    model, _ = nanogpt.load(options.model)
    row = compared(
        options.run_dir, model.config, options.loss, options.peer_steps, options.peer_tokens
    )
    print(json.dumps(row, indent=1))
    if options.write_results:
        write_checks(
            RESULTS / slug(device_name()),
            "steps-to-loss",
            {"steps to a loss": [row]},
            ceilings={},
            command="python benchmarks/steps_to_loss.py --run-dir RUN --model FILE --write-results",
        )
    return 0 if row["reached at step"] else 1


def compared(
    run_dir: Path, shape: nanogpt.GPTConfig, loss: float, peer_steps: int, peer_tokens: int
) -> dict[str, Any]:
    """What the run's files say; steps of evaluations alone."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "val_loss" in row]
    identity = json.loads((run_dir / "run.json").read_text())
    batch = identity["identity"]["batch_size"]
    flags = yaml.safe_load((run_dir / "config.yaml").read_text())
    reached = next((row["step"] for row in rows if row["val_loss"] <= loss), None)
    best = min(rows, key=lambda row: row["val_loss"])
    return {
        "flags": " ".join(f"--{k} {v}" for k, v in flags.items() if k not in LEFT_OUT),
        "parameters": shape.n_parameters(),
        "steps": rows[-1]["step"],
        "tokens of a step": batch * shape.block_size,
        "loss to reach": loss,
        "reached at step": reached,
        "best": round(best["val_loss"], 4),
        "at step": best["step"],
        "published steps": peer_steps,
        "tokens of its step": peer_tokens,
    }


if __name__ == "__main__":
    sys.exit(main())
