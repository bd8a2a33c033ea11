"""A reader fed with mutants, in a process of its own so that nothing it does is the end.

A reader returns, or refuses with an error of the package in one printable line. Everything else is
a finding: another exception, the end of the process, more than `SLOW_SECONDS`, more than
`LARGE_BYTES` of memory.
"""

import dataclasses
import hashlib
import mmap
import multiprocessing
import random
import resource
import signal
import struct
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import torch

from nanogpt.errors import InputError, UsageError

from . import mutation

SLOW_SECONDS = 5.0
LARGE_BYTES = 2**28
STUCK_SECONDS = 30.0
_MOST_FINDINGS = 20
_HEAD = struct.Struct("<QQ")
ACCEPTED, REFUSED = "accepted", "refused"


@dataclasses.dataclass(frozen=True)
class Reader:
    """Something that reads files of others.

    Attributes:
        suffix: of the file's name.
        read: takes the path of a file.
        seeds: good inputs, and a few that are not.
        pieces: what the format is made of.
        mend: makes check sums and lengths right again; half of the mutants are mended.
    """

    name: str
    suffix: str
    read: Callable[[Path], object]
    seeds: Sequence[bytes]
    pieces: Sequence[bytes] = ()
    mend: Callable[[bytes], bytes] | None = None


@dataclasses.dataclass
class Report:
    """What came of it.

    Attributes:
        findings: (sentence, input), of each kind the first.
    """

    name: str
    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    findings: list[tuple[str, bytes]] = dataclasses.field(default_factory=list)


class _Slow(BaseException):
    """No `except Exception` keeps it."""


def judge(reader: Reader, raw: bytes, path: Path) -> str:
    """ACCEPTED, REFUSED, or a sentence on what must not be."""
    path.write_bytes(raw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, SLOW_SECONDS)
    try:
        reader.read(path)
        outcome = ACCEPTED
    except (InputError, UsageError) as error:
        # A half of a surrogate pair in the message could not even be printed.
        good = str(error).isprintable() and str(error)
        outcome = REFUSED if good else f"a refusal is not one printable line: {str(error)!r:.300}"
    except _Slow:
        outcome = f"it takes more than {SLOW_SECONDS:g} s"
    except BaseException as error:  # a panic of compiled code is no Exception
        outcome = f"{type(error).__name__} {_where(error)}: {error!s:.200}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return f"it takes {grown / 1e6:.0f} MB of memory" if grown > LARGE_BYTES else outcome


def _where(error: BaseException) -> str:
    """The innermost line of the package that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "nanogpt" in Path(frame.filename).parts]
    frame = (ours or frames)[-1]
    return f"at {Path(frame.filename).name}:{frame.lineno}"


def _kind(sentence: str) -> str:
    """What two findings share that are one mistake."""
    return sentence.split(": ")[0]


def _worker(
    reader: Reader, seed: int, runs: int, seconds: float, shared: mmap.mmap, pipe: Connection
) -> None:
    def slow(number: int, frame: FrameType | None) -> None:
        raise _Slow

    signal.signal(signal.SIGALRM, slow)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    tried = accepted = 0
    kinds: set[str] = set()
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
        path = Path(folder) / f"f{reader.suffix}"
        while tried < runs and time.monotonic() < end and len(kinds) < _MOST_FINDINGS:
            if tried < len(reader.seeds):
                raw = reader.seeds[tried]
            else:
                raw = mutation.mutated(rng, reader.seeds, reader.pieces)
                if reader.mend and rng.random() < 0.5:
                    raw = reader.mend(raw)
            tried += 1
            shared[: _HEAD.size + len(raw)] = _HEAD.pack(tried, len(raw)) + raw
            outcome = judge(reader, raw, path)
            accepted += outcome == ACCEPTED
            if outcome not in (ACCEPTED, REFUSED) and _kind(outcome) not in kinds:
                kinds.add(_kind(outcome))
                pipe.send((outcome, raw))
    pipe.send((tried, accepted))
    pipe.close()


def _memory_folder() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def run(reader: Reader, *, seed: int, runs: int = 2**62, seconds: float = 1e9) -> Report:
    """Feed the reader until one of the limits is reached."""
    report = Report(reader.name)
    context = multiprocessing.get_context("fork")
    started = time.monotonic()
    while report.inputs < runs and len(report.findings) < _MOST_FINDINGS:
        left = seconds - (time.monotonic() - started)
        if left <= 0:
            break
        shared = mmap.mmap(-1, _HEAD.size + mutation.LARGEST_BYTES)
        pipe, theirs = context.Pipe()
        worker = context.Process(
            target=_worker,
            args=(reader, seed + report.inputs, runs - report.inputs, left, shared, theirs),
        )
        worker.start()
        theirs.close()
        if _follow(worker, pipe, shared, report):
            break
    report.seconds = time.monotonic() - started
    return report


def _follow(worker: object, pipe: Connection, shared: mmap.mmap, report: Report) -> bool:
    """Take in what a worker finds; whether it came to its own end."""
    assert isinstance(worker, multiprocessing.process.BaseProcess)
    seen, moved = 0, time.monotonic()
    while True:
        number, size = _HEAD.unpack(shared[: _HEAD.size])
        if number != seen:
            seen, moved = number, time.monotonic()
        try:
            if pipe.poll(0.2):
                first, second = pipe.recv()
                if isinstance(first, int):
                    worker.join()
                    report.inputs += first
                    report.accepted += second
                    return True
                _add(report, first, second)
                continue
        except (EOFError, ConnectionResetError):
            worker.join()
            what = f"the process ended with {worker.exitcode}"
        else:
            if time.monotonic() - moved < STUCK_SECONDS:
                continue
            worker.kill()
            worker.join()
            what = f"it takes more than {STUCK_SECONDS:g} s and cannot be interrupted"
        number, size = _HEAD.unpack(shared[: _HEAD.size])
        report.inputs += max(number, 1)
        _add(report, what, shared[_HEAD.size : _HEAD.size + size])
        return False


def _add(report: Report, sentence: str, raw: bytes) -> None:
    if _kind(sentence) not in {_kind(known) for known, _ in report.findings}:
        report.findings.append((sentence, raw))


def with_input(reader: Reader, raw: bytes) -> Reader:
    """The reader with this input in place of its seeds."""
    return dataclasses.replace(reader, seeds=[raw])


def file_name(name: str, raw: bytes) -> str:
    """What an input is called that a reader fails on."""
    return f"{name.replace(' ', '-')}-{hashlib.sha256(raw).hexdigest()[:12]}"
