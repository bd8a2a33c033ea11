"""Model files: one file that is everything, written whole or not at all, verified when read.

    .safetensors   metadata key "nanogpt": the sealed metadata as JSON
    .pth           a plain state dict; its "_extra_state" holds the same JSON as uint8

Both hold no times and no paths, so that equal models are equal files. See `metadata.py` for the
check sums.
"""

import contextlib
import errno
import fcntl
import glob
import io
import mmap
import os
import pickletools
import re
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
_SLACK_BYTES = 4_000_000
_LARGEST_PICKLE_BYTES = 64 * 2**20
_OF_TENSORS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
)
_SAFETENSORS_KEY = "nanogpt"
# Asking for it sets it, which two threads must not do at once.
_UMASK = os.umask(0)
os.umask(_UMASK)
# A temporary file is younger for as long as its writer has not locked it yet.
_LEFT_OVER_SECONDS = 60


@dataclass(frozen=True)
class Snapshot:
    """What a model file holds of a model.

    Attributes:
        content: configuration, tokenizer and calibration, JSON-ready.
        tensors: the weights, on the CPU.
    """

    content: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def to_model(self) -> GPT:
        """The model, in evaluation mode.

        Raises: ValueError, TypeError or KeyError where the content has no usable configuration;
            RuntimeError where the weights do not fit it.
        """
        model = GPT(GPTConfig(**self.content["config"]))
        model.load_state_dict({**self.tensors, metadata.KEY: metadata.to_tensor(self.content)})
        return model.eval()


def _ask_for_memory(n_bytes: int) -> None:
    """Raises: MemoryError where so much cannot be had.

    The library of safetensors, which takes as much, ends the process where it cannot, or stops it
    for ever.
    """
    try:
        mmap.mmap(-1, n_bytes).close()  # nothing of it is touched
    except (OSError, ValueError) as error:
        raise MemoryError(f"{n_bytes:,} bytes cannot be had") from error


def snapshot(model: GPT, *, copy: bool = True) -> Snapshot:
    """A model as it is now. Copies stay what they are when the model is trained on."""
    tensors = {
        name: value.detach().to("cpu", copy=copy).contiguous()
        for name, value in model.state_dict().items()
        if name != metadata.KEY
    }
    return Snapshot(model.describe(), tensors)


def save(model: GPT | Snapshot, path: str | os.PathLike[str]) -> None:
    """Write a model with its configuration, tokenizer and calibration to one file.

    Args:
        path: ends in .pth or .safetensors; replaced only once the new file is complete on disk.
    Raises: UsageError for another ending; OSError where the file cannot be written; MemoryError.
    """
    path = Path(path)
    check_suffix(path)
    taken = snapshot(model, copy=False) if isinstance(model, GPT) else model
    tensors = taken.tensors
    sealed = metadata.seal(taken.content, tensors)
    if path.suffix == ".pth":
        state = {**tensors, metadata.KEY: metadata.to_tensor(sealed)}
        write_atomically(path, lambda file: write_tensors(state, file))
    else:
        text = metadata.canonical_json(sealed).decode()
        _ask_for_memory(2 * sum(each.nbytes for each in tensors.values()) + _SLACK_BYTES)
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
    problem = _problem_with(tensors) or metadata.verify(content, tensors)
    if problem:
        raise InputError(f"{path} is damaged: {problem}")
    try:
        config = _config_of(content)
    except ValueError as error:
        raise InputError(f"{path} has no usable configuration: {error}") from None
    # Before anything is allocated for a shape that the weights do not have.
    if config.n_parameters() != sum(tensor.numel() for tensor in tensors.values()):
        raise InputError(f"{path} is damaged: its weights do not fit its configuration")
    try:
        model = Snapshot(content, tensors).to_model()
    except RuntimeError:
        raise InputError(f"{path} is damaged: its weights do not fit its configuration") from None
    except InputError as error:  # of its tokenizer or its calibration
        raise InputError(f"{path} cannot be used: {error}") from None
    if model.tokenizer is not None:
        check_vocabulary(path, model.tokenizer, config.vocab_size)
    return model.to(device), model.tokenizer


def check_vocabulary(path: str | os.PathLike[str], tokenizer: Tokenizer, size: int) -> None:
    """Raises: InputError where a model file has another number of tokens than its tokenizer."""
    if tokenizer.vocab_size != size:
        raise InputError(
            f"{path} is damaged: its tokenizer has {tokenizer.vocab_size:,} tokens, its weights "
            f"have {size:,}"
        )


def _problem_with(tensors: dict[str, torch.Tensor]) -> str | None:
    """What is no weight of ours, in words, or None."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name.isascii():
            return f"it has a tensor called {ascii(name)[:40]}"
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or not tensor.is_floating_point():
            return f"{name[:80]} is not an array of floating point numbers"
    return None


def _config_of(content: dict[str, Any]) -> GPTConfig:
    """Raises: ValueError in words where metadata hold no shape of a model."""
    fields = content.get("config")
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object" if "config" in content else "there is none")
    unknown = sorted(fields.keys() - GPTConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"{unknown[0][:40]!r} is not known")
    return GPTConfig(**fields)


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
    make_folder(output.parent)
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
        raise InputError(
            f"{path} is not a model file: the name of one ends in {' or '.join(SUFFIXES)}"
        )
    return _read_pth(path) if path.suffix == ".pth" else _read_safetensors(path)


def read_tensors(path: Path) -> Any:
    """What torch.save wrote of tensors, numbers and texts, in lists and dicts; nothing is run.

    What the file declares is held against its own size before torch makes room for it: records
    are not compressed, no record and no tensor is more than the bytes that are there.

    Raises: InputError where it is damaged or anything else.
    """
    with path.open("rb") as file:
        try:
            _check_archive(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
            _check_dense(state, os.fstat(file.fileno()).st_size)
        except Exception:  # damage shows as a dozen kinds: zip, pickle, key, seek, unicode …
            raise InputError(
                f"{path} cannot be read: it is damaged or not a file of tensors"
            ) from None
    return state


def _check_archive(file: IO[bytes]) -> None:
    """Raises: ValueError or zipfile's errors for a zip that torch.save does not write."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as opened:
        members, directory = opened.infolist(), opened.start_dir
        file.seek(max(0, size - 98))
        # Where every reader of zip files finds the same directory: no comment, nothing before it.
        tail = file.read().rjust(98, b"\0")
        count, offset = *struct.unpack("<H", tail[86:88]), *struct.unpack("<L", tail[92:96])
        if tail[56:60] == b"PK\6\7":
            if tail[:4] != b"PK\6\6" or struct.unpack("<Q", tail[64:72]) != (size - 98,):
                raise ValueError("the 64-bit directory is elsewhere")
            count, offset = *struct.unpack("<Q", tail[32:40]), *struct.unpack("<Q", tail[48:56])
        ends = tail[76:80] == b"PK\5\6" and tail[96:] == b"\0\0"
        if not ends or (count, offset) != (len(members), directory):
            raise ValueError("the directory is elsewhere")
        names = {member.filename.lower() for member in members}
        if len(names) < len(members) or len({name.partition("/")[0] for name in names}) != 1:
            raise ValueError("records have one name, or lie in several folders")
        if any(m.compress_type or m.compress_size != m.file_size for m in members):
            raise ValueError("a record is compressed")
        if sum(member.file_size for member in members) > size:
            raise ValueError("the records are more than the file")
        (pickled,) = [m for m in members if m.filename.endswith("/data.pkl")]
        if pickled.file_size > _LARGEST_PICKLE_BYTES:
            raise ValueError("too long a description of tensors")
        for operation, value, _ in pickletools.genops(opened.read(pickled)):
            if operation.name == "GLOBAL" and not _OF_TENSORS.fullmatch(str(value)):
                raise ValueError(f"{value} is no part of tensors")


def _check_dense(state: Any, size: int) -> None:
    """Raises: ValueError where tensors are views that show more than the file's bytes."""
    left, seen = [state], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            size -= value.numel() * value.element_size()
            if size < 0 or not value.is_contiguous():
                raise ValueError("a tensor shows more than there is")
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value


def _read_pth(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state = read_tensors(path)
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
    _sweep_beside(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            _is_ours_alone(file)  # until it is closed: it is not left over
            os.fchmod(file.fileno(), 0o666 & ~_UMASK)  # mkstemp's own files are private
            yield file, temporary
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _sweep_beside(path: Path) -> None:
    """Remove what processes that were killed have left of writing this file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            if time.time() - left.stat().st_mtime > _LEFT_OVER_SECONDS and _is_ours_alone(file):
                left.unlink()


def _is_ours_alone(file: IO[bytes]) -> bool:
    """Lock a file against other processes; False where one has it or where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_folder(path: Path) -> None:
    """Make a folder and those above it, all durable, where they are not there yet."""
    made = [each for each in (path, *path.absolute().parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        fsync(folder.parent)


def fsync(path: Path) -> None:
    """Make a file's content durable, or the renames inside a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not do this for folders
            raise
    finally:
        os.close(handle)
