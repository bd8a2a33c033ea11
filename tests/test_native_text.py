"""The C++ tokenizers, UTF-8 stream and stop texts against Python's, by the hundred thousand.

Cases are made with numpy in batches and go through one process of csrc/tests_support a batch.
"""

import codecs
import copy
import importlib.util
import itertools
import json
import resource
import struct
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from native_programs import ROOT, native_program

from nanogpt.decoding import StopText
from nanogpt.errors import InputError
from nanogpt.metadata import canonical_json
from nanogpt.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    UnknownCharacterError,
    tokenizer_from_dict,
)

REFUSED = 0xFFFFFFFF
SPACES = [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029]
SPACES += [0x202F, 0x205F, 0x3000]


def span(first: int, last: int) -> list[str]:
    return [chr(code) for code in range(first, last + 1) if not 0xD800 <= code < 0xE000]


# What hostile texts are made of; one text jumps between a few of these.
POOLS: list[list[str]] = [
    span(ord("a"), ord("z")),
    span(ord("A"), ord("Z")),
    span(ord("0"), ord("9")),
    [" "],
    [" ", "  ", "\n", "\t", "\r\n", " \n"],
    [chr(code) for code in SPACES],
    ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'", "''", "'l", "'r", "'v"],
    ["’s", "’", "ʼt", "`"],
    ["the", "The", " the", " of", "and", "ing", "tion", "dog", "don't", "they're", "it's I'm"],
    span(0x21, 0x2F) + span(0x3A, 0x40) + span(0x5B, 0x60) + span(0x7B, 0x7E),
    span(0, 0x1F) + span(0x7F, 0x9F),
    span(0xA0, 0x24F),
    [*span(0x300, 0x36F), "é", "ñ", "g̈"],
    span(0x370, 0x3FF) + span(0x400, 0x52F),
    span(0x590, 0x6FF),
    span(0x900, 0x97F) + span(0x0E00, 0x0E7F),
    span(0x1100, 0x11FF) + span(0xAC00, 0xAD00),
    span(0x3040, 0x30FF) + span(0x4E00, 0x4F00),
    span(0x20000, 0x20100) + span(0x10000, 0x100FF),
    ["½", "Ⅷ", "²", "٣", "४", "㊿", "𝟘", "𐄇", "一", "〇"],
    ["🙂", "👩‍👩‍👧", "👍🏽", "🏳️‍🌈", "🇩🇪", "\u200d", "\ufe0f", "👨‍💻", "❤️", "1️⃣"],
    ["\u200b", "\u200c", "\u200e", "\u2060", "\ufeff", "\u180e", "\u00ad", "\u061c", "\ufffd"],
    span(0xE000, 0xE0FF) + span(0x100000, 0x1000FF) + ["\uf8ff", "\U0010fffd"],
    ["\ufffe", "\uffff", "\ufdd0", "\ufdef", "\U0001ffff", "\U0010ffff", "\U0010fffe"],
    ["\u0378", "\u0ab0", "\u2fe0", "\U0001c000", "\U000e0080", "\U00030000", "\u1c89", "\ua7cb"],
    [END_OF_TEXT, "<|", "|>", "endoftext", "Ġ", "Ċ", "#version", '"', "\\", "\\u0120"],
]
ITEMS = np.array([item for pool in POOLS for item in pool], dtype=object)
POOL_SIZES = np.array([len(pool) for pool in POOLS])
POOL_STARTS = np.concatenate([[0], np.cumsum(POOL_SIZES)[:-1]])


def hostile_texts(count: int, seed: int) -> list[str]:
    """Random texts of 0 to about 150 pieces that mix scripts, white space and oddities."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.09, count) - (rng.random(count) < 0.05), 150)
    lengths = np.maximum(lengths, 0)
    total = int(lengths.sum())
    # A piece comes from the pool of the piece before it, or else from a new one; every text draws
    # from any of them or mostly from the plainest.
    plain = np.repeat(rng.random(count) < 0.5, lengths)
    pool = np.where(
        plain & (rng.random(total) < 0.8),
        rng.integers(0, 9, total),
        rng.integers(0, len(POOLS), total),
    )
    fresh = rng.random(total) < 0.5
    fresh[:1] = True
    pool = pool[np.maximum.accumulate(np.where(fresh, np.arange(total), 0))]
    pieces = ITEMS[POOL_STARTS[pool] + rng.integers(0, 2**31, total) % POOL_SIZES[pool]]
    # Anything at all now and then.
    wild = np.flatnonzero(rng.random(total) < 0.03)
    codes = rng.integers(0, 0x110000 - 0x800, len(wild))
    codes += 0x800 * (codes >= 0xD800)
    pieces[wild] = [chr(code) for code in codes]
    ends = np.cumsum(lengths).tolist()
    flat = pieces.tolist()
    return ["".join(flat[a:b]) for a, b in itertools.pairwise([0, *ends])]


def packed(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<I", len(raw)) + raw


def packed_list(texts: Sequence[str | bytes]) -> bytes:
    return struct.pack("<I", len(texts)) + b"".join(map(packed, texts))


class Results:
    """Reads what text_streams wrote."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def number(self) -> int:
        self.at += 4
        return int.from_bytes(self.raw[self.at - 4 : self.at], "little")

    def text(self) -> bytes:
        size = self.number()
        self.at += size
        return self.raw[self.at - size : self.at]

    def texts(self) -> list[bytes]:
        return [self.text() for _ in range(self.number())]

    def ids(self) -> list[int] | str:
        """Ids, or the sentence of a refusal."""
        count = self.number()
        if count == REFUSED:
            return self.text().decode()
        self.at += 4 * count
        return np.frombuffer(self.raw, "<i4", count, self.at - 4 * count).tolist()

    def done(self) -> bool:
        return self.at == len(self.raw)


def run_streams(mode: str, cases: bytes, *arguments: object) -> bytes:
    program = native_program("text_streams")
    done = subprocess.run(
        [program, mode, *arguments], input=cases, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def described(tokenizer: Tokenizer, folder: Path, description: dict | None = None) -> Path:
    """A file of the description, by default the one that the tokenizer writes."""
    path = folder / "tokenizer.json"
    path.write_bytes(canonical_json(description or tokenizer.to_dict()))
    return path


def encoded(tokenizer: Tokenizer, texts: Sequence[str | bytes], folder: Path) -> Results:
    cases = b"".join(map(packed, texts))
    return Results(run_streams("encode", cases, described(tokenizer, folder)))


def python_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """What `encode` gives for every text; for BPE the library encodes a batch at a time."""
    if isinstance(tokenizer, BPETokenizer):
        return [one.ids for one in tokenizer._backend.encode_batch_fast(texts)]
    return [tokenizer.encode(text) for text in texts]


def as_stream(lists: Iterable[list[int]]) -> np.ndarray:
    flat: list[int] = []
    for ids in lists:
        flat.append(len(ids))
        flat += ids
    return np.array(flat, dtype=np.int32)


def assert_encodes_alike(
    tokenizer: Tokenizer, texts: Sequence[str], folder: Path, description: dict | None = None
) -> int:
    """Both encode every text to the same ids, and C++ decodes those to the text."""
    path = described(tokenizer, folder, description)
    results = Results(run_streams("encode", b"".join(map(packed, texts)), path))
    expected = as_stream(python_ids(tokenizer, texts))
    if not np.array_equal(np.frombuffer(results.raw, "<i4"), expected):
        for text, ids in zip(texts, python_ids(tokenizer, texts), strict=True):
            same = results.ids() == ids
            assert same, f"{text[:300]!r} is encoded differently"
        raise AssertionError("the results hold more than the ids")
    back = run_streams("decode", results.raw, folder / "tokenizer.json")
    assert back == b"".join(map(packed, texts))
    return len(texts)


@pytest.fixture(scope="module")
def mixed() -> BPETokenizer:
    """Merges of every script, of white space and of punctuation."""
    return BPETokenizer.train(iter(hostile_texts(8000, seed=1)), 4000)


def tangled_description(seed: int) -> dict:
    """Merges in an order that no training gives, many ways to make one token, ids in disorder."""
    rng = np.random.default_rng(seed)
    tokens = dict.fromkeys(ByteTokenizer().token_bytes[:256])
    pool = [b"a", b"b", b"c", b"aa", b"\xc3", b"\xa9"]
    tokens.update(dict.fromkeys(pool))
    merges = [(b"a", b"a")]
    for _ in range(400):
        left, right = (pool[i] for i in rng.integers(0, len(pool), 2))
        if len(left) + len(right) <= 9:
            pool.append(left + right)
            tokens[left + right] = None
            merges.append((left, right))
    # Every way to cut a token in two that its parts allow, some of them twice.
    for token in list(tokens):
        for cut in range(1, len(token)):
            if token[:cut] in tokens and token[cut:] in tokens and rng.random() < 0.5:
                merges += [(token[:cut], token[cut:])] * int(rng.integers(1, 3))
    rng.shuffle(merges)
    plain = BPETokenizer.train(iter([]), 257)
    description = plain.to_dict()
    model = description["tokenizer"]["model"]
    symbols = {plain.token_bytes[i][0]: name for name, i in model["vocab"].items()}

    def spelled(raw: bytes) -> str:
        return "".join(symbols[byte] for byte in raw)

    ids = rng.permutation(len(tokens)).tolist()
    model["vocab"] = {spelled(token): i for token, i in zip(tokens, ids, strict=True)}
    model["merges"] = [[spelled(bytes(left)), spelled(bytes(right))] for left, right in merges]
    description["tokenizer"]["added_tokens"][0]["id"] = len(tokens)
    return description


@pytest.fixture(scope="module")
def pairing() -> BPETokenizer:
    """Every pair of bytes with an ASCII one merges, that one first if it is ASCII: the ids show
    where words end, also between characters that no text would teach to merge."""
    description = BPETokenizer.train(iter([]), 257).to_dict()
    tokenizer = tokenizer_from_dict(description)
    model = description["tokenizer"]["model"]
    by_byte = {tokenizer.token_bytes[i][0]: name for name, i in model["vocab"].items()}
    names = [by_byte[value] for value in range(256)]
    pairs = list(itertools.product(names[:128], names))
    pairs += itertools.product(names[128:], names[:128])
    model["vocab"].update({a + b: 256 + i for i, (a, b) in enumerate(pairs)})
    model["merges"] = [list(pair) for pair in pairs]
    description["tokenizer"]["added_tokens"][0]["id"] = 256 + len(pairs)
    return tokenizer_from_dict(description)


def encodes_hostile_texts(mixed: BPETokenizer, batches: int, folder: Path) -> int:
    return sum(
        assert_encodes_alike(mixed, hostile_texts(50_000, seed=100 + batch), folder)
        for batch in range(batches)
    )


def test_bpe_encodes_hostile_texts_as_python_does(mixed, tmp_path):
    assert encodes_hostile_texts(mixed, 4, tmp_path) == 200_000


@pytest.mark.slow
def test_bpe_encodes_a_million_hostile_texts_as_python_does(mixed, tmp_path):
    assert encodes_hostile_texts(mixed, 20, tmp_path) == 1_000_000


@pytest.mark.parametrize("seed", range(8))
def test_tangled_merges_apply_in_the_same_order(seed, tmp_path):
    description = tangled_description(seed)
    tokenizer = tokenizer_from_dict(description)
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([rng.integers(1, 40, 4000), rng.integers(60, 400, 500), [20_000]])
    letters = np.array(["a", "b", "c", "é", "d"])
    texts = [
        "".join(rng.choice(letters, n, p=[0.45, 0.25, 0.15, 0.1, 0.05]).tolist()) for n in lengths
    ]
    # The library itself writes each pair once; here C++ sees those that stand there twice.
    assert_encodes_alike(tokenizer, texts, tmp_path, description)


def test_hostile_texts_are_split_as_python_does(pairing, tmp_path):
    assert assert_encodes_alike(pairing, hostile_texts(50_000, seed=50), tmp_path) == 50_000


def test_every_code_point_is_split_as_python_does(pairing, tmp_path):
    codes = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    # All that stand in the tables' busy part, every 16th of the rest and its neighbours.
    chosen = codes[:0x3400] + codes[0x3400::16] + codes[0x340F::16]
    texts = [
        "".join(f"a{c}1{c}!{c} {c}{c}\n{c}'{c}" for c in chosen[at : at + 64])
        for at in range(0, len(chosen), 64)
    ]
    assert_encodes_alike(pairing, texts, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "ab" * 300_000,
        " " * 1_000_000,
        " \n" * 300_000 + "x",
        "'" * 500_000,
        "é" * 300_000,
        "\u3000" * 200_000 + "1" * 200_000,
        "the dog" * 100_000,
    ],
    ids=lambda text: f"{text[:3]!r}",
)
def test_very_long_runs_are_encoded_alike_and_in_time(mixed, text, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    results = encoded(mixed, [text], tmp_path)
    taken_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert results.ids() == mixed.encode(text)
    # A million squared would take minutes.
    assert taken_seconds < 5


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "movie_reviews.txt", "humaneval.jsonl"])
def test_real_texts_are_encoded_alike_by_all_three(name, data_folder, tmp_path):
    text = (data_folder / name).read_text(encoding="utf-8")
    assert_encodes_alike(CharTokenizer.from_text(text), [text], tmp_path)
    assert_encodes_alike(ByteTokenizer(), [text], tmp_path)
    bpe = BPETokenizer.train(iter([text]), 3000)
    assert_encodes_alike(bpe, [text, *text.splitlines(keepends=True)], tmp_path)


def test_characters_and_their_errors_are_the_same(tmp_path):
    texts = hostile_texts(30_000, seed=7)
    # A vocabulary that lacks some of what occurs.
    characters = sorted(set("".join(texts[:2000])))
    tokenizer = CharTokenizer("".join({*characters[::2], "\0", "\U0010ffff"}))
    # Every code point of where the scripts are, and some of the others.
    codes = [*range(0xD800), *range(0xE000, 0x110000, 41)]
    texts += ["a" * (1234 if code % 500 == 0 else code % 3) + chr(code) for code in codes]
    known = CharTokenizer("ab")
    refused = 0
    for one in (tokenizer, known):
        results = encoded(one, texts, tmp_path)
        for text in texts:
            try:
                expected = one.encode(text)
            except UnknownCharacterError as error:
                expected = str(error)
                refused += 1
            assert results.ids() == expected
        assert results.done()
    assert 100_000 < refused < 2 * len(texts)


def test_bytes_of_any_kind_are_encoded_alike(tmp_path):
    rng = np.random.default_rng(3)
    texts = [rng.bytes(int(n)) for n in rng.integers(0, 60, 50_000)]
    tokenizer = ByteTokenizer()
    results = encoded(tokenizer, texts, tmp_path)
    assert results.raw == as_stream([list(text) for text in texts]).tobytes()
    assert tokenizer.encode(texts[0]) == list(texts[0])


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_what_is_not_utf8_is_refused_with_its_place(kind, mixed, tmp_path):
    tokenizer = mixed if kind == "bpe" else CharTokenizer("".join(map(chr, range(0x250))))
    bad = [
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xc0\xaf",
        b"\xe2\x82",
        b"\x80",
    ]
    cases = [
        b"x" * before + piece + after
        for before in (0, 7, 1234)
        for piece in bad
        for after in (b"", b" and more text")
    ]
    results = encoded(tokenizer, cases, tmp_path)
    for raw in cases:
        with pytest.raises(UnicodeDecodeError) as caught:
            raw.decode()
        at = caught.value.start
        assert results.ids() == (
            f"the text is not UTF-8: byte 0x{raw[at]:02x} at byte position {at:,}"
        )


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "tangled"])
def test_any_ids_are_decoded_as_python_does(kind, mixed, tmp_path):
    tokenizer = {
        "char": lambda: CharTokenizer("".join(sorted(set("".join(hostile_texts(3000, seed=2)))))),
        "byte": ByteTokenizer,
        "bpe": lambda: mixed,
        "tangled": lambda: tokenizer_from_dict(tangled_description(3)),
    }[kind]()
    rng = np.random.default_rng(4)
    # The special token and single bytes more often than the rest.
    high = tokenizer.vocab_size
    ranges = [(high - 3, high), (0, min(high, 257)), (0, high), (0, high)]
    lists = [rng.integers(*ranges[i % 4], n) for i, n in enumerate(rng.integers(0, 24, 60_000))]
    lists += [np.concatenate(four) for four in zip(*[iter(lists[:40_000])] * 4, strict=True)]
    cases = b"".join(struct.pack("<I", len(ids)) + ids.astype("<i4").tobytes() for ids in lists)
    results = Results(run_streams("decode", cases, described(tokenizer, tmp_path)))
    for ids in lists:
        assert results.text().decode() == tokenizer.decode(ids.tolist())
    assert results.done()
    pieces = Results(run_streams("describe", b"", tmp_path / "tokenizer.json")).texts()
    assert pieces == tokenizer.token_bytes


def cut_at_random(raw: bytes | str, rng: np.random.Generator) -> list:
    cuts = sorted(rng.integers(0, len(raw) + 1, rng.integers(0, 6)).tolist())
    return [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)])]


def test_a_stream_of_any_bytes_comes_out_as_from_pythons_decoder():
    rng = np.random.default_rng(6)
    edges = [0, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1]
    edges += [0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    # Every sequence of three edges, whole and byte by byte, then random ones in random pieces.
    every = [bytes(three) for three in itertools.product(edges, repeat=3)]
    cases = [[raw] for raw in every] + [[raw[i : i + 1] for i in range(3)] for raw in every]
    texts = hostile_texts(60_000, seed=8)
    for text in texts:
        raw = bytearray(text.encode())
        for at in rng.integers(0, len(raw), 2) if raw and len(raw) % 2 else ():
            raw[at] = edges[rng.integers(len(edges))]
        if len(raw) % 3 == 0:
            raw += bytes(edges[i] for i in rng.integers(0, len(edges), 6))
        cases.append(cut_at_random(bytes(raw), rng))
    results = Results(run_streams("utf8", b"".join(map(packed_list, cases))))
    for pieces in cases:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        expected = [decoder.decode(piece) for piece in pieces] + [decoder.decode(b"", final=True)]
        assert [text.decode() for text in results.texts()] == expected, pieces
    assert results.done()


def test_stop_texts_are_found_and_held_back_as_python_does():
    rng = np.random.default_rng(9)
    alphabets = [list("ab"), list("aé🙂"), ["🙂", "🙃", "é", "è"], list("ab\n ")]
    cases = []
    for n in range(50_000):
        letters = alphabets[n % len(alphabets)]
        sizes = [*rng.integers(0, 7, rng.integers(0, 4)), rng.integers(0, 30)]
        *stops, text = (
            "".join(letters[i] for i in rng.integers(0, len(letters), size)) for size in sizes
        )
        cases.append((stops, cut_at_random(text, rng)))
    stream = b"".join(packed_list(stops) + packed_list(pieces) for stops, pieces in cases)
    results = Results(run_streams("stop", stream))
    found = 0
    for stops, pieces in cases:
        watch = StopText(stops)
        expected = [watch.feed(piece) for piece in pieces] + [watch.flush()]
        assert [text.decode() for text in results.texts()] == expected, (stops, pieces)
        assert results.number() == watch.found, (stops, pieces)
        found += watch.found
    assert results.done()
    assert 0.2 < found / len(cases) < 0.8


def test_a_stop_text_that_is_not_utf8_is_a_mistake_of_the_user():
    program = native_program("text_streams")
    cases = packed_list([b"\xe2\x82"]) + packed_list(["text"])
    done = subprocess.run([program, "stop"], input=cases, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (2, b"a stop text is not UTF-8\n")


def small_description() -> dict:
    return BPETokenizer.train(iter(["the cat sat on the mat, the dog's 12 cats"]), 270).to_dict()


def loaded(descriptions: Sequence[bytes], text: str = "the cat's hat 12") -> list[list[int] | str]:
    """Ids of the text with every description, or the refusal."""
    results = Results(
        run_streams("load", b"".join(packed(raw) + packed(text) for raw in descriptions))
    )
    outcomes = [results.ids() for _ in descriptions]
    assert results.done()
    return outcomes


def in_python(raw: bytes, text: str = "the cat's hat 12") -> list[int] | None:
    """Ids of the text with a description, or None where Python refuses it."""
    try:
        return tokenizer_from_dict(json.loads(raw)).encode(text)
    except (InputError, ValueError, RecursionError):
        return None


def edited(path: Sequence[str | int], value: object) -> bytes:
    """The small description with one value replaced; `path` begins inside of "tokenizer"."""
    description = small_description()
    place = description["tokenizer"]
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(description).encode()


EDITS = [
    (("model", "dropout"), 0.1, "dropout"),
    (("model", "unk_token"), "a", "unk_token"),
    (("model", "byte_fallback"), True, "byte_fallback"),
    (("model", "ignore_merges"), True, "ignore_merges"),
    (("model", "continuing_subword_prefix"), "##", "continuing_subword_prefix"),
    (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix"),
    (("model", "type"), "WordPiece", "not BPE"),
    (("model", "vocab"), KeyError, "lacks vocab"),
    (("model", "merges"), KeyError, "lacks merges"),
    (("model", "vocab", "a"), 9999, "ids are not"),
    (("model", "vocab", "a"), 70, "ids are not"),
    (("model", "vocab", "a"), -1, "not JSON"),
    (("model", "vocab", "a"), 1.5, "not JSON"),
    (("model", "vocab", "a"), 2**40, "not JSON"),
    (("model", "vocab", "a"), "1", "not JSON"),
    (("model", "vocab", ""), 269, "empty"),
    (("model", "vocab", "日"), 269, "not made of bytes"),
    (("model", "vocab", "\ud800"), 269, "not made of bytes"),
    (("model", "vocab", " "), 269, "not made of bytes"),
    (("model", "vocab", "a"), KeyError, "ids are not"),
    (("model", "merges", 0), ["t", "zz"], "a merge names"),
    (("model", "merges", 0), ["x", "y"], "a merge names"),
    (("model", "merges", 0), ["t"], "not a pair"),
    (("model", "merges", 0), ["t", "h", "e"], "not a pair"),
    (("model", "merges", 0), "t h", "not a pair"),
    (("model", "merges", 0), 7, "not a pair"),
    (("model", "merges"), ["t h", "he"], "not a pair"),
    (("model", "merges"), ["t  h"], "not made of bytes"),
    (("added_tokens",), [], "last token"),
    (("added_tokens", 0, "id"), 3, "last token"),
    (("added_tokens", 0, "content"), "<|end|>", "special token"),
    (("added_tokens", 0, "special"), False, "special token"),
    (("added_tokens", 0, "lstrip"), KeyError, "lacks lstrip"),
    (("added_tokens", 0, "lstrip"), 1, "not JSON"),
    (("normalizer",), {"type": "NFC"}, "normalizer"),
    (("post_processor",), {"type": "TemplateProcessing"}, "not ByteLevel"),
    (("decoder",), {"type": "WordPiece"}, "not ByteLevel"),
    (("decoder", "extra"), True, "extra"),
    (("truncation",), {"max_length": 3}, "truncation"),
    (("padding",), {"pad_id": 3}, "padding"),
    (("pre_tokenizer",), None, "missing"),
    (("pre_tokenizer",), KeyError, "lacks pre_tokenizer"),
    (("pre_tokenizer", "add_prefix_space"), True, "split words"),
    (("pre_tokenizer", "use_regex"), False, "split words"),
    (("pre_tokenizer", "type"), "Whitespace", "not ByteLevel"),
    (("version",), "2.0", "version"),
    (("model",), KeyError, "lacks model"),
]


@pytest.mark.parametrize(("path", "value", "words"), EDITS, ids=lambda part: str(part)[:40])
def test_a_damaged_or_foreign_bpe_description_is_refused_in_words(path, value, words):
    (outcome,) = loaded([edited(path, value)])
    assert isinstance(outcome, str)
    assert words in outcome
    assert "damaged" in outcome


def test_a_byte_without_a_token_is_refused():
    description = small_description()
    vocabulary = description["tokenizer"]["model"]["vocab"]
    vocabulary["zz"] = vocabulary.pop("z")
    (outcome,) = loaded([json.dumps(description).encode()])
    assert outcome == "the bpe tokenizer is damaged: no token stands for the byte 0x7a"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b"null", "unknown kind"),
        (b"7", "unknown kind"),
        (b"{}", "unknown kind"),
        (b'{"kind":"word"}', "unknown kind"),
        (b'{"kind":["char"]}', "unknown kind"),
        (b'{"kind":"char"}', "unknown kind"),
        (b'{"kind":"char","characters":["a"]}', "unknown kind"),
        (b'{"kind":"char","characters":""}', "each of them once"),
        (b'{"kind":"char","characters":"aa"}', "each of them once"),
        (b'{"kind":"char","characters":"\\ud800"}', "U+D800 is half of a character"),
        (b'{"kind":"char","characters":"\xff"}', "not JSON"),
        (b'{"kind":"bpe"}', "unknown kind"),
        (b'{"kind":"bpe","tokenizer":{"version":"1.0"}}', "lacks model"),
        (b'{"kind":"byte"} x', "not JSON"),
        (b'{"kind":"byte","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b'{"kind":"byte","x":01}', "not JSON"),
        (b'{"kind":"byte","x":"\\x"}', "not JSON"),
        (b'{"kind":"byte","x":"\n"}', "not JSON"),
        (b'{"kind":"byte",}', "not JSON"),
        (b'{"kind":"byte","kind":"byte"}', "unknown kind"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_a_hostile_description_is_refused_in_words(raw, words):
    (outcome,) = loaded([raw])
    assert isinstance(outcome, str)
    assert words in outcome


def test_every_form_that_the_library_writes_is_read():
    description = small_description()
    text = "the cat's hat 12"
    expected = tokenizer_from_dict(description).encode(text)
    older = copy.deepcopy(description)
    model = older["tokenizer"]["model"]
    model["merges"] = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    listed = copy.deepcopy(description)
    listed["tokenizer"]["model"]["vocab"][END_OF_TEXT] = 269
    plain = copy.deepcopy(description)
    for key in ("dropout", "unk_token", "byte_fallback", "ignore_merges", "fuse_unk"):
        del plain["tokenizer"]["model"][key]
    plain["tokenizer"]["model"]["continuing_subword_prefix"] = ""
    plain["tokenizer"]["post_processor"] = {
        **plain["tokenizer"]["pre_tokenizer"],
        "type": "ByteLevel",
    }
    forms = [
        canonical_json(description),
        json.dumps(description, ensure_ascii=False).encode(),
        json.dumps(description, indent=2).encode(),
        json.dumps(dict(reversed(description.items()))).encode(),
        json.dumps(older).encode(),
        json.dumps(listed).encode(),
        json.dumps(plain).encode(),
    ]
    assert [in_python(raw, text) for raw in forms] == [expected] * len(forms)
    assert loaded(forms, text) == [expected] * len(forms)


def test_a_truncated_description_is_refused_wherever_it_ends():
    for description in (small_description(), {"kind": "char", "characters": 'aé🙂\n"'}):
        for raw in (
            canonical_json(description),
            json.dumps(description, ensure_ascii=False).encode(),
        ):
            outcomes = loaded([raw[:end] for end in range(len(raw))])
            assert all(isinstance(outcome, str) for outcome in outcomes)


def test_a_changed_description_is_refused_or_means_the_same_as_in_python():
    rng = np.random.default_rng(10)
    whole = canonical_json(small_description())
    pieces = [bytes([value]) for value in b'"[]{},:1\\ th'] + [b"99", b"null"]
    changed = []
    for _ in range(4000):
        raw = bytearray(whole)
        for at in rng.integers(0, len(raw) - 30, rng.integers(1, 3)):
            kind = rng.integers(4)
            if kind == 0:
                raw[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                raw[at : at + int(rng.integers(1, 20))] = b""
            elif kind == 2:
                raw[at:at] = pieces[rng.integers(len(pieces))]
            else:
                raw[at : at + 1] = pieces[rng.integers(len(pieces))]
        changed.append(bytes(raw))
    for _ in range(2000):
        description = json.loads(whole)
        model = description["tokenizer"]["model"]
        merges, vocabulary, names = model["merges"], model["vocab"], list(model["vocab"])
        for _ in range(rng.integers(1, 5)):
            one, two = (names[i] for i in rng.integers(0, len(names), 2))
            i, j = rng.integers(0, len(merges), 2).tolist()
            kind = rng.integers(5)
            if kind == 0:
                vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
            elif kind == 1:
                merges[i], merges[j] = merges[j], merges[i]
            elif kind == 2:
                merges.insert(i, list(merges[j]))
            elif kind == 3:
                merges[i] = [merges[i][0], merges[j][1]]
            else:
                merges.pop(i)
        changed.append(json.dumps(description).encode())
    outcomes = loaded(changed)
    accepted = [
        (raw, ids) for raw, ids in zip(changed, outcomes, strict=True) if isinstance(ids, list)
    ]
    for raw, ids in accepted:
        assert in_python(raw) == ids, raw
    # Both outcomes have to occur, or nothing was compared.
    assert 500 < len(accepted) < len(changed) - 1000


def test_the_unicode_tables_are_what_the_library_and_python_say():
    path = ROOT / "csrc" / "engine" / "make_unicode_tables.py"
    spec = importlib.util.spec_from_file_location("make_unicode_tables", path)
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    header = (path.parent / "unicode_tables.h").read_text()
    assert tables.class_table() in header
    if f"Unicode {unicodedata.unidata_version}," in header:
        assert tables.printable_table() in header
    else:
        # A newer Python knows more characters, never fewer.
        numbers = header.split("kPrintable[] = {")[1].split("}")[0].split(",")
        edges = [int(number, 16) for number in numbers] + [sys.maxunicode + 1]
        for first, last in zip(edges[1::2], edges[2::2], strict=False):
            assert all(chr(code).isprintable() for code in range(first, last))


def test_a_vocabulary_of_gpt2s_size_loads_in_little_time(tmp_path):
    rng = np.random.default_rng(11)
    letters = np.array(list("etaoinshrdlu"))
    parts = ["".join(rng.choice(letters, n).tolist()) for n in rng.integers(1, 5, 4000)]
    words = [
        " ".join("".join(parts[i] for i in four) for four in rng.integers(0, 4000, (60, 3)))
        for _ in range(1000)
    ]
    tokenizer = BPETokenizer.train(iter(words), 50_257)
    assert tokenizer.vocab_size == 50_257
    text = tmp_path / "text"
    text.write_text(words[0])
    figures = json.loads(run_streams("bench", str(text).encode(), described(tokenizer, tmp_path)))
    # Around 8 ms where nothing else runs; the margin is for a busy machine.
    assert figures["load_ms"] < 40
    assert_encodes_alike(tokenizer, words, tmp_path)
