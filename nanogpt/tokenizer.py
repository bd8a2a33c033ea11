"""Text to token ids and back: characters, bytes, byte-pair encoding, records of fields.

Every tokenizer has one special token, END_OF_TEXT, whose id is the last one. It separates
documents and starts generation from an empty prompt; `decode` leaves it out, and the same letters
inside ordinary text are ordinary letters.
"""

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from nanogpt.errors import InputError, UsageError

END_OF_TEXT = "<|endoftext|>"
_SURROGATES = range(0xD800, 0xE000)
US, RS = "\x1f", "\x1e"
"""ASCII's unit and record separators: the end of a field's name, and of its value."""
_SEPARATOR = re.compile("[\x1e\x1f]")
_SEGMENT = re.compile("[^\x1e\x1f]*[\x1e\x1f]|[^\x1e\x1f]+")


class UnknownCharacterError(InputError, ValueError):
    """A character that the vocabulary lacks.

    Attributes:
        character: the first such character.
        position: its index in the text.
    """

    def __init__(self, character: str, position: int) -> None:
        self.character, self.position = character, position
        super().__init__(
            f"the character {character!r} (U+{ord(character):04X}) at position {position:,} is not "
            f"in the model's vocabulary"
        )


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: "char" | "byte" | "bpe".
        vocab_size: V, the special token included.
        end_of_text_id: id of the special token, V - 1.
        token_bytes: for every id its raw bytes; b"" for the special token.
    """

    kind: str
    token_bytes: list[bytes]

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @property
    def end_of_text_id(self) -> int:
        return len(self.token_bytes) - 1

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The smallest unsigned type that holds every id: uint16 or uint32."""
        return np.uint16 if self.vocab_size <= 65536 else np.uint32

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """(V,) int64: bytes of every id."""
        return np.array([len(raw) for raw in self.token_bytes], dtype=np.int64)

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, (n,) of `dtype`.

        Raises: UnknownCharacterError where the vocabulary lacks a character.
        """

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises: UnknownCharacterError where the vocabulary lacks a character."""
        return self.encode_array(text).tolist()

    def decode_array(self, ids: np.ndarray) -> bytes:
        """`decode_bytes` of an array: a hundred times as fast where every id has one byte."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= self.end_of_text_id:
            return self.decode_bytes(ids.tolist())  # which says what is wrong
        if int(self.token_byte_lengths.max()) > 1:
            return b"".join(map(self.token_bytes.__getitem__, ids.tolist()))
        table = np.frombuffer(b"".join(raw or b"\0" for raw in self.token_bytes), dtype=np.uint8)
        return table[ids][self.token_byte_lengths[ids] > 0].tobytes()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Raw bytes of ids, the special token left out.

        Raises: ValueError for an id outside the vocabulary.
        """
        pieces, last = self.token_bytes, self.end_of_text_id
        out = []
        for token in ids:
            if not 0 <= token <= last:
                raise ValueError(f"token {token} is outside the vocabulary of {last + 1}")
            out.append(pieces[token])
        return b"".join(out)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD.

        Raises: ValueError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description; `tokenizer_from_dict` is the inverse."""


class CharTokenizer(Tokenizer):
    """One id for each character, in code point order.

    Args:
        characters: the vocabulary without the special token, each character once.
    Attributes:
        stoi, itos: character to id and back; both hold the special token too.
    """

    kind = "char"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(characters))
        if len(set(characters)) != len(characters) or not characters:
            raise InputError("a character vocabulary needs characters, each of them once")
        bad = next((c for c in characters if ord(c) in _SURROGATES), None)
        if bad is not None:
            raise InputError(f"U+{ord(bad):04X} is half of a character and cannot be in a text")
        self.token_bytes = [*(c.encode() for c in self.characters), b""]
        self.stoi = {c: i for i, c in enumerate([*self.characters, END_OF_TEXT])}
        self.itos = {i: c for c, i in self.stoi.items()}

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The vocabulary of a text."""
        return cls("".join(sorted(set(text))))

    @cached_property
    def _ids_by_code(self) -> np.ndarray:
        table = np.full(ord(self.characters[-1]) + 2, -1, dtype=np.int64)
        codes = [ord(c) for c in self.characters]
        table[codes] = np.arange(len(codes))
        return table

    def encode_array(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        table = self._ids_by_code
        ids = table[np.minimum(codes, len(table) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            at = int(unknown[0])
            raise UnknownCharacterError(text[at], at)
        return ids.astype(self.dtype)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


class ByteTokenizer(Tokenizer):
    """One id for each byte of UTF-8: 256, and the special token."""

    kind = "byte"

    def __init__(self) -> None:
        self.token_bytes = [*(bytes([value]) for value in range(256)), b""]

    def encode_array(self, text: str | bytes) -> np.ndarray:
        raw = text if isinstance(text, bytes) else _utf8(text)
        return np.frombuffer(raw, dtype=np.uint8).astype(self.dtype)

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text or of any bytes."""
        return self.encode_array(text).tolist()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding with GPT-2's pre-tokenisation, through Hugging Face tokenizers.

    Args:
        serialised: a tokenizer.json as a dict, whose last id is the special token.
    Source: Radford et al. 2019, GPT-2, section 2.2; Sennrich et al. 2016 (arXiv:1508.07909).
    """

    kind = "bpe"

    def __init__(self, serialised: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as Backend

        self._check_model(serialised.get("model"))
        try:
            self._backend = Backend.from_str(json.dumps(serialised))
        except BaseException as error:  # the library's own errors and its panics speak of itself
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(
                "the bpe tokenizer is damaged: its parts are unknown or do not fit together"
            ) from None
        # Ordinary text must not turn into the special token, whatever letters it holds.
        self._backend.encode_special_tokens = True
        size = self._backend.get_vocab_size(with_added_tokens=True)
        names = [self._backend.id_to_token(i) or "" for i in range(size)]
        if "" in names or size < 257 or names[-1] != END_OF_TEXT:
            raise InputError(f"the bpe tokenizer is damaged: its last token is not {END_OF_TEXT}")
        values = {symbol: value for value, symbol in byte_symbols().items()}
        try:
            self.token_bytes = [*(bytes(values[c] for c in name) for name in names[:-1]), b""]
        except KeyError:
            raise InputError("the bpe tokenizer is damaged: a token is not made of bytes") from None

    @staticmethod
    def _check_model(model: Any) -> None:
        """What ends the library in a panic, which writes to standard error by itself."""
        if not isinstance(model, dict):
            return
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise InputError(f"the bpe tokenizer is damaged: it has a {key}")
        vocabulary, merges = model.get("vocab"), model.get("merges")
        if not isinstance(vocabulary, dict) or not isinstance(merges, list):
            return
        for merge in merges:
            if isinstance(merge, str) and merge.startswith("#version"):
                continue
            parts = merge.split(" ") if isinstance(merge, str) else merge
            made = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
            if made and "".join(parts) not in vocabulary:
                raise InputError("the bpe tokenizer is damaged: two tokens merge into none")

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges from texts; fewer than asked for where the text has no more pairs.

        Args:
            vocab_size: ids, the special token included; at least 257.
        Raises: UsageError for a smaller vocabulary.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise UsageError(f"a bpe vocabulary has at least 257 ids, not {vocab_size}")
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=sorted(byte_symbols().values()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([END_OF_TEXT])
        return cls(json.loads(backend.to_str()))

    def encode_array(self, text: str) -> np.ndarray:
        _utf8(text)
        return np.array(self._backend.encode(text).ids, dtype=self.dtype)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bpe", "tokenizer": json.loads(self._backend.to_str())}


class RecordTokenizer(Tokenizer):
    """Field names and their values as whole tokens, and another tokenizer for free text.

    A record's text is name US value RS for each of its fields, with the separators of ASCII. A
    name is a token up to and with its US. A value is one up to and with its RS where it is among
    the values of the field before it; values of two fields are different tokens even where they
    are spelled alike. Everything else is left to `base`.

    Args:
        fields: (name, values) of every field; both are spelled without the separators.
        base: for free text; without it there is none.
        schema: JSON-ready description of the fields, carried along.
    """

    kind = "record"

    def __init__(
        self,
        fields: Iterable[tuple[str, Sequence[str]]],
        base: Tokenizer | None = None,
        schema: Any = None,
    ) -> None:
        self.fields = [(name, list(values)) for name, values in fields]
        self.base, self.schema = base, schema
        self.token_bytes = [] if base is None else base.token_bytes[:-1]
        self.name_ids: list[int] = []
        """The token of every field's name."""
        self.value_ids: list[dict[str, int]] = []
        """Of every field, the tokens of its values."""
        self.separator_id = self._add(RS)
        """Ends a free text."""
        for name, values in self.fields:
            if _SEPARATOR.search("".join((name, *values))) or len(set(values)) < len(values):
                raise InputError(f"the values of the field {name!r} cannot be told apart")
            self.name_ids.append(self._add(name + US))
            self.value_ids.append({value: self._add(value + RS) for value in values})
        self._place = {name: place for place, (name, _) in enumerate(self.fields)}
        if len(self._place) < len(self.fields):
            raise InputError("two fields of a record have the same name")
        self.token_bytes.append(b"")

    def _add(self, text: str) -> int:
        self.token_bytes.append(_utf8(text))
        return len(self.token_bytes) - 1

    def encode_array(self, text: str) -> np.ndarray:
        ids = [np.empty(0, dtype=self.dtype)]
        place: int | None = None
        position = 0
        for segment in _SEGMENT.findall(text):
            content, end = segment.rstrip(US + RS), segment[-1]
            if end == US and content in self._place:
                place = self._place[content]
                found = [self.name_ids[place]]
            elif end == RS and place is not None and content in self.value_ids[place]:
                found = [self.value_ids[place][content]]
            elif self.base is None:
                raise UnknownCharacterError(segment[0], position)
            else:
                closed = end == RS
                free = content if closed else segment
                found = [*self.base.encode(free), *([self.separator_id] if closed else [])]
            ids.append(np.array(found, dtype=self.dtype))
            position += len(segment)
        return np.concatenate(ids)

    def to_dict(self) -> dict[str, Any]:
        base = None if self.base is None else self.base.to_dict()
        fields = [[name, values] for name, values in self.fields]
        return {"kind": "record", "fields": fields, "base": base, "schema": self.schema}


def tokenizer_from_dict(description: Any) -> Tokenizer:
    """The tokenizer that `to_dict` described.

    Raises: InputError where the description is damaged.
    """
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char" and isinstance(description.get("characters"), str):
        return CharTokenizer(description["characters"])
    if kind == "bpe" and isinstance(description.get("tokenizer"), dict):
        return BPETokenizer(description["tokenizer"])
    if kind == "record":
        base, fields = description.get("base"), description.get("fields")
        try:
            pairs = [(name, list(values)) for name, values in fields]
            inner = None if base is None else tokenizer_from_dict(base)
            return RecordTokenizer(pairs, inner, description.get("schema"))
        except (TypeError, ValueError):
            raise InputError("the record tokenizer is damaged") from None
    raise InputError("the tokenizer's description is damaged or of an unknown kind")


class StreamDecoder:
    """Decodes ids one at a time and never splits a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that has become complete with this id."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UnknownCharacterError(text[error.start], error.start) from None


def byte_symbols() -> dict[int, str]:
    """GPT-2's visible character for every byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {value: chr(value) for value in visible}
    hidden = (value for value in range(256) if value not in symbols)
    return symbols | {value: chr(256 + i) for i, value in enumerate(hidden)}
