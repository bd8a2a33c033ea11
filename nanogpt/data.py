"""Text -> token stream -> batches. A position in training is one integer.

Texts are read twice as streams and their tokens lie in a memory-mapped file, so that a text larger
than memory trains. The token stream of several documents is, for each one, the special token and
then its tokens.
"""

import atexit
import codecs
import glob
import gzip
import hashlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from nanogpt.errors import InputError, NanoGPTError
from nanogpt.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    UnknownCharacterError,
    tokenizer_from_dict,
)

_CHUNK_BYTES = 4 * 2**20
_LONGEST_CARRY = 2**20
_BPE_SAMPLE_BYTES = 512 * 2**20
_CACHE_VERSION = 1


@dataclass(frozen=True)
class Source:
    """One document: its name in messages and how to read its bytes from the start."""

    name: str
    open: Callable[[], IO[bytes]]


def find_sources(paths: Sequence[str]) -> list[Source]:
    """Documents behind files, folders, globs, .gz files and - (standard input).

    Raises: InputError where a path is missing, or a folder or glob holds no text.
    """
    sources: list[Source] = []
    for path in paths:
        if path == "-":
            sources.append(_spool_standard_input())
        elif os.path.isdir(path):
            found = [file for file in _files_below(Path(path)) if _looks_like_text(file)]
            if not found:
                raise InputError(f"the folder {path} holds no text files")
            sources += map(_file_source, found)
        elif os.path.exists(path):
            sources.append(_file_source(Path(path)))
        elif any(mark in path for mark in "*?["):
            matches = sorted(
                name for name in glob.glob(path, recursive=True) if os.path.isfile(name)
            )
            if not matches:
                raise InputError(f"no file matches {path}")
            sources += (_file_source(Path(name)) for name in matches)
        else:
            raise InputError(f"there is no file {path}")
    return sources


def _files_below(folder: Path) -> list[Path]:
    """Files of a folder in the order of their paths, hidden ones left out."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path
        for path in files
        if path.stat().st_size
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _looks_like_text(path: Path) -> bool:
    if path.suffix == ".gz":
        return True
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _file_source(path: Path) -> Source:
    if path.suffix == ".gz":
        return Source(str(path), lambda: cast(IO[bytes], gzip.open(path, "rb")))
    return Source(str(path), lambda: path.open("rb"))


def _spool_standard_input() -> Source:
    """Standard input in a temporary file, because it is read twice."""
    import shutil
    import sys

    file = tempfile.NamedTemporaryFile(prefix="nanogpt-", delete=False)  # noqa: SIM115
    atexit.register(lambda: Path(file.name).unlink(missing_ok=True))
    with file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return Source("standard input", lambda: open(file.name, "rb"))


def _builtin_source() -> Source:
    """The Python language reference that ships in every CPython."""
    import io
    from pydoc_data.topics import topics

    raw = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    return Source("the Python language reference", lambda: io.BytesIO(raw))


class _Reader:
    """Reads documents as checked text, in chunks that never split a character.

    Attributes:
        replaced: bytes that were not UTF-8 and became U+FFFD.
        n_bytes: bytes of text, as UTF-8.
    """

    def __init__(self, encoding_errors: str) -> None:
        self.encoding_errors = encoding_errors
        self.replaced = 0
        self.n_bytes = 0

    def chunks(self, source: Source, digest: Any = None) -> Iterator[str]:
        """Text of a document; its raw bytes go into `digest`.

        Raises: InputError naming the file and the offset of the first byte that is not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(self.encoding_errors)
        done, first = 0, True
        for raw in _raw_chunks(source):
            if digest is not None:
                digest.update(raw)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                offset = done - pending + error.start
                raise InputError(
                    f"{source.name} is not UTF-8 text: bad byte at offset {offset:,}; "
                    f"--encoding-errors replace goes on with U+FFFD in its place"
                ) from None
            done += len(raw)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            if self.encoding_errors == "replace":
                # A U+FFFD of the text itself stands as three bytes in the input.
                self.replaced += text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
            self.n_bytes += len(text.encode())
            if text:
                yield text


def _raw_chunks(source: Source) -> Iterator[bytes]:
    """Bytes of a document, then b"" for its end."""
    try:
        with source.open() as file:
            while raw := file.read(_CHUNK_BYTES):
                yield raw
    except EOFError:
        raise InputError(f"{source.name} is a damaged gzip file: it is cut short") from None
    except (zlib.error, gzip.BadGzipFile):
        raise InputError(f"{source.name} is a damaged gzip file, or none at all") from None
    except OSError as error:
        raise InputError(f"cannot read {source.name}: {error.strerror or error}") from None
    yield b""


@dataclass(frozen=True)
class Corpus:
    """A text as tokens.

    Attributes:
        tokens: (n,) uint16 or uint32, memory-mapped.
        n_bytes: bytes of the text as UTF-8, without special tokens.
        content_sha256: of the documents' raw bytes.
        name: short, for run directories.
    """

    tokens: np.ndarray
    tokenizer: Tokenizer
    n_documents: int
    n_bytes: int
    content_sha256: str
    name: str

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def split(self, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Training tokens, and the last `val_fraction` of the stream for validation.

        A validation part of fewer than two tokens has no target and is given as an empty one.
        """
        # In decimals, because n * (1 - 0.1) in binary can fall below a whole number.
        n_train = int(self.n_tokens * (1 - Decimal(str(val_fraction))))
        if self.n_tokens - n_train < 2:
            return self.tokens, self.tokens[self.n_tokens :]
        return self.tokens[:n_train], self.tokens[n_train:]

    def count_bytes(self, tokens: np.ndarray) -> int:
        """Raw bytes that tokens stand for."""
        lengths, total = self.tokenizer.token_byte_lengths, 0
        for first in range(0, len(tokens), _CHUNK_BYTES):
            total += int(lengths[tokens[first : first + _CHUNK_BYTES]].sum())
        return total


def prepare(
    paths: Sequence[str] | None,
    *,
    tokenizer_kind: str = "char",
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    encoding_errors: str = "strict",
    cache_dir: Path | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Corpus:
    """Read texts into a token file, or take it from the cache.

    Args:
        paths: see `find_sources`; None is the Python language reference.
        tokenizer_kind: "char" | "byte" | "bpe", where no tokenizer is given.
        vocab_size: ids of a bpe tokenizer.
        tokenizer: use this one, whose vocabulary the text must fit.
        encoding_errors: "strict" | "replace".
        cache_dir: default $NANOGPT_CACHE, or nanogpt in the user's cache folder.
        note: receives sentences for the user.
    Raises: InputError for texts that cannot be read or do not fit the tokenizer.
    """
    sources = [_builtin_source()] if paths is None else find_sources(paths)
    scan = _scan(sources, encoding_errors)
    if scan.replaced:
        note(f"{scan.replaced:,} places that were not UTF-8 became U+FFFD")
    folder = _cache_folder(cache_dir, note)
    if tokenizer is None:
        tokenizer = _make_tokenizer(
            tokenizer_kind, vocab_size, sources, scan, encoding_errors, folder, note
        )
    key = _key(scan.sha256, tokenizer.to_dict(), encoding_errors)
    path = folder / f"{key}.tokens"
    tokens = _open_cached(path, tokenizer, note)
    if tokens is None:
        _write_tokens(path, sources, tokenizer, encoding_errors)
        tokens = _open_cached(path, tokenizer, note)
        if tokens is None:
            raise NanoGPTError(f"the token file {path} cannot be read back")
    name = "python-reference" if paths is None else _short_name(sources[0].name)
    return Corpus(tokens, tokenizer, len(sources), scan.n_bytes, scan.sha256, name)


@dataclass(frozen=True)
class _Scan:
    sha256: str
    n_bytes: int
    replaced: int
    characters: str


def _scan(sources: Sequence[Source], encoding_errors: str) -> _Scan:
    """First pass: check the encoding, hash the content, collect the characters."""
    reader, whole = _Reader(encoding_errors), hashlib.sha256()
    seen = np.zeros(0x110000, dtype=bool)
    for source in sources:
        before, digest = reader.n_bytes, hashlib.sha256()
        for text in reader.chunks(source, digest):
            seen[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)] = True
        if reader.n_bytes == before:
            raise InputError(f"{source.name} is empty: there is no text in it")
        whole.update(digest.digest())
    characters = "".join(map(chr, np.flatnonzero(seen).tolist()))
    return _Scan(whole.hexdigest(), reader.n_bytes, reader.replaced, characters)


def _make_tokenizer(
    kind: str,
    vocab_size: int | None,
    sources: Sequence[Source],
    scan: _Scan,
    encoding_errors: str,
    folder: Path,
    note: Callable[[str], None],
) -> Tokenizer:
    if kind == "char":
        return CharTokenizer(scan.characters)
    if kind == "byte":
        return ByteTokenizer()
    size = vocab_size or 4096
    key = _key(scan.sha256, {"kind": "bpe", "vocab_size": size}, encoding_errors)
    path = folder / f"{key}.bpe.json"
    if path.exists():
        with suppress(ValueError, KeyError, TypeError, RecursionError, InputError):
            kept = json.loads(path.read_bytes())
            if kept["sha256"] == _json_digest(kept["tokenizer"]):
                return tokenizer_from_dict(kept["tokenizer"])
        note(f"the cached tokenizer {path} is damaged and made again")
    keep_every = -(-scan.n_bytes // _BPE_SAMPLE_BYTES)
    if keep_every > 1:
        note(f"the bpe tokenizer learns from every {keep_every}th part of the text")
    reader = _Reader(encoding_errors)
    parts = (text for source in sources for text in _safe_parts(reader.chunks(source)))
    trained = BPETokenizer.train(
        (text for index, text in enumerate(parts) if index % keep_every == 0), size
    )
    if trained.vocab_size < size:
        note(f"the text has pairs for {trained.vocab_size:,} bpe tokens, not {size:,}")
    description = trained.to_dict()
    kept = {"sha256": _json_digest(description), "tokenizer": description}
    _write(path, lambda file: file.write(json.dumps(kept).encode()))
    return trained


def _safe_parts(chunks: Iterator[str]) -> Iterator[str]:
    """Chunks cut only before white space that follows something else.

    There GPT-2's pattern always begins a new piece, so that tokens do not depend on the chunks.
    """
    carry = ""
    for chunk in chunks:
        text = carry + chunk
        cut = next(
            (
                at
                for at in range(len(text) - 1, 0, -1)
                if text[at].isspace() and not text[at - 1].isspace()
            ),
            0,
        )
        if not cut and len(text) > _LONGEST_CARRY:
            cut = len(text)
        if cut:
            yield text[:cut]
        carry = text[cut:]
    if carry:
        yield carry


def _write_tokens(
    path: Path, sources: Sequence[Source], tokenizer: Tokenizer, encoding_errors: str
) -> None:
    """Second pass: the token file, and beside it what it should be."""
    digest, count = hashlib.sha256(), 0
    separator = np.array([tokenizer.end_of_text_id], dtype=tokenizer.dtype)

    def write(file: IO[bytes]) -> None:
        nonlocal count
        for source in sources:
            for part in _encoded(source, tokenizer, encoding_errors, separator):
                digest.update(part.data)
                file.write(part.data)
                count += len(part)

    _write(path, write)
    about = {
        "n_tokens": count,
        "dtype": np.dtype(tokenizer.dtype).name,
        "sha256": digest.hexdigest(),
    }
    _write(path.with_suffix(".json"), lambda file: file.write(json.dumps(about).encode()))


def _encoded(
    source: Source, tokenizer: Tokenizer, encoding_errors: str, separator: np.ndarray
) -> Iterator[np.ndarray]:
    yield separator
    reader = _Reader(encoding_errors)
    chunks = reader.chunks(source)
    offset = 0
    for text in _safe_parts(chunks) if tokenizer.kind == "bpe" else chunks:
        try:
            yield tokenizer.encode_array(text)
        except UnknownCharacterError as error:
            at = offset + len(text[: error.position].encode())
            raise InputError(
                f"{source.name} does not fit the model: its vocabulary lacks the character "
                f"{error.character!r} (U+{ord(error.character):04X}) at byte {at:,}"
            ) from None
        offset += len(text.encode())


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a cache file whole or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise NanoGPTError(
                f"cannot write the token cache in {path.parent}: {reason} "
                f"(NANOGPT_CACHE names another folder)"
            ) from None
        raise


def _open_cached(
    path: Path, tokenizer: Tokenizer, note: Callable[[str], None]
) -> np.ndarray | None:
    """The token file where it is there and whole."""
    about_path = path.with_suffix(".json")
    if not path.exists() or not about_path.exists():
        return None
    try:
        about = json.loads(about_path.read_text(encoding="utf-8"))
        size = about["n_tokens"] * np.dtype(about["dtype"]).itemsize
        whole = path.stat().st_size == size and np.dtype(about["dtype"]) == tokenizer.dtype
        if whole:
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == about["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        note(f"the cached tokens {path} are damaged and made again")
        return None
    return np.memmap(path, dtype=tokenizer.dtype, mode="r")


def _cache_folder(cache_dir: Path | None, note: Callable[[str], None]) -> Path:
    if cache_dir is None:
        named = os.environ.get("NANOGPT_CACHE")
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        cache_dir = Path(named or os.path.join(base, "nanogpt")).expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir):
            pass
    except OSError as error:
        fallback = Path(tempfile.mkdtemp(prefix="nanogpt-"))
        note(f"the cache {cache_dir} cannot be written ({error.strerror}): using {fallback}")
        return fallback
    return cache_dir


def _key(content_sha256: str, tokenizer: dict[str, Any], encoding_errors: str) -> str:
    parts = [_CACHE_VERSION, content_sha256, tokenizer, encoding_errors]
    return _json_digest(parts)[:32]


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short_name(name: str) -> str:
    stem = Path(name).name.removesuffix(".gz")
    stem = stem.rsplit(".", 1)[0] if "." in stem[1:] else stem
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:40] or "text"


class BatchOrder:
    """Which windows of the training stream a step sees: a function of (seed, epoch, index) alone.

    An epoch visits W = floor(n / block_size) disjoint windows once. The stream is a ring: windows
    begin at an offset drawn for the epoch, and the one that passes the end goes on at the start,
    where the special token stands. The order is a pseudo-random permutation of 0 … W-1 that takes
    no memory: a Feistel network whose results outside the range walk on.

    Args:
        n_tokens: n, length of the stream.
        batch_size: windows of a step; the last step of an epoch may have fewer.
    Raises: InputError where the stream is shorter than one block.
    Source: Black and Rogaway 2002, Ciphers with arbitrary finite domains (cycle walking).
    """

    _ROUNDS = 6

    def __init__(self, n_tokens: int, block_size: int, batch_size: int, seed: int) -> None:
        if n_tokens < block_size:
            raise InputError(
                f"the text is too short: {n_tokens:,} tokens are left for training, fewer than one "
                f"block of {block_size:,}; give more text or a smaller --block-size"
            )
        self.n_tokens, self.block_size = n_tokens, block_size
        self.batch_size, self.seed = batch_size, seed
        self.windows = n_tokens // block_size
        self.steps_per_epoch = -(-self.windows // batch_size)
        self._half_bits = np.uint64(max(1, (max(1, self.windows - 1).bit_length() + 1) // 2))

    def starts(self, step: int) -> np.ndarray:
        """First tokens of the windows of optimizer step `step`, counted from 0 over all epochs.

        Returns: (B,) int64 in [0, n).
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.batch_size
        visited = np.arange(first, min(first + self.batch_size, self.windows), dtype=np.uint64)
        words = np.random.SeedSequence((self.seed, epoch)).generate_state(
            self._ROUNDS + 1, dtype=np.uint64
        )
        windows = self._permute(visited, words[1:]).astype(np.int64)
        offset = int(words[0] % np.uint64(self.n_tokens))
        return (offset + windows * self.block_size) % self.n_tokens

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        out = self._feistel(values, keys)
        outside = out >= self.windows
        while outside.any():
            out[outside] = self._feistel(out[outside], keys)
            outside = out >= self.windows
        return out

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """A permutation of 0 … 2^(2 half) - 1."""
        half = self._half_bits
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = values >> half, values & mask
        for key in keys:
            # Finaliser of splitmix64: every bit of the input reaches every bit of the output.
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << half) | right


def gather(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Windows of `length` inputs and the target after them, on the ring of `tokens`.

    Returns: (B, length + 1) int64.
    """
    at = starts[:, None] + np.arange(length + 1)
    return np.asarray(tokens[at % len(tokens)], dtype=np.int64)


def validation_windows(n_tokens: int, block_size: int) -> list[tuple[np.ndarray, int]]:
    """Consecutive windows that hold each of the n - 1 targets once.

    Returns: (starts, length) for the full windows, and for the shorter one at the end.
    """
    full, rest = divmod(max(0, n_tokens - 1), block_size)
    groups = []
    if full:
        groups.append((np.arange(full) * block_size, block_size))
    if rest:
        groups.append((np.array([full * block_size]), rest))
    return groups
