"""Model files: one file that is everything, written whole or not at all, verified when read.

    .safetensors   metadata key "nanogpt": the sealed metadata as JSON
    .pth           a plain state dict; its "_extra_state" holds the same JSON as uint8

Both hold no times and no paths, so that equal models are equal files. See `metadata.py` for the
check sums.
"""

import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch

from nanogpt import metadata
from nanogpt.config import GPTConfig
from nanogpt.errors import InputError, UsageError
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

SUFFIXES = (".pth", ".safetensors")
_SAFETENSORS_KEY = "nanogpt"


def save(model: GPT, path: str | os.PathLike[str]) -> None:
    """Write a model with its configuration, tokenizer and calibration to one file.

    Args:
        path: ends in .pth or .safetensors; replaced only once the new file is complete on disk.
    Raises: UsageError for another ending; OSError where the file cannot be written.
    """
    path = Path(path)
    check_suffix(path)
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if name != metadata.KEY
    }
    sealed = metadata.seal(model.describe(), tensors)
    if path.suffix == ".pth":
        state = {**tensors, metadata.KEY: metadata.to_tensor(sealed)}
        write_atomically(path, lambda file: write_tensors(state, file))
    else:
        text = metadata.canonical_json(sealed).decode()
        raw = safetensors.torch.save(tensors, metadata={_SAFETENSORS_KEY: text})
        write_atomically(path, lambda file: file.write(raw))


def load(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[GPT, Tokenizer | None]:
    """Read a model file: the model in evaluation mode and its tokenizer.

    Raises: InputError where the file is missing, damaged or not one of ours.
    """
    path = Path(path)
    tensors, content = _read(path)
    problem = metadata.verify(content, tensors)
    if problem:
        raise InputError(f"{path} is damaged: {problem}")
    config = _config(path, content.get("config"))
    # Before anything is allocated for a shape that the weights do not have.
    if config.n_parameters() != sum(tensor.numel() for tensor in tensors.values()):
        raise InputError(f"{path} is damaged: its weights do not fit its configuration")
    model = GPT(config)
    try:
        model.load_state_dict({**tensors, metadata.KEY: metadata.to_tensor(content)})
    except RuntimeError:
        raise InputError(f"{path} is damaged: its weights do not fit its configuration") from None
    except InputError as error:  # of its tokenizer or calibration
        raise InputError(f"{path} is damaged: {error}") from None
    tokenizer = model.tokenizer
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{path} is damaged: its tokenizer has {tokenizer.vocab_size:,} tokens, its model "
            f"{config.vocab_size:,}"
        )
    return model.to(device).eval(), tokenizer


def _config(path: Path, fields: Any) -> GPTConfig:
    known = [entry.name for entry in dataclasses.fields(GPTConfig)]
    if not isinstance(fields, dict):
        raise InputError(f"{path} is damaged: its metadata has no configuration")
    unknown = next((name for name in fields if name not in known), None)
    if unknown is not None:
        raise InputError(f"{path} has a field in its configuration that is unknown: {unknown!r}")
    missing = next((name for name in known if name not in fields), None)
    if missing is not None:
        raise InputError(f"{path} is damaged: its configuration has no {missing}")
    try:
        return GPTConfig(**fields)
    except ValueError as error:
        raise InputError(f"{path} has no usable configuration: {error}") from None


def check_suffix(path: Path) -> None:
    """Raises: UsageError where a model file's name has no known ending."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"a model file ends in {' or '.join(SUFFIXES)}, but not {path.name!r}")


def check_output(output: Path) -> None:
    """Raises: UsageError where a model could not be written to --output at the end."""
    check_suffix(output)
    if output.exists() and not output.is_file():
        raise UsageError(f"--output {output} exists and is not a file")
    check_writable(output)


def write_output(model: GPT, output: Path) -> None:
    """Save a model where --output says, with the folders above it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    save(model, output)


def same_place(a: str | Path, b: str | Path) -> bool:
    """Whether two names lead to one place, links followed; one that leads to itself does not."""
    return os.path.realpath(a) == os.path.realpath(b)


def check_writable(output: Path, flag: str = "--output") -> None:
    """Raises: UsageError where what `flag` names could not be written. Nothing is left there."""
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {output} cannot be written: {error.strerror}") from None


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a model file, not verified yet."""
    if not path.exists():
        if path.is_symlink():
            raise InputError(f"the model file {path} is a link that leads nowhere")
        raise InputError(f"there is no model file {path}")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    if path.stat().st_size == 0:
        raise InputError(f"the model file {path} is empty")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} is not a model file: its name ends in {' or '.join(SUFFIXES)}")
    return _read_pth(path) if path.suffix == ".pth" else _read_safetensors(path)


def _read_pth(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # damage shows as a dozen kinds: zip, pickle, key, seek, unicode …
            raise InputError(
                f"{path} cannot be read: it is damaged or not a file of tensors"
            ) from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} is not a model file of nanogpt: it holds more than weights")
    extra = state.pop(metadata.KEY, None)
    if extra is None:
        raise InputError(
            f"{path} holds weights without a configuration: make the GPT yourself and call "
            f"load_state_dict"
        )
    try:
        return state, metadata.from_tensor(extra)
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_SAFETENSORS_KEY)
            # Copied out of the memory map, so that a later change of the file changes nothing.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError:
        raise InputError(f"{path} cannot be read: it is damaged or not safetensors") from None
    if text is None:
        raise InputError(f"{path} is not a model file of nanogpt: it has no configuration")
    try:
        return tensors, metadata.from_bytes(text.encode())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None


def write_tensors(state: Any, file: IO[bytes]) -> None:
    """torch.save by way of memory: on a full disk torch's own writer hides the OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    file.write(buffer.getbuffer())


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one.

    A temporary file beside it, fsync, rename, fsync of the folder.
    """
    with _temporary_beside(path) as (file, temporary):
        write(file)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
    fsync(path.parent)


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[tuple[IO[bytes], str]]:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)  # mkstemp's own files are private
            yield file, temporary
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def fsync(path: Path) -> None:
    """Make a file's content durable, or the renames inside a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
