"""Run directories: everything a run needs to go on, and everything it has to show.

    config.yaml            the flags, ready for --config
    run.json               what the run is (flags, text by its hash), what was picked, versions
    metrics.jsonl          one JSON object a line, see interface
    samples.jsonl events.jsonl
    checkpoints/00000500/  model.safetensors best.safetensors trainer.pt state.json manifest.json
    report.html  report.json  findings.json  tensorboard/  lock

A checkpoint is a folder that appears whole: written beside its place, every file fsynced, the
manifest with sizes and SHA-256 last, then renamed. The newest that verifies counts.
"""

import contextlib
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

from nanogpt import checkpoint
from nanogpt.errors import InputError, NanoGPTError, UsageError
from nanogpt.model import GPT

MANIFEST = "manifest.json"
_FILES = ("model.safetensors", "best.safetensors", "trainer.pt", "state.json")
_KEPT = 2
_PAGES = ("report.html", "report.json", "findings.json")
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
        return torch.load(self.folder / "trainer.pt", map_location="cpu", weights_only=True)


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
        self._journals: dict[str, IO[bytes]] = {}

    def __enter__(self) -> "RunDirectory":
        self._refuse_foreign()
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("w")
        except OSError as error:
            raise UsageError(f"--run-dir {self.path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(f"another process is training in {self.path}") from None
        self._sweep()
        return self

    def _sweep(self) -> None:
        """Remove what a process that was killed has begun to write."""
        for folder in (self.path, self.path / "checkpoints"):
            for left in folder.glob(".*.tmp"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        for file in self._journals.values():
            file.close()
        self._journals.clear()
        if self._lock is not None:
            self._lock.close()

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
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or not isinstance(content.get("identity"), dict):
            raise InputError(f"{path} is damaged: train with another --run-dir or --resume never")
        return content

    def begin(self, content: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
        """Start a new run here: nothing of an earlier one stays."""
        import yaml

        for folder in ("checkpoints", "tensorboard"):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        (self.path / "checkpoints").mkdir()
        for name in (*_JOURNALS, *_PAGES):
            (self.path / name).unlink(missing_ok=True)
        self.write("config.yaml", yaml.safe_dump(dict(flags), sort_keys=False))
        self.write("run.json", json.dumps(content, indent=1, sort_keys=True))

    def write(self, name: str, text: str) -> None:
        """Replace a file of the run, whole or not at all."""
        checkpoint.write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def write_report(self, html: str) -> Path:
        """Replace report.html."""
        self.write("report.html", html)
        return self.path / "report.html"

    # Journals: files of one JSON object a line, cut back to the checkpoint on resume.

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to a journal."""
        file = self._journals.get(name)
        if file is None:
            file = self._journals[name] = (self.path / name).open("ab")
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.flush()

    def journal(self, name: str) -> list[dict[str, Any]]:
        """All records of a journal; a line cut short by a crash is left out."""
        path = self.path / name
        if not path.exists():
            return []
        records = []
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                records.append(json.loads(line))
        return records

    def journal_sizes(self) -> dict[str, int]:
        """Bytes of every journal, durable on disk; they go into the checkpoint."""
        for file in self._journals.values():
            os.fsync(file.fileno())
        paths = {name: self.path / name for name in _JOURNALS}
        return {name: p.stat().st_size if p.exists() else 0 for name, p in paths.items()}

    def cut_journals(self, sizes: Mapping[str, int]) -> None:
        """Forget what was written after a checkpoint, so that no line is repeated."""
        for name in _JOURNALS:
            path = self.path / name
            if path.exists():
                os.truncate(path, min(sizes.get(name, 0), path.stat().st_size))

    # Checkpoints.

    def save(
        self,
        step: int,
        model: GPT,
        trainer: Mapping[str, Any],
        state: Mapping[str, Any],
        best: GPT | Path,
    ) -> Checkpoint:
        """Write a checkpoint, read it back, and only then drop older ones.

        Args:
            best: the best model so far, or the file of an earlier checkpoint that holds it.
        Raises: OSError where it cannot be written; the older ones are untouched then.
        """
        parent = self.path / "checkpoints"
        final = parent / f"{step:08d}"
        temporary = parent / f".{step:08d}.{os.getpid()}.tmp"
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
                shutil.rmtree(final)
            temporary.rename(final)
            checkpoint.fsync(parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        problem = _problem_with(final)
        if problem:
            raise OSError(f"the checkpoint {final} was not written as it should be: {problem}")
        for old in self._folders()[_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return Checkpoint(final, {**state, "step": step})

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; says which were passed over and why."""
        for folder in self._folders():
            problem = _problem_with(folder)
            if problem is None:
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                return Checkpoint(folder, state)
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


def _write_best(best: GPT | Path, model: GPT, folder: Path) -> None:
    target = folder / "best.safetensors"
    if isinstance(best, GPT) and best is not model:
        checkpoint.save(best, target)
        return
    source = folder / "model.safetensors" if isinstance(best, GPT) else best
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        _write_synced(target, lambda file: shutil.copyfileobj(source.open("rb"), file))


def _write_synced(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem_with(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())["files"]
        lacking = next((name for name in _FILES if name not in manifest), None)
        if lacking is not None:
            return f"its manifest does not name {lacking}"
        for name, entry in manifest.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
            if _file_digest(path) != entry["sha256"]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "its manifest is damaged"
    return None
