"""Run directories: everything a run needs to go on, and everything it has to show.

    config.yaml            the flags, ready for --config
    run.json               what the run is (flags, text by its hash), what was picked, versions
    metrics.jsonl          one JSON object a line, see interface
    samples.jsonl events.jsonl
    checkpoints/00000500/  model.safetensors best.safetensors trainer.pt state.json manifest.json
    report.html  report.json  findings.json  tensorboard/  lock
    delivered.json         where the finished run's model has been written

A checkpoint is a folder that appears whole: written beside its place, every file fsynced, the
manifest with sizes and SHA-256 last, then renamed. The newest that verifies counts.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from nanogpt import checkpoint, journal, metadata
from nanogpt.errors import InputError, NanoGPTError, UsageError
from nanogpt.journal import Journal
from nanogpt.model import GPT

MANIFEST = "manifest.json"
_FILES = {"model.safetensors", "best.safetensors", "trainer.pt", "state.json"}
_KEPT = 2
_PAGES = ("report.html", "report.json", "findings.json")
_ASIDE = ".aside.tmp"
_DELIVERED = "delivered.json"
_IDENTITY = {"identity", "choices", "kernels", "versions"}
_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What reading damaged JSON raises."""
_JOURNALS = ("metrics.jsonl", "samples.jsonl", "events.jsonl")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        folder: where it is.
        state: the position and the counters, as saved.
    """

    folder: Path
    state: dict[str, Any]

    def load_model(self, which: str = "model") -> GPT:
        """The model ("model") or the best one so far ("best")."""
        return checkpoint.load(self.folder / f"{which}.safetensors")[0]

    def load_trainer(self) -> dict[str, Any]:
        """State of the optimizer and the loss scaler."""
        return checkpoint.read_tensors(self.folder / "trainer.pt")


class RunDirectory:
    """One run's folder, locked while in use.

    Args:
        path: the folder; made on entry.
        warn: receives a sentence about anything passed over or failed.
    Raises: UsageError where it cannot be made or another process trains in it.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path, self.warn = path, warn
        self._lock: IO[str] | None = None
        self._journals: dict[str, Journal] = {}
        self._verified: set[str] = set()

    def __enter__(self) -> "RunDirectory":
        self._refuse_links()
        self._refuse_foreign()
        try:
            checkpoint.make_folder(self.path / "checkpoints")
            self._lock = (self.path / "lock").open("w")
            checkpoint.fsync(self.path)  # before anything that the lock says is ours
        except OSError as error:
            raise UsageError(f"--run-dir {self.path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UsageError(f"another process is training in {self.path}") from None
        except OSError as error:
            self.warn(
                f"note: the file system of {self.path} has no locks ({error.strerror}): nothing "
                f"keeps a second process from training in it"
            )
        self._sweep()
        return self

    def _sweep(self) -> None:
        """Remove what a process that was killed has begun to write.

        A checkpoint that was put aside for another of its step, which never came, is taken back.
        """
        for aside in (self.path / "checkpoints").glob(f".*{_ASIDE}"):
            final = aside.with_name(aside.name.removeprefix(".").removesuffix(_ASIDE))
            if not final.exists():
                aside.rename(final)
        for folder in (self.path, self.path / "checkpoints"):
            for left in folder.glob(".*.tmp"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        for opened in self._journals.values():
            opened.close()
        self._journals.clear()
        if self._lock is not None:
            self._lock.close()

    def _refuse_links(self) -> None:
        """What a run writes stays in its folder, which may itself be reached by a link."""
        for name in ("lock", "run.json", "checkpoints", "tensorboard", *_PAGES, *_JOURNALS):
            if (self.path / name).is_symlink():
                raise UsageError(f"--run-dir {self.path} holds a link where a run writes: {name}")

    def _refuse_foreign(self) -> None:
        """Whatever a run would replace must be a run's, not somebody's own files.

        A run that was killed before run.json was there has left its lock.
        """
        if (self.path / "run.json").exists() or (self.path / "lock").exists():
            return
        for name in ("checkpoints", "tensorboard", "config.yaml", *_PAGES, *_JOURNALS):
            found = self.path / name
            if found.is_file() or (found.is_dir() and any(found.iterdir())):
                raise UsageError(
                    f"--run-dir {self.path} is not a run directory but holds {name}: name another"
                )

    # What the run is.

    def read_identity(self) -> dict[str, Any] | None:
        """run.json, or None for a new directory.

        Raises: InputError where it is damaged.
        """
        path = self.path / "run.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_bytes())
            # The first runs had no check sum, and nothing else either.
            unsealed = content.keys() <= _IDENTITY
            whole = unsealed or content.pop("sha256") == _digest_of(content)
        except _DAMAGED:
            whole = False
        if not whole or not isinstance(content.get("identity"), dict):
            raise InputError(f"{path} is damaged: train with another --run-dir or --resume never")
        return content

    def begin(self, content: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
        """Start a new run here: nothing of an earlier one stays."""
        import yaml

        for folder in ("checkpoints", "tensorboard"):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        (self.path / "checkpoints").mkdir()
        for name in (*_JOURNALS, *_PAGES, _DELIVERED):
            (self.path / name).unlink(missing_ok=True)
        self.write("config.yaml", yaml.safe_dump(dict(flags), sort_keys=False))
        sealed = {**content, "sha256": _digest_of(content)}
        self.write("run.json", json.dumps(sealed, indent=1, sort_keys=True))

    def remember(self, **choices: Any) -> None:
        """Put what was found out since the run began into run.json, beside what it began with.

        Raises: OSError where it cannot be written.
        """
        content = {**(self.read_identity() or {}), **choices}
        sealed = {**content, "sha256": _digest_of(content)}
        self.write("run.json", json.dumps(sealed, indent=1, sort_keys=True))

    def write(self, name: str, text: str) -> None:
        """Replace a file of the run, whole or not at all."""
        checkpoint.write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def write_report(self, html: str) -> Path:
        """Replace report.html."""
        self.write("report.html", html)
        return self.path / "report.html"

    # The model that the run was for.

    def has_delivered(self, output: Path) -> bool:
        """Whether this run has written its model there, and a file is there still."""
        delivered = self._delivered()
        if not output.exists() or delivered is None:
            return False
        digest = delivered.get(str(output.absolute()))
        if digest is not None and digest != _file_digest(output):
            self.warn(f"note: {output} was changed after this run wrote it, and stays as it is")
        return digest is not None

    def deliver(self, model: GPT, output: Path) -> bool:
        """Write the finished run's model where --output says.

        Once: what is made of the file later, such as a calibration, stays.
        Returns: whether it was written now.
        """
        if self.has_delivered(output):
            return False
        checkpoint.write_output(model, output)
        outputs = {**(self._delivered() or {}), str(output.absolute()): _file_digest(output)}
        content = {"outputs": outputs}
        sealed = {**content, "sha256": _digest_of(content)}
        self.write(_DELIVERED, json.dumps(sealed, indent=1, sort_keys=True))
        return True

    def _delivered(self) -> dict[str, str] | None:
        """Where the model has been written, with the SHA-256 of each file; None for nowhere."""
        path = self.path / _DELIVERED
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_bytes())
            whole = content.pop("sha256") == _digest_of(content)
        except (OSError, *_DAMAGED):
            whole = False
        if whole:
            return dict(content["outputs"])
        self.warn(f"{path} is damaged: the model is written again")
        return None

    # Journals: files of one JSON object a line, cut back to the checkpoint on resume.

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to a journal; where the disk is full it waits for the next checkpoint."""
        try:
            opened = self._journals.get(name)
            if opened is None:
                opened = self._journals[name] = Journal(self.path / name)
            opened.append(record)
        except OSError as error:
            reason = error.strerror or error
            self.warn(f"WARNING: {self.path / name} cannot be written now: {reason}")

    def journal(self, name: str) -> list[dict[str, Any]]:
        """All records of a journal; a line cut short by a crash is left out."""
        return journal.read(self.path / name)

    def journal_sizes(self) -> dict[str, int]:
        """Bytes of every journal; they go into the checkpoint, which makes them durable.

        Raises: OSError where lines cannot be written.
        """
        for opened in self._journals.values():
            opened.flush()
        paths = {name: self.path / name for name in _JOURNALS}
        return {name: p.stat().st_size if p.exists() else 0 for name, p in paths.items()}

    def cut_journals(self, sizes: Mapping[str, int]) -> None:
        """Forget what was written after a checkpoint, so that no line is repeated."""
        for name in _JOURNALS:
            path = self.path / name
            size, wanted = path.stat().st_size if path.exists() else 0, sizes.get(name, 0)
            if size > wanted:
                os.truncate(path, wanted)
            elif size < wanted:
                self.warn(f"WARNING: {path} has lost {wanted - size:,} bytes of its lines")

    # Checkpoints.

    def save(
        self,
        step: int,
        model: GPT | checkpoint.Snapshot,
        trainer: Mapping[str, Any],
        state: Mapping[str, Any],
        best: GPT | checkpoint.Snapshot | Path,
    ) -> Checkpoint:
        """Write a checkpoint, read it back, and only then drop older ones.

        Args:
            trainer: of the optimizer and whatever else; what torch reads with `weights_only`.
            state: of the counters, JSON-ready; with the sizes of the journals.
            best: the best model so far, or the file of an earlier checkpoint that holds it.
        Raises: OSError where it cannot be written; the older ones are untouched then.
        """
        if shutil.disk_usage(self.path).free < _bytes_of(model) + _bytes_of(trainer):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        for opened in list(self._journals.values()):
            opened.sync()
        checkpoint.fsync(self.path)
        parent = self.path / "checkpoints"
        final = parent / f"{step:08d}"
        temporary = parent / f".{step:08d}.{os.getpid()}.tmp"
        aside = parent / f".{step:08d}{_ASIDE}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            checkpoint.save(model, temporary / "model.safetensors")
            _write_best(best, model, temporary)
            _write_synced(
                temporary / "trainer.pt",
                lambda file: checkpoint.write_tensors(dict(trainer), file),
            )
            text = json.dumps({**state, "step": step}, indent=1, sort_keys=True)
            _write_synced(temporary / "state.json", lambda file: file.write(text.encode()))
            manifest = {
                path.name: {"bytes": path.stat().st_size, "sha256": _file_digest(path)}
                for path in sorted(temporary.iterdir())
            }
            raw = json.dumps({"files": manifest}, indent=1, sort_keys=True).encode()
            _write_synced(temporary / MANIFEST, lambda file: file.write(raw))
            checkpoint.fsync(temporary)
            if final.exists():
                shutil.rmtree(aside, ignore_errors=True)
                final.rename(aside)
            temporary.rename(final)
            checkpoint.fsync(parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if aside.exists() and not final.exists():
                aside.rename(final)
            raise
        problem = _problem_with(final)
        if problem:
            raise OSError(f"the checkpoint {final} was not written as it should be: {problem}")
        self._verified.add(final.name)
        self._drop_others(step)
        return Checkpoint(final, {**state, "step": step})

    def _drop_others(self, step: int) -> None:
        """Keep this checkpoint and the newest before it that verifies, and no other."""
        shutil.rmtree(self.path / "checkpoints" / f".{step:08d}{_ASIDE}", ignore_errors=True)
        kept = 1
        for folder in self._folders():
            number = int(folder.name)
            if number == step:
                continue
            # Of later ones the run has gone another way: they were damaged when it began.
            if number < step and kept < _KEPT and self._verifies(folder):
                kept += 1
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def _verifies(self, folder: Path) -> bool:
        """Whether a checkpoint is whole; looked at once."""
        if folder.name not in self._verified and _problem_with(folder) is None:
            self._verified.add(folder.name)
        return folder.name in self._verified

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; says which were passed over and why."""
        for folder in self._folders():
            problem = _problem_with(folder)
            if problem is None:
                self._verified.add(folder.name)
                return Checkpoint(folder, json.loads((folder / "state.json").read_bytes()))
            self.warn(f"passed over the checkpoint {folder}: {problem}")
        return None

    def _folders(self) -> list[Path]:
        """Checkpoints by their names, newest first."""
        parent = self.path / "checkpoints"
        found = (path for path in parent.iterdir() if path.name.isdigit() and path.is_dir())
        return sorted(found, key=lambda path: int(path.name), reverse=True)

    def check_space(self, needed_bytes: int) -> None:
        """Raises: NanoGPTError where the disk has too little room for the run's checkpoints."""
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise NanoGPTError(
                f"the disk of {self.path} is full: the checkpoints need about "
                f"{needed_bytes / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
            )


def json_ready(values: Any) -> Any:
    """The same values, but None for numbers that JSON has no word for, at any depth."""
    if isinstance(values, dict):
        return {name: json_ready(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [json_ready(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _bytes_of(value: Any) -> int:
    """Bytes of all tensors in it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, GPT):
        return sum(each.nbytes for each in value.parameters())
    if isinstance(value, checkpoint.Snapshot):
        return _bytes_of(value.tensors)
    if isinstance(value, Mapping):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, list | tuple) else 0


def _write_best(best: Any, model: Any, folder: Path) -> None:
    target = folder / "best.safetensors"
    if not isinstance(best, Path) and best is not model:
        checkpoint.save(best, target)
        return
    source = best if isinstance(best, Path) else folder / "model.safetensors"
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        _write_synced(target, lambda file: shutil.copyfileobj(source.open("rb"), file))


def _write_synced(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a JSON object, whatever its layout."""
    return hashlib.sha256(metadata.canonical_json(content)).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem_with(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())["files"]
        missing = _FILES - manifest.keys()
        if missing:
            return f"its manifest lacks {min(missing)}"
        for name, entry in manifest.items():
            path = folder / name
            if Path(name).name != name or (path.exists() and not path.is_file()):
                return f"its manifest names {name}, which is no file in it"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
            if _file_digest(path) != entry["sha256"]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except _DAMAGED:
        return "its manifest is damaged"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} cannot be read: {error.strerror}"
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        state = None
    return None if isinstance(state, dict) else "its state is damaged"
