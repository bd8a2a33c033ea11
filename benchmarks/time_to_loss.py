"""How long until tinyshakespeare is written as well as nanoGPT's CPU configuration writes it.

python benchmarks/time_to_loss.py --peer-dir DIR [--recipe standard …] [--write-results]

DIR is a checkout of nanoGPT; $NANOGPT_DATA holds tinyshakespeare.txt. First its train.py runs as
its README says for a CPU, in a copy of the checkout, and what it leaves is judged on the whole
validation part. Then `nanogpt train` runs on the same text, once for each --recipe, and the clock
is read when metrics.jsonl has a loss that is as low: from the start of the process, the imports and
every evaluation included on both sides. Flags after -- go to `train`.
"""

import argparse
import json
import os
import pickle
import shutil
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
from recording import RESULTS, nanogpt_model, slug, write_suites  # noqa: E402

from nanogpt.data import gather, validation_windows  # noqa: E402
from nanogpt.measuring import describe_row, device_name, make_row, measure_ceilings  # noqa: E402

TEXT = "tinyshakespeare.txt"
CONFIG = "config/train_shakespeare_char.py"
COPIED = ("train.py", "model.py", "configurator.py", CONFIG)
FLAGS = (
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1"),
    *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)
"""Of nanoGPT's README, for a CPU."""
POLL_SECONDS = 0.02


def main() -> int:
    """Measure, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-dir", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--recipe", nargs="+", default=["standard"], help="of `train`")
    parser.add_argument("--write-results", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--max-iters", type=int, help="of nanoGPT, for a trial")
    parser.add_argument("flags", nargs="*", help="flags of `train`, after --")
    options = parser.parse_args()
    text = Path(os.environ.get("NANOGPT_DATA", ""), TEXT)
    if not os.environ.get("NANOGPT_DATA") or not text.is_file():
        parser.error(f"$NANOGPT_DATA names no folder with {TEXT}")
    for name in COPIED:
        if not (options.peer_dir / name).is_file():
            parser.error(f"--peer-dir {options.peer_dir} is no checkout of nanoGPT: no {name}")
    if options.write_results and options.max_iters:
        parser.error("--max-iters is for a trial, whose figures are not written")
    names = ("max_iters", "lr_decay_iters", "eval_interval")  # it saves where it evaluates
    iterations = [f"--{name}={options.max_iters}" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        theirs = run_nanogpt(
            options.peer_dir, text, Path(folder), iterations if options.max_iters else []
        )
        print(f"nanoGPT: loss {theirs['loss']:.4f} after {theirs['seconds']:.1f} s", flush=True)
        rows = []
        for recipe in options.recipe:
            ours = run_ours(text, Path(folder, recipe), recipe, options.flags, theirs["loss"])
            if ours["seconds"] is None:
                print(f"{recipe}: never as low; its best was {ours['best']:.4f}")
                continue
            rows.append(as_row(recipe, options.flags, ours, theirs))
            print(describe_row(rows[-1]), flush=True)
    if options.write_results and rows:
        write_suites(
            RESULTS / slug(device_name()),
            rows,
            ceilings=measure_ceilings(),
            command="python benchmarks/time_to_loss.py --peer-dir nanoGPT --write-results",
        )
    return 0 if len(rows) == len(options.recipe) else 1


def as_row(
    recipe: str, flags: list[str], ours: dict[str, Any], theirs: dict[str, Any]
) -> dict[str, Any]:
    """Both clocks and what they stopped at."""
    return make_row(
        "time-to-loss",
        {
            "text": "tinyshakespeare",
            "recipe": recipe,
            **({"flags": " ".join(flags)} if flags else {}),
        },
        ours["dtype"],
        ours["seconds"],
        {"nanoGPT, CPU configuration": theirs["seconds"]},
        also={
            "loss": round(ours["loss"], 4),
            "nanoGPT's": round(theirs["loss"], 4),
            "step": f"{ours['step']:,}",
            "parameters": f"{ours['parameters']:,}",
            "nanoGPT's parameters": f"{theirs['parameters']:,}",
            "seconds of the whole process": round(ours["whole_seconds"], 1),
            "its last loss": round(ours["last"], 4),
        },
    )


def prepare_text(text: str, folder: Path) -> np.ndarray:
    """nanoGPT's files of a text by characters: train.bin, val.bin (the last tenth), meta.pkl.

    Returns: the ids of the validation part.
    """
    letters = sorted(set(text))
    places = {letter: place for place, letter in enumerate(letters)}
    ids = np.array([places[letter] for letter in text], dtype=np.uint16)
    cut = int(len(text) * 0.9)
    folder.mkdir(parents=True)
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": places}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return ids[cut:]


def run_nanogpt(
    checkout: Path, text: Path, folder: Path, more: list[str]
) -> dict[str, float | int]:
    """Train in a copy of the checkout; seconds of the process, and the loss of its checkpoint.

    Raises: SystemExit with what it printed last where it fails.
    """
    place = folder / "nanoGPT"
    for name in COPIED:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / name, place / name)
    val_ids = prepare_text(text.read_text(), place / "data" / "shakespeare_char")
    command = [sys.executable, "train.py", CONFIG, *FLAGS, *more, "--out_dir=out"]
    log = place / "log.txt"
    with log.open("w") as file:
        started = time.perf_counter()
        done = subprocess.run(command, cwd=place, stdout=file, stderr=subprocess.STDOUT)
        seconds = time.perf_counter() - started
    if done.returncode or not (place / "out" / "ckpt.pt").is_file():
        sys.exit("nanoGPT's train.py failed:\n" + log.read_text()[-2000:])
    saved = torch.load(place / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    module = nanogpt_model(place)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    parameters = sum(each.numel() for each in model.parameters())
    return {"seconds": seconds, "loss": whole_loss(model, val_ids), "parameters": parameters}


@torch.inference_mode()
def whole_loss(model: torch.nn.Module, ids: np.ndarray) -> float:
    """Mean nats per target of all of `ids`, in consecutive windows of the model's context."""
    model.eval()
    total, count = 0.0, 0
    for starts, length in validation_windows(len(ids), model.config.block_size):
        for first in range(0, len(starts), 256):
            windows = torch.from_numpy(gather(ids, starts[first : first + 256], length))
            _, loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
            targets = len(windows) * length
            total += loss.item() * targets
            count += targets
    return total / count


def run_ours(
    text: Path, folder: Path, recipe: str, flags: list[str], target: float
) -> dict[str, Any]:
    """Train, and read the clock when an evaluation is at most `target`.

    Returns: seconds (None where it never was), loss and step of that evaluation, the best and the
        last loss, the process's whole_seconds, the model's parameters, the dtype of its products.
    """
    folder.mkdir()
    model, run = folder / "model.pth", folder / "run"
    command = [sys.executable, "-m", "nanogpt.train", "--recipe", recipe, "--tokenizer", "char"]
    command += ["--text", str(text), "--output", str(model), "--run-dir", str(run), *flags]
    # Its own cache of tokens, so that reading the text is part of the time, as preparing is not.
    known = {**os.environ, "NANOGPT_CACHE": str(folder / "cache")}
    environment = {**known, "PYTHONPATH": os.pathsep.join([str(ROOT), known.get("PYTHONPATH", "")])}
    log = folder / "log.txt"
    reached = None
    with log.open("w") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            if reached is None and first_below(run / "metrics.jsonl", target) is not None:
                reached = time.perf_counter() - started
            time.sleep(POLL_SECONDS)
        whole = time.perf_counter() - started
    if process.returncode:
        sys.exit("nanogpt train failed:\n" + log.read_text()[-2000:])
    evaluations = evaluations_of(run / "metrics.jsonl")
    found = first_below(run / "metrics.jsonl", target)
    saved = torch.load(model, map_location="cpu", weights_only=True)
    sizes = {each.data_ptr(): each.numel() for each in saved.values() if each.is_floating_point()}
    return {
        "seconds": None if found is None else reached or whole,
        "loss": None if found is None else found["val_loss"],
        "step": None if found is None else found["step"],
        "best": min(row["val_loss"] for row in evaluations),
        "last": evaluations[-1]["val_loss"],
        "whole_seconds": whole,
        "parameters": sum(sizes.values()),
        "dtype": json.loads((run / "run.json").read_text())["step"]["dtype"],
    }


def evaluations_of(path: Path) -> list[dict[str, Any]]:
    """The rows with a validation loss; a line that is still being written does not count."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [row for row in map(json.loads, lines) if row.get("val_loss") is not None]


def first_below(path: Path, target: float) -> dict[str, Any] | None:
    """The first evaluation whose loss is at most `target`."""
    return next((row for row in evaluations_of(path) if row["val_loss"] <= target), None)


if __name__ == "__main__":
    sys.exit(main())
