"""A power cut at every moment of a run: what was not synced is lost, in every way that it can be.

A training is recorded under strace, every call that changes a file with its bytes. The recording is
then replayed up to each call on a disk that keeps what POSIX promises and no more: the bytes of a
file that were there at its last fsync, and the names in a folder that were there at the folder's.
Of everything else any part may be there: none, all, one, all but one, a random part, and of the
bytes single pages. Each such disk is written out and read as after the power cut.

Source: Pillai et al. 2014, All file systems are not created equal (OSDI), on which states to try.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from faults import kills
from faults.crash_points import attach
from faults.damage import PAGE, tiny_model
from nanogpt import checkpoint, metadata
from nanogpt.errors import NanoGPTError
from nanogpt.run_directory import RunDirectory

_TRACED = (
    "open", "openat", "creat", "close", "write", "pwrite64", "writev", "lseek", "fsync",
    "fdatasync", "truncate", "ftruncate", "rename", "renameat", "renameat2", "link", "linkat",
    "symlink", "symlinkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "sendfile",
    "copy_file_range",
)  # fmt: skip
NAMES = ("dropout", "rewards", "rounds", "explore", "calibrate")
"""Configurations of `kills` that are recorded."""
_SHORTER = ("--max-steps", "12", "--eval-interval", "3")
_ROWS_AFTER = {"rounds": -1}
"""How far the rows of metrics go past the number of a checkpoint that holds them."""
_MARKS = "marks"
"""A file outside the disk, into which the run writes what it has told its user."""


# What happens to a disk: names in folders, bytes in files. Files and folders go by numbers.


@dataclass(frozen=True)
class Names:
    """Entries of one folder change together: name to the number of what it names, or None."""

    inode: int
    changes: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Bytes:
    """Bytes are written at an offset."""

    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Size:
    """A file is cut or lengthened with zeros."""

    inode: int
    size: int


@dataclass(frozen=True)
class Sync:
    """What was done to this file or folder is durable from here on."""

    inode: int


@dataclass(frozen=True)
class Mark:
    """Something was told to the user."""

    text: str


Event = Names | Bytes | Size | Sync | Mark


@dataclass
class Disk:
    """Folders and files by their numbers; the folder 0 is the root."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    files: dict[int, bytearray] = field(default_factory=dict)

    def copy(self) -> "Disk":
        """Another one that can be changed by itself."""
        folders = {number: dict(names) for number, names in self.folders.items()}
        return Disk(folders, {number: bytearray(raw) for number, raw in self.files.items()})

    def apply(self, event: Event) -> None:
        """Do what an event does."""
        if isinstance(event, Names):
            names = self.folders[event.inode]
            for name, inode in event.changes:
                if inode is None:
                    names.pop(name, None)
                else:
                    names[name] = inode
        elif isinstance(event, Bytes):
            raw = self.files[event.inode]
            raw.extend(bytes(max(0, event.offset - len(raw))))
            raw[event.offset : event.offset + len(event.data)] = event.data
        elif isinstance(event, Size):
            raw = self.files[event.inode]
            del raw[event.size :]
            raw.extend(bytes(event.size - len(raw)))

    def write_out(self, place: Path, inode: int = 0) -> None:
        """Make the files and folders in an empty folder."""
        for name, number in self.folders[inode].items():
            if number in self.folders:
                (place / name).mkdir()
                self.write_out(place / name, number)
            else:
                (place / name).write_bytes(self.files[number])

    def signature(self, inode: int = 0) -> Any:
        """Equal for disks of equal content."""

        def of(number: int) -> Any:
            if number in self.folders:
                return self.signature(number)
            return hash(bytes(self.files[number]))

        return tuple((name, of(number)) for name, number in sorted(self.folders[inode].items()))


def read_disk(place: Path) -> Disk:
    """A disk as a folder is now, everything in it durable."""
    disk = Disk()

    def read(folder: Path, inode: int) -> None:
        for path in sorted(folder.iterdir()):
            number = len(disk.folders) + len(disk.files)
            disk.folders[inode][path.name] = number
            if path.is_dir():
                disk.folders[number] = {}
                read(path, number)
            else:
                disk.files[number] = bytearray(path.read_bytes())

    read(place, 0)
    return disk


# The recording.


@dataclass
class _Open:
    """An open file: its number, where it is read and written next, whether it only appends."""

    inode: int
    offset: int
    appends: bool


class _Recorder:
    """Turns lines of strace into events.

    Attributes:
        live: the disk as the processes see it.
        events: what has happened.
    """

    def __init__(self, root: Path, marks: Path) -> None:
        self.root, self.marks = str(root), str(marks)
        self.live, self.events = read_disk(root), list[Event]()
        self.open: dict[int, _Open | None] = {}
        self.next = len(self.live.folders) + len(self.live.files)

    def read(self, log: Path) -> None:
        begun: dict[str, str] = {}
        for line in log.read_text(encoding="ascii").splitlines():
            thread, _, call = line.partition(" ")
            call = call.strip()
            if call.endswith("<unfinished ...>"):
                begun[thread] = call.removesuffix("<unfinished ...>").rstrip()
                continue
            resumed = re.match(r"<\.\.\. \w+ resumed>(.*)", call)
            if resumed:
                call = begun.pop(thread) + resumed[1]
            found = re.fullmatch(r"(\w+)\((.*)\)\s+= (-?\d+).*", call)
            if found and int(found[3]) >= 0:
                self._call(found[1], _arguments(found[2]), int(found[3]))

    def _call(self, name: str, values: list[Any], result: int) -> None:
        if name in ("renameat", "renameat2"):
            self._call("rename", [self._at(*values[:2]), self._at(*values[2:4])], result)
        elif name in ("unlinkat", "mkdirat", "openat"):
            if name == "unlinkat" and "AT_REMOVEDIR" in str(values[2]):
                name = "rmdirat"
            self._call(name.removesuffix("at"), [self._at(*values[:2]), *values[2:]], result)
        elif name == "linkat":
            self._call("link", [self._at(*values[:2]), self._at(*values[2:4])], result)
        elif name in ("open", "close", "write", "lseek", "fsync", "truncate", "ftruncate", "rename",
                      "link", "unlink", "mkdir", "rmdir"):  # fmt: skip
            getattr(self, f"_{name}")(values, result)
        elif name == "fdatasync":
            self._fsync(values, result)
        else:
            raise AssertionError(f"{name} is not understood: extend the recorder")

    def _at(self, folder: Any, name: bytes) -> bytes:
        """The whole path of a name in an open folder."""
        if name.startswith(b"/"):
            return name
        opened = self.open.get(folder) if isinstance(folder, int) else None
        if opened is None:
            return b"/elsewhere/" + name
        return os.fsencode(self.root) + b"/" + self._path_of(opened.inode) + b"/" + name

    def _path_of(self, inode: int, at: int = 0) -> bytes:
        for name, number in self.live.folders[at].items():
            if number == inode:
                return os.fsencode(name)
            if number in self.live.folders:
                below = self._path_of(inode, number)
                if below:
                    return os.fsencode(name) + b"/" + below
        return b""

    def _place(self, path: bytes) -> tuple[int, str] | None:
        """The folder's number and the name in it; None for what is not on this disk."""
        text = os.path.normpath(os.fsdecode(path))
        if not text.startswith(self.root + "/"):
            return None
        *above, name = text[len(self.root) + 1 :].split("/")
        folder = 0
        for each in above:
            folder = self.live.folders[folder][each]
        return folder, name

    def _do(self, event: Event) -> None:
        self.events.append(event)
        self.live.apply(event)

    def _make(self, folder: int, name: str, into: dict[int, Any], empty: Any) -> int:
        number, self.next = self.next, self.next + 1
        into[number] = empty
        self._do(Names(folder, ((name, number),)))
        return number

    def _open(self, values: list[Any], result: int) -> None:
        if os.fsdecode(values[0]) == self.marks:
            self.open[result] = _Open(-1, 0, True)
            return
        self.open[result] = None
        place = self._place(values[0])
        flags = str(values[1])
        if os.path.normpath(os.fsdecode(values[0])) == self.root:
            self.open[result] = _Open(0, 0, False)
        if place is None:
            return
        inode = self.live.folders[place[0]].get(place[1])
        if inode is None:
            if "O_CREAT" not in flags:
                return
            inode = self._make(*place, self.live.files, bytearray())
        elif "O_TRUNC" in flags and self.live.files[inode]:
            self._do(Size(inode, 0))
        self.open[result] = _Open(inode, 0, "O_APPEND" in flags)

    def _close(self, values: list[Any], result: int) -> None:
        self.open.pop(values[0], None)

    def _write(self, values: list[Any], result: int) -> None:
        opened = self.open.get(values[0])
        if opened is None:
            return
        if opened.inode < 0:
            self.events.append(Mark(values[1].decode()))
            return
        if opened.appends:
            opened.offset = len(self.live.files[opened.inode])
        self._do(Bytes(opened.inode, opened.offset, values[1][:result]))
        opened.offset += result

    def _lseek(self, values: list[Any], result: int) -> None:
        opened = self.open.get(values[0])
        if opened is not None:
            opened.offset = result

    def _fsync(self, values: list[Any], result: int) -> None:
        opened = self.open.get(values[0])
        if opened is not None:
            self.events.append(Sync(opened.inode))

    def _truncate(self, values: list[Any], result: int) -> None:
        place = self._place(values[0])
        if place is not None:
            self._do(Size(self.live.folders[place[0]][place[1]], values[1]))

    def _ftruncate(self, values: list[Any], result: int) -> None:
        opened = self.open.get(values[0])
        if opened is not None:
            self._do(Size(opened.inode, values[1]))

    def _rename(self, values: list[Any], result: int) -> None:
        source, target = self._place(values[0]), self._place(values[1])
        if source is None and target is None:
            return
        assert source is not None
        assert target is not None
        assert source[0] == target[0], "a rename across folders"
        inode = self.live.folders[source[0]][source[1]]
        self._do(Names(source[0], ((source[1], None), (target[1], inode))))

    def _link(self, values: list[Any], result: int) -> None:
        source, target = self._place(values[0]), self._place(values[1])
        if source is not None and target is not None:
            inode = self.live.folders[source[0]][source[1]]
            self._do(Names(target[0], ((target[1], inode),)))

    def _unlink(self, values: list[Any], result: int) -> None:
        place = self._place(values[0])
        if place is not None:
            self._do(Names(place[0], ((place[1], None),)))

    _rmdir = _unlink

    def _mkdir(self, values: list[Any], result: int) -> None:
        place = self._place(values[0])
        if place is not None:
            self._make(*place, self.live.folders, {})


def _arguments(text: str) -> list[Any]:
    """Arguments of a call as strace -xx writes them: bytes, numbers, and words for the rest."""
    values: list[Any] = []
    for part in re.findall(r'"(?:\\x[0-9a-f]{2})*"|[^,\s][^,]*', text):
        if part.startswith('"'):
            values.append(bytes.fromhex(part[1:-1].replace("\\x", "")))
        else:
            values.append(int(part) if re.fullmatch(r"-?\d+", part) else part)
    return values


@dataclass
class Recording:
    """A run on a disk.

    Attributes:
        before, after: the disk; `after` has everything that was ever made.
        events: what the run did.
        outcome: what the run has left at its end.
        config: the bytes of its config.yaml.
        data: the folder of its inputs.
        name: of the configuration.
    """

    before: Disk
    after: Disk
    events: list[Event]
    outcome: dict[str, Any]
    config: bytes
    data: Path
    name: str


def _command(name: str, data: Path, place: Path) -> list[str]:
    return [*kills._command(name, data, place), *_SHORTER * (name in kills.TRAINED)]


def record(folder: Path, name: str, prepare: Callable[[], None] = lambda: None) -> Recording:
    """Run a command once under strace, in a folder where an older model file stands.

    Args:
        folder: empty.
        name: of the configuration.
        prepare: is called in the process that trains.
    """
    kills.make_data(folder)
    place, marks, log = folder / "disk", folder / _MARKS, folder / "calls.txt"
    place.mkdir()
    marks.touch()
    checkpoint.save(tiny_model(5), place / "model.safetensors")
    before, recorder = read_disk(place), _Recorder(place, marks)
    hold, release = os.pipe()

    def begin() -> None:
        os.close(release)
        prepare()
        _mark_what_is_told(marks)
        os.read(hold, 1)

    child = kills._start(_command(name, folder, place), folder / "log.txt", begin)
    os.close(hold)
    trace = f"trace={','.join(_TRACED)}"
    tracer = attach(child, "-xx", "-s", "100000000", "-e", trace, "-o", str(log))
    os.write(release, b".")
    os.close(release)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.communicate()
    assert status == 0, (folder / "log.txt").read_text()
    recorder.read(log)
    events = [*recorder.events, Mark("finished")]
    happened = read_disk(place).signature()
    assert recorder.live.signature() == happened, "the recording is not what happened"
    config = place / "run" / "config.yaml"
    raw = config.read_bytes() if config.exists() else b""
    return Recording(before, recorder.live, events, kills._outcome(place), raw, folder, name)


def _mark_what_is_told(marks: Path) -> None:
    """Have every save of the run write down, once it is done, its step and its digest."""
    real: Any = RunDirectory.save

    def save(self: RunDirectory, step: int, model: Any, *rest: Any) -> Any:
        saved = real(self, step, model, *rest)
        if self.path.name == "run":
            with marks.open("w") as file:
                file.write(f"saved {step} {metadata.tensor_digest(model.tensors)}")
        return saved

    RunDirectory.save = save  # type: ignore[method-assign]


# The power cuts.


def disks_after_a_cut(
    recording: Recording, rng: np.random.Generator, every: int, random_parts: int
) -> Iterator[tuple[Disk, dict[int, str], bool, str]]:
    """Disks as a power cut may leave them.

    Args:
        every: a power cut after each so many events.
        random_parts: for each power cut so many random parts of what is pending, and as many of
            the single changes that are kept, or lost.
    Yields: the disk, what checkpoints had been told by then, whether the run was finished, and
        words for a report.
    """
    durable = recording.before.copy()
    # What is made later is there from the beginning, empty, without a name that leads to it.
    for folder in recording.after.folders:
        durable.folders.setdefault(folder, {})
    for file in recording.after.files:
        durable.files.setdefault(file, bytearray())
    pending: list[Event] = []
    told: dict[int, str] = {}
    finished = False
    for number, event in enumerate(recording.events, 1):
        if isinstance(event, Mark):
            finished = event.text == "finished"
            if not finished:
                _, step, digest = event.text.split()
                told[int(step)] = digest
        elif isinstance(event, Sync):
            for each in pending:
                if each.inode == event.inode:  # type: ignore[union-attr]
                    durable.apply(each)
            pending = [each for each in pending if each.inode != event.inode]  # type: ignore[union-attr]
        else:
            pending.append(event)
        if number % every and not isinstance(event, Mark):
            continue
        for kept, how in _parts(pending, rng, random_parts):
            disk = durable.copy()
            for each in kept:
                disk.apply(each)
            yield disk, dict(told), finished, f"event {number}, {how}"


def _parts(
    pending: list[Event], rng: np.random.Generator, random_parts: int
) -> Iterator[tuple[list[Event], str]]:
    """Which of the pending changes may be there."""
    yield [], "nothing that was not synced"
    if not pending:
        return
    yield pending, "everything"
    if len(pending) > 1:
        for at in rng.permutation(len(pending))[:random_parts].tolist():
            yield [pending[at]], f"only change {at} of {len(pending)}"
            yield [*pending[:at], *pending[at + 1 :]], f"all but change {at} of {len(pending)}"
    for _ in range(random_parts):
        kept = [each for each in pending if rng.random() < 0.5]
        yield kept, f"{len(kept)} of {len(pending)} changes"
        pages = [page for each in pending for page in _pages(each, rng)]
        yield pages, "single pages"


def _pages(event: Event, rng: np.random.Generator) -> Iterator[Event]:
    """A part of what was written, by pages; the length may be there without the bytes."""
    if not isinstance(event, Bytes):
        yield event
        return
    end = event.offset + len(event.data)
    if rng.random() < 0.5:
        yield Bytes(event.inode, end - 1, b"\0")
    for first in range(event.offset - event.offset % PAGE, end, PAGE):
        if rng.random() < 0.5:
            start, stop = max(first, event.offset), min(first + PAGE, end)
            data = event.data[start - event.offset : stop - event.offset]
            yield Bytes(event.inode, start, data)


@dataclass
class Report:
    """Counts, and everything that must not be.

    Attributes:
        cuts: power cuts.
        disks: different disks that they left.
        with_checkpoint: those on which a checkpoint was found.
        resumed: those on which the run went on to its end.
    """

    cuts: int = 0
    disks: int = 0
    resumed: int = 0
    with_checkpoint: int = 0
    failures: list[str] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "power cuts": self.cuts, "different disks": self.disks, "with a checkpoint":
            self.with_checkpoint, "gone on": self.resumed, "failures": len(self.failures),
        }  # fmt: skip


def run(
    name: str,
    *,
    seed: int = 0,
    recordings: int = 1,
    every: int = 1,
    random_parts: int = 4,
    resume_every: int = 1,
    prepare: Callable[[], None] = lambda: None,
) -> Report:
    """Record, cut the power after every event, read every disk, and have runs go on.

    Args:
        name: of the configuration.
        every: a power cut after each so many events only.
        random_parts: see `disks_after_a_cut`.
        resume_every: of one disk in so many the run goes on to its end, which must be the same.
        prepare: is called in the process that is recorded, to make it worse.
    """
    report, rng = Report(), np.random.default_rng(seed)
    for _ in range(recordings):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place).resolve()
            recording = record(folder, name, prepare)
            seen = set()
            cuts = disks_after_a_cut(recording, rng, every, random_parts)
            for disk, told, finished, what in cuts:
                report.cuts += 1
                signature = disk.signature(), tuple(told), finished
                if signature in seen:
                    continue
                seen.add(signature)
                report.disks += 1
                shutil.rmtree(folder / "disk")
                (folder / "disk").mkdir()
                disk.write_out(folder / "disk")
                _judge(report, recording, folder / "disk", told, finished, what)
                if finished and (folder / "disk" / "run").exists():
                    _change_the_output(report, recording, folder / "disk", what)
                if report.disks % resume_every == 0:
                    _resume(report, recording, folder / "disk", disk, what)
    return report


def _judge(
    report: Report, recording: Recording, place: Path, told: dict[int, str], finished: bool,
    what: str,
) -> None:  # fmt: skip
    """Whether what was told is there after a power cut, and nothing half."""
    try:
        model = place / "model.safetensors"
        raw = model.read_bytes() if model.exists() else b""
        output = recording.outcome["model"]
        if raw != output and (finished or raw != bytes(_old_output(recording))):
            report.failures.append(f"{what}: the model file is neither the old nor the new one")
        step = _newest_step(report, recording, place, told, what)
        if step < max(told, default=0):
            report.failures.append(f"{what}: step {max(told)} was saved and is lost")
        report.with_checkpoint += step > 0
    except Exception as error:
        report.failures.append(f"{what}: {type(error).__name__}: {error}")


def _old_output(recording: Recording) -> bytes:
    return bytes(recording.before.files[recording.before.folders[0]["model.safetensors"]])


def _newest_step(
    report: Report, recording: Recording, place: Path, told: dict[int, str], what: str
) -> int:
    """The step of the newest checkpoint, which is read and compared; 0 without one."""
    if not (place / "run").exists():
        return 0
    with RunDirectory(place / "run", warn=lambda sentence: None) as directory:
        try:
            identity = directory.read_identity()
        except NanoGPTError as error:
            report.failures.append(f"{what}: {error}")
            return 0
        config = place / "run" / "config.yaml"
        if identity is not None and config.read_bytes() != recording.config:
            report.failures.append(f"{what}: config.yaml is not what was written")
        newest = directory.newest()
        if newest is None:
            return 0
        step = int(newest.state["step"])
        if identity is None:
            report.failures.append(f"{what}: a checkpoint without run.json")
        newest.load_trainer()
        digest = metadata.tensor_digest(checkpoint.snapshot(newest.load_model()).tensors)
        newest.load_model("best")
        if digest != told.get(step, digest):
            report.failures.append(f"{what}: step {step} is not what was saved")
        directory.cut_journals(newest.state["journals"])
        for name in ("metrics.jsonl", "samples.jsonl"):
            last = step + _ROWS_AFTER.get(recording.name, 0)
            expected = [row["step"] for row in recording.outcome[name] if row["step"] <= last]
            found = [json.loads(line)["step"] for line in _lines(place / "run" / name)]
            if found != expected:
                report.failures.append(f"{what}: {name} has the steps {found}")
    return step


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def _resume(report: Report, recording: Recording, place: Path, disk: Disk, what: str) -> None:
    """The same command after the power cut ends as the uninterrupted run."""
    shutil.rmtree(place)
    place.mkdir()
    disk.write_out(place)
    log = recording.data / "resumed.txt"
    log.unlink(missing_ok=True)
    code = kills._run(_command(recording.name, recording.data, place), log)
    report.resumed += 1
    if code:
        report.failures.append(f"{what}: going on ended with {code}: {kills._last_line(log)}")
        return
    for part, expected in recording.outcome.items():
        if kills._outcome_or_none(place, part) != expected:
            report.failures.append(f"{what}: another {part} after going on")
    if (place / "run").exists():
        _change_the_output(report, recording, place, what)


def _change_the_output(report: Report, recording: Recording, place: Path, what: str) -> None:
    """What a user makes of the model file stays when the finished command is given again."""
    model = place / "model.safetensors"
    checkpoint.save(tiny_model(6), model)
    changed = model.read_bytes()
    code = kills._run(_command(recording.name, recording.data, place), recording.data / "log.txt")
    if code or model.read_bytes() != changed:
        report.failures.append(f"{what}: the user's file was replaced by the finished run ({code})")
