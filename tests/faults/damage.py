"""Damaged files: every one is refused in a sentence, or it is provably the file that it was.

A file is changed in one of the ways of `WAYS`, read by every reader that takes it, and what was
read is compared bit by bit with what the whole file holds. The readers run in a process of their
own, so that a crash is counted and not the end.
"""

import dataclasses
import multiprocessing
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt import checkpoint, data, native
from nanogpt.errors import NanoGPTError
from nanogpt.export.command import export_model
from nanogpt.model import GPT
from nanogpt.reward_model import RewardModel, fit_reward_model
from nanogpt.run_directory import RunDirectory
from nanogpt.tokenizer import CharTokenizer, RecordTokenizer

PAGE = 4096
REFUSED, UNHARMED, WRONG, RAISED, CRASHED = "refused", "unharmed", "wrong", "raised", "crashed"


# The ways in which files are damaged: bytes and a generator to other bytes.


def flip_bit(raw: bytearray, rng: np.random.Generator) -> None:
    """One bit is another."""
    raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))


def flip_bytes(raw: bytearray, rng: np.random.Generator) -> None:
    """Two to twenty bytes are others."""
    for at in rng.integers(len(raw), size=int(rng.integers(2, 21))).tolist():
        raw[at] ^= int(rng.integers(1, 256))


def truncate(raw: bytearray, rng: np.random.Generator) -> None:
    """The end is missing."""
    del raw[int(rng.integers(len(raw))) :]


def lengthen(raw: bytearray, rng: np.random.Generator) -> None:
    """Bytes follow that are not the file's."""
    raw += rng.bytes(int(rng.integers(1, 200)))


def zero_page(raw: bytearray, rng: np.random.Generator) -> None:
    """A page was never written."""
    first = int(rng.integers(-(-len(raw) // PAGE))) * PAGE
    raw[first : first + PAGE] = bytes(len(raw[first : first + PAGE]))


def zero_tail(raw: bytearray, rng: np.random.Generator) -> None:
    """The length was set, the last pages were never written."""
    first = int(rng.integers(len(raw)))
    raw[first:] = bytes(len(raw) - first)


def swap_blocks(raw: bytearray, rng: np.random.Generator) -> None:
    """Two parts have changed places."""
    size = int(rng.integers(1, max(2, len(raw) // 3)))
    a, b = (int(each) for each in sorted(rng.integers(0, len(raw) - size + 1, size=2)))
    b = max(b, min(a + size, len(raw) - size))
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]


def repeat_block(raw: bytearray, rng: np.random.Generator) -> None:
    """A part stands there twice."""
    size = int(rng.integers(1, max(2, len(raw) // 3)))
    at = int(rng.integers(0, len(raw) - size + 1))
    raw[at:at] = raw[at : at + size]


def drop_block(raw: bytearray, rng: np.random.Generator) -> None:
    """A part in the middle is missing."""
    size = int(rng.integers(1, max(2, len(raw) // 3)))
    at = int(rng.integers(0, len(raw) - size + 1))
    del raw[at : at + size]


def change_digit(raw: bytearray, rng: np.random.Generator) -> None:
    """A decimal digit of what is written as text is another: sizes, offsets, settings."""
    digits = np.flatnonzero((np.frombuffer(raw, np.uint8) - 48) < 10)
    if len(digits):
        at = int(rng.choice(digits))
        raw[at] = 48 + (raw[at] - 48 + int(rng.integers(1, 10))) % 10


WAYS: dict[str, Callable[[bytearray, np.random.Generator], None]] = {
    way.__name__: way
    for way in (
        flip_bit, flip_bytes, truncate, lengthen, zero_page, zero_tail, swap_blocks, repeat_block,
        drop_block, change_digit,
    )
}  # fmt: skip


# The files, and what is read from them.


def tiny_model(seed: int = 0, *, records: bool = False) -> GPT:
    """A model of a few thousand weights with a tokenizer."""
    torch.manual_seed(seed)
    tokenizer = CharTokenizer("".join(sorted(set("the quick brown fox, jumps!"))))
    made: Any = tokenizer
    if records:
        fields = [("city", ["Rome", "Oslo"]), ("size", ["0…1", "1…2"])]
        made = RecordTokenizer(fields, None, {"fields": []})
    model = GPT(
        vocab_size=made.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16, bias=True
    )
    model.tokenizer = made
    return model.eval()


def _content_of_model(model: GPT, tokenizer: Any) -> tuple[Any, ...]:
    state = model.state_dict()
    parts = [(name, tensor.shape, tensor.numpy().tobytes()) for name, tensor in state.items()]
    told = None if tokenizer is None else repr(tokenizer.to_dict())
    temperature = getattr(model, "calibration_temperature", None)
    return dataclasses.astuple(model.config), told, temperature, tuple(parts)


def _read_model(path: Path) -> tuple[Any, ...]:
    return _content_of_model(*checkpoint.load(path))


def _read_export(path: Path) -> tuple[Any, ...]:
    """What the native engine makes of an export: settings, and logits of every position."""
    engine = native.open_file(path, threads=1)
    told = repr(engine.config), engine.quantization, engine.calibration_temperature
    logits = np.asarray(engine.logits(np.arange(12) % 20))
    return *told, engine.tokenizer_json, logits.tobytes()


def _read_run(path: Path) -> tuple[Any, ...]:
    """The newest checkpoint of a run that verifies: never a damaged one."""
    with RunDirectory(path, warn=lambda sentence: None) as folder:
        newest = folder.newest()
        if newest is None:
            raise NanoGPTError("no checkpoint verifies")
        content = _content_of_model(*checkpoint.load(newest.folder / "model.safetensors"))
        optimizer = repr(newest.load_trainer())
        return newest.state["step"], repr(newest.state), optimizer, content


def _read_identity(path: Path) -> tuple[Any, ...]:
    """What a run is, by which it goes on."""
    with RunDirectory(path, warn=lambda sentence: None) as folder:
        return (folder.read_identity(),)


def _read_corpus(kind: str, text: Path) -> Callable[[Path], Any]:
    """A text by way of a cache that may be damaged; whatever is, is made again."""

    def read(cache: Path) -> tuple[Any, ...]:
        corpus = data.prepare((str(text),), tokenizer_kind=kind, vocab_size=300, cache_dir=cache)
        return repr(corpus.tokenizer.to_dict()), corpus.tokens.tobytes()

    return read


def _read_reward_model(path: Path) -> tuple[Any, ...]:
    """A reward model's head and settings."""
    read = RewardModel.load(path, tiny_model())
    state = read.head.state_dict().items()
    plain = [read.low, read.high, read.two_valued, read.mean, read.deviation, repr(read.quality)]
    return *plain, *((name, tensor.numpy().tobytes()) for name, tensor in state)


@dataclasses.dataclass(frozen=True)
class Target:
    """A file, or a file of a folder, that is damaged, and how it is read.

    Attributes:
        source: the whole file or folder.
        inside: where the source is a folder, the file of it that is damaged.
        read: makes comparable content of a path; raises NanoGPTError where it refuses.
        accepted: what may come of it beside a refusal.
    """

    name: str
    source: Path
    read: Callable[[Path], Any]
    inside: str | None = None
    accepted: tuple[Any, ...] = ()


def make_targets(folder: Path) -> list[Target]:
    """One of every kind of file that is read again."""
    model = tiny_model()
    targets = []
    for name, each in (("model", model), ("records", tiny_model(records=True))):
        for suffix in (".pth", ".safetensors"):
            path = folder / f"{name}{suffix}"
            checkpoint.save(each, path)
            targets.append(Target(path.name, path, _read_model))
            if suffix == ".safetensors" and name == "model" and native.available():
                targets.append(Target(f"{path.name}, engine", path, _read_export))
    if native.available():
        for quantize in ("none", "int8"):
            path = folder / f"{quantize}.pt"
            export_model(model, path, quantize=quantize, verify=False)
            targets.append(Target(f"export {quantize}, engine", path, _read_export))
    run = folder / "run"
    with RunDirectory(run, warn=print) as directory:
        directory.begin({"identity": {}}, {})
        for step in (1, 2):
            trainer = {"optimizer": {"step": step, "m": torch.full((8,), float(step))}}
            directory.save(step, tiny_model(step), trainer, {"tokens": step}, tiny_model(9))
    older = folder / "run-older"
    shutil.copytree(run, older)
    shutil.rmtree(older / "checkpoints" / "00000002")
    expected = _read_run(older)
    for file in sorted((run / "checkpoints" / "00000002").iterdir()):
        inside = str(file.relative_to(run))
        targets.append(Target(f"run/{file.name}", run, _read_run, inside, (expected,)))
    targets.append(Target("run.json", run, _read_identity, "run.json"))
    return targets + _caches(folder) + [_reward_model(folder, model)]


def _caches(folder: Path) -> list[Target]:
    """Files of the token cache."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    targets = []
    for kind, endings in (("char", (".tokens", ".json")), ("bpe", (".bpe.json",))):
        cache = folder / f"cache-{kind}"
        read = _read_corpus(kind, text)
        read(cache)
        for ending in endings:
            (file,) = (p for p in cache.iterdir() if "".join(p.suffixes) == ending)
            targets.append(Target(f"cache/{kind}{ending}", cache, read, file.name))
    return targets


def _reward_model(folder: Path, model: GPT) -> Target:
    words = ["the", "quick", "brown", "fox", "jumps"]
    texts = [(f"{a} {b}", float(a < b)) for a in words for b in words]
    path = folder / "reward.safetensors"
    fit_reward_model(model, texts, epochs=1).save(path)
    return Target("reward model", path, _read_reward_model)


def damaged(target: Target, way: str, seed: tuple[int, ...], place: Path) -> Path:
    """A damaged copy of the target in `place`; the path that is to be read."""
    rng = np.random.default_rng(seed)
    path = place / target.source.name
    if target.inside is None:
        raw = bytearray(target.source.read_bytes())
        WAYS[way](raw, rng)
        path.write_bytes(raw)
        return path
    if not path.exists():
        shutil.copytree(target.source, path, copy_function=os.link)
    raw = bytearray((target.source / target.inside).read_bytes())
    WAYS[way](raw, rng)
    # The copy is linked to the source: its place is taken, not its content changed.
    fresh = place / "fresh"
    fresh.write_bytes(raw)
    os.replace(fresh, path / target.inside)
    return path


def restore(target: Target, place: Path) -> None:
    """The copy as it was, for the next damage."""
    if target.inside is not None:
        path = place / target.source.name / target.inside
        path.unlink(missing_ok=True)
        os.link(target.source / target.inside, path)


def judge(target: Target, path: Path, whole: Any) -> tuple[str, str]:
    """What came of reading a damaged file: one of the outcomes, and a word on it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = target.read(path)
    except NanoGPTError:
        return REFUSED, ""
    except Exception as error:
        return RAISED, f"{type(error).__name__}: {error}"
    if found == whole or found in target.accepted:
        return UNHARMED, ""
    return WRONG, "read as something else"


def _worker(pipe: Connection, targets: list[Target], seed: int, place: Path) -> None:
    """Damage files by the numbers that come through the pipe; answer with outcomes."""
    torch.set_num_threads(1)
    whole = {target.name: target.read(target.source) for target in targets}
    ways = list(WAYS)
    while (number := pipe.recv()) is not None:
        target = targets[number % len(targets)]
        way = ways[(number // len(targets)) % len(ways)]
        path = damaged(target, way, (seed, number), place)
        outcome, word = judge(target, path, whole[target.name])
        restore(target, place)
        pipe.send((target.name, way, outcome, word))
    pipe.close()


@dataclasses.dataclass
class Report:
    """Counts of outcomes by target, and everything that must not be.

    Attributes:
        counts: (target, outcome) to how often.
        failures: sentences with the number that makes each again.
    """

    counts: Counter[tuple[str, str]]
    failures: list[str]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def as_rows(self) -> list[Mapping[str, Any]]:
        """JSON-ready: for each target the counts of its outcomes."""
        names = sorted({name for name, _ in self.counts})
        kinds = (REFUSED, UNHARMED, WRONG, RAISED, CRASHED)
        return [{"file": n, **{kind: self.counts[n, kind] for kind in kinds}} for n in names]


def run(
    total: int,
    *,
    seed: int = 0,
    first: int = 0,
    extra: Callable[[Path], list[Target]] | None = None,
) -> Report:
    """Damage `total` files one after the other and count what comes of it.

    Args:
        extra: makes further targets in a folder.
    """
    report = Report(Counter(), [])
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Path(folder)) + (extra(Path(folder)) if extra else [])
        place = Path(folder) / "damaged"
        place.mkdir()
        number, worker, pipe = first, None, None
        while number < first + total:
            if worker is None:
                pipe, theirs = context.Pipe()
                worker = context.Process(target=_worker, args=(theirs, targets, seed, place))
                worker.start()
                theirs.close()
            assert pipe is not None
            name, way = targets[number % len(targets)].name, ""
            try:
                pipe.send(number)
                name, way, outcome, word = pipe.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                worker.join()
                outcome, word = CRASHED, f"the reader ended with {worker.exitcode}"
                worker = None
                shutil.rmtree(place)
                place.mkdir()
            report.counts[name, outcome] += 1
            if outcome not in (REFUSED, UNHARMED):
                report.failures.append(f"{name}, {way} number {number}: {outcome}, {word}")
            number += 1
        if worker is not None and pipe is not None:
            pipe.send(None)
            worker.join()
    return report
