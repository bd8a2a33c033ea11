"""Write a trained model for other programs: `python -m nanogpt.export --model gpt.pth`."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanogpt import checkpoint
from nanogpt.config import ExportConfig
from nanogpt.errors import InputError, NanoGPTError, UsageError
from nanogpt.export import archive, gguf, hf, torchscript
from nanogpt.export.quantize import QUANTIZATIONS, weights_of
from nanogpt.export.verify import Agreement, compare
from nanogpt.interruption import terminable
from nanogpt.model import GPT
from nanogpt.tokenizer import RecordTokenizer

OUTPUTS = {
    "torchscript": "model.pt",
    "safetensors": "model.safetensors",
    "hf": "model-hf",
    "gguf": "model.gguf",
}
"""Formats, and the name that is written where none is given."""
_QUANTIZED = ("torchscript", "gguf")
# Endings that say what a file is; another format's would mislead every reader.
_ENDINGS = {
    ".pth": "a state dict",
    ".safetensors": "safetensors",
    ".gguf": "gguf",
    ".pt": "torchscript",
}


@dataclass(frozen=True)
class Report:
    """What an export was.

    Attributes:
        output: what was written.
        bytes: of the file, or of the folder's files together.
        verified: whether what was written has been read back and compared.
        agreements: of torchscript, how far the engines are apart.
        note: why an engine was not compared, or None.
    """

    output: Path
    format: str
    quantize: str
    bytes: int
    verified: bool
    agreements: tuple[Agreement, ...] = ()
    note: str | None = None


def run(config: ExportConfig) -> int:
    """Check, write, compare, rename. Returns the exit code."""
    output = Path(config.output or OUTPUTS[config.format])
    check_combination(config.format, config.quantize, output)
    if output.exists() and Path(config.model).exists() and output.samefile(config.model):
        raise UsageError(f"--output {output} is the --model itself: give it another name")
    place, model_place = (Path(os.path.realpath(each)) for each in (output, config.model))
    if config.format == "hf" and place in model_place.parents:
        raise UsageError(f"--output {output} is replaced, and the --model lies in it: give another")
    # Where a link leads to, because that is what is written.
    checkpoint.check_writable(place)
    model, _ = checkpoint.load(config.model)
    say = partial(print, file=sys.stderr, flush=True)
    with terminable():
        report = export_model(
            model, output, format=config.format, quantize=config.quantize, verify=config.verify
        )
    for row in report.agreements:
        say(row.in_words())
    if report.note:
        say(report.note)
    checked = "read back and compared" if report.verified else "not verified"
    say(f"wrote {output}: {report.bytes:,} bytes, {checked}")
    if config.json:
        print(json.dumps(_as_json(report)))
    return 0


def export_model(
    model: GPT,
    output: str | os.PathLike[str],
    *,
    format: str = "torchscript",
    quantize: str = "none",
    verify: bool = True,
) -> Report:
    """Write a model in a format of other programs; equal models give equal files.

    Args:
        model: on any device; it is not changed.
        output: a file, or a folder for hf. It is replaced once the new one is complete and agrees.
        format: "torchscript" | "safetensors" | "hf" | "gguf".
        quantize: "none" | "bf16" | "int8", in torchscript and gguf.
        verify: read the file back and compare; torchscript: the logits of the model, of the file
            in libtorch and, where it is built, of the file in the native engine.
    Raises: UsageError for what cannot be combined; InputError where the format has no word for the
        model, or the model holds numbers that are not finite; NanoGPTError where what was written
        does not agree: then nothing is left.
    """
    output = Path(output)
    check_combination(format, quantize, output)
    if format in ("hf", "gguf") and isinstance(model.tokenizer, RecordTokenizer):
        raise InputError(
            f"the model was made by explore, whose whole values are single tokens, and {format} "
            f"has no word for these: use torchscript or safetensors"
        )
    foreign = [name for name in ("rotary", "qk_norm") if getattr(model.config, name)]
    if format in ("hf", "gguf") and foreign:
        raise InputError(
            f"the model has {' and '.join(foreign)}, which GPT-2 has not, and {format} holds "
            f"GPT-2's architecture alone: use torchscript or safetensors"
        )
    if format == "gguf":
        gguf.check(model, quantize)
    with _put_into_place(output) as path:
        agreements, note = _WRITERS[format](model, quantize, path, verify)
        size = sum(part.stat().st_size for part in [path, *path.rglob("*")] if part.is_file())
    return Report(output, format, quantize, size, verify, tuple(agreements), note)


def check_combination(format: str, quantize: str, output: Path) -> None:
    """Raises: UsageError for words that do not exist or do not go together."""
    if format not in OUTPUTS:
        raise UsageError(f"--format must be one of {', '.join(OUTPUTS)}, not {format!r}")
    if quantize not in QUANTIZATIONS:
        raise UsageError(f"--quantize must be one of {', '.join(QUANTIZATIONS)}, not {quantize!r}")
    if quantize != "none" and format not in _QUANTIZED:
        raise UsageError(
            f"--quantize {quantize} is for {' and '.join(_QUANTIZED)}; {format} holds float32"
        )
    if format == "safetensors":
        checkpoint.check_suffix(output)
    kind = _ENDINGS.get(output.suffix)
    if kind not in (None, format):
        raise UsageError(f"--output {output} ends as {kind} does, but --format is {format}")
    if format != "hf" and output.is_dir():
        raise UsageError(f"--output {output} is a folder; {format} is one file")
    if format != "hf" and output.exists() and not output.is_file():
        raise UsageError(f"--output {output} is a device or a pipe; {format} is one file")
    if format == "torchscript" and kind is None:
        raise UsageError(f"--output {output}: `sample` knows such an export by its ending .pt")
    if format == "hf" and output.exists():
        if not output.is_dir():
            raise UsageError(f"--output {output} is a file; hf is a folder")
        there = {entry.name for entry in output.iterdir()}
        strange = sorted(there - set(hf.FILES))
        if strange:
            raise UsageError(
                f"--output {output} holds more than an earlier export, such as {strange[0]}: "
                f"give a new folder"
            )
        missing = sorted(set(hf.ALWAYS) - there)
        if there and missing:
            raise UsageError(
                f"--output {output} is no earlier export, as it lacks {missing[0]}: "
                f"give a new folder"
            )


Outcome = tuple[list[Agreement], str | None]


def _torchscript(model: GPT, quantize: str, path: Path, check: bool) -> Outcome:
    with path.open("wb") as file:
        torchscript.write(model, quantize, file)
    if not check:
        return [], None
    content = archive.read(path)
    # Configuration, tokenizer and calibration, which no logits show.
    described = archive.describe(model.describe(), quantize, content.index["tensors"])
    if content.records[archive.INDEX] != described:
        raise NanoGPTError("nothing was written, because the index does not describe the model")
    rows, note = compare(model, quantize, path)
    for row in rows:
        if not row.holds:
            raise NanoGPTError(f"nothing was written, because {row.in_words()}")
    return rows, note


def _safetensors(model: GPT, quantize: str, path: Path, check: bool) -> Outcome:
    weights_of(model, quantize)  # refuses numbers that are not finite
    checkpoint.save(model, path)
    if check:
        again, _ = checkpoint.load(path)
        for (name, theirs), ours in zip(again.named_parameters(), model.parameters(), strict=True):
            if not torch.equal(theirs, ours.detach().cpu()):
                raise NanoGPTError(f"nothing was written, because {name} came back changed")
    return [], None


def _hf(model: GPT, quantize: str, path: Path, check: bool) -> Outcome:
    hf.write(model, path)
    if check:
        hf.verify(model, path)
    return [], None


def _gguf(model: GPT, quantize: str, path: Path, check: bool) -> Outcome:
    gguf.write(model, quantize, path)
    if check:
        gguf.verify(model, quantize, path)
    return [], None


_WRITERS = {"torchscript": _torchscript, "safetensors": _safetensors, "hf": _hf, "gguf": _gguf}


@contextmanager
def _put_into_place(output: Path) -> Iterator[Path]:
    """A path of the same name in a new folder beside `output`, renamed at the end.

    A crash at any moment, and any error inside, leaves what stood there before. (Between the two
    renames of a folder that replaces another one, that is under the temporary name.)
    """
    # The long way round where a link is written to, so that the link stays one.
    target = Path(os.path.realpath(output))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name[:32]}.", dir=target.parent) as folder:
        path = Path(folder) / target.name
        yield path
        for part in [path, *path.rglob("*")]:
            checkpoint.fsync(part)
        if target.is_dir():
            earlier = Path(folder) / "earlier"
            try:
                os.rename(target, earlier)
                os.rename(path, target)
            except BaseException:
                if earlier.exists() and not target.exists():
                    os.rename(earlier, target)
                raise
            shutil.rmtree(earlier)
        else:
            os.replace(path, target)
        checkpoint.fsync(target.parent)


def _as_json(report: Report) -> dict[str, Any]:
    rows = [
        {**asdict(row), "relative": row.largest / row.scale if row.scale else 0.0}
        for row in report.agreements
    ]
    return {**asdict(report), "output": str(report.output), "agreements": rows}
