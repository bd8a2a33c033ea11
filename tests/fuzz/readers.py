"""The readers of the package, and inputs to begin with."""

import dataclasses
import gzip
import io
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from nanogpt import checkpoint, cli, metadata
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.errors import InputError
from nanogpt.explore.fields import describe_fields
from nanogpt.explore.reading import read_records
from nanogpt.explore.serialising import parse, serialise
from nanogpt.model import GPT
from nanogpt.reward_data import read_reward_data
from nanogpt.terms import read_terms
from nanogpt.tokenizer import BPETokenizer, CharTokenizer, RecordTokenizer, tokenizer_from_dict

from .loop import Reader

_JSON = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"null", b"true", b"NaN", b"Infinity"),
    *(b"1e999", b"-0", b"9" * 400, b"9" * 5000, b"\\u0000", b"\\ud800", b'{"a":', b'""', b"\n"),
    *(b"\xff", b"\xef\xbb\xbf", b"\0", b"\xe2\x80\xa8"),
)
_TEXT = (b"|", b"\n", b"\r\n", b"\r", b" ", b"\t", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe")
_NUMBERS = (b"nan", b"-inf", b"1e400", b"-1", b"0x1", b"1_0", b"9" * 5000, "²".encode(), b".5")
_TABLE = (*_TEXT, *_NUMBERS, b",", b";", b'"', b"'", b'""', b",,,", b"a", b"1", b"\x1f\x8b")
_YAML = (
    *(b": ", b"- ", b"\n", b"  ", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"!!python/name:os.x "),
    *(b"!!int ", b"!!float ", b"!!timestamp ", b"!!binary ", b"<<: ", b"? ", b"|", b">", b"#"),
    *(b"2001-13-45", b"1:99", b"0b", b"0o9", b".inf", b".nan", b"~", b"yes", b"9" * 5000, b'"'),
    *(b"seed: 1\n", b"text: [a, b]\n", b"%TAG ", b"---\n", b"...\n", b"\t", b"\0", b"\xff", b"@"),
)


def _rewards(suffix: str) -> Reader:
    seeds = {
        ".txt": [
            b"a good text|1\na bad one|-0.5\n\nthe bar | inside|2e-3\n",
            b"\xef\xbb\xbfx|1\r\ny|+.5\r\n",
        ],
        ".jsonl": [
            b'{"text": "a", "reward": 1}\n{"text": "\\u00e9", "reward": -0.5, "group": 3}\n',
            b'{"prompt": "p", "completion": "c", "reward": 1e3, "group": "g"}\n',
        ],
        ".csv": [
            b'text,reward\r\n"a, ""b""",1\r\nc,-2\r\n',
            b'prompt,completion,reward,group\np,"c\nd",0.5,g\n',
        ],
    }[suffix]
    pieces = {".txt": (*_TEXT, *_NUMBERS), ".jsonl": (*_JSON, b'"reward":'), ".csv": _TABLE}
    return Reader(f"rewards {suffix}", suffix, read_reward_data, seeds, pieces[suffix])


def _read_table(path: Path) -> None:
    records = read_records(path)
    describe_fields(records)
    for record in records[:5]:
        assert parse(serialise(record)) == record, "a record is not what it was"


_CSV = [
    b"a,b,c\n1,x,\n2,y,3.5\n3,x,0\n",
    b"a;b\n'1';'x'\n'2';'y;z'\n",
    b"a\tb\n1\t2\n3\t4\n",
    b'"a","b"\r\n"1","say ""so"""\r\n"2","two\nlines"\r\n',
    "é|b\nü|\n".encode("utf-16"),
    b"1,2\n3,4\n5,6\n",
]
_JSONL = [
    b'{"a": 1, "b": {"c": "x", "d": null}, "e": [1, "y"]}\n{"a": 2.50, "b": {}}\n',
    b'[{"a": "x"}, {"a": NaN, "b": true}]',
]


def _tables() -> list[Reader]:
    logs = [b"one line\nanother line\n\nthe third\n", gzip.compress(_CSV[0], mtime=0)]
    return [
        Reader("table .csv", ".csv", _read_table, _CSV, _TABLE),
        Reader("table .jsonl", ".jsonl", _read_table, _JSONL, _JSON),
        Reader("table of any kind", ".dat", _read_table, [*_CSV, *_JSONL, *logs], _TABLE + _JSON),
    ]


def _read_metadata(path: Path) -> None:
    try:
        content = metadata.from_bytes(path.read_bytes())
    except ValueError as error:
        raise InputError(str(error)) from None
    metadata.verify(content, {})


def _read_tokenizer(path: Path) -> None:
    try:
        description = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise InputError("not JSON") from None
    tokenizer = tokenizer_from_dict(description)
    for text in ("the cat", "a\x1fx\x1eb\x1fab\x1e", "é🙂"):
        try:
            ids = tokenizer.encode(text)
        except InputError:
            continue
        assert all(0 <= token < tokenizer.vocab_size for token in ids), "no token of the vocabulary"
        tokenizer.decode(ids)
    again = tokenizer_from_dict(tokenizer.to_dict())
    assert again.token_bytes == tokenizer.token_bytes, "a description describes something else"


@cache
def _tiny() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=3, block_size=2, n_layer=1, n_head=1, n_embd=2))
    model.tokenizer = CharTokenizer("ab")
    return model.eval()


def _files(suffix: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{suffix}"
        checkpoint.save(_tiny(), path)
        return [path.read_bytes()]


def _mend_header(raw: bytes) -> bytes:
    """The header of a .safetensors file ends at the last brace before the tensors."""
    end = raw.rfind(b"}") + 1
    return (end - 8).to_bytes(8, "little") + raw[8:] if end > 8 else raw


def _read_sealed(path: Path) -> None:
    """Metadata that says what it likes, with check sums that fit, in a whole model file."""
    raw = path.read_bytes()
    tensors = {k: v for k, v in _tiny().state_dict().items() if k != metadata.KEY}
    try:
        content = metadata.seal(json.loads(raw), tensors)
        raw = metadata.canonical_json(content)
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        content = None  # it is written as it stands
    if len(raw) % 2:
        buffer = io.BytesIO()
        extra = torch.frombuffer(bytearray(raw or b" "), dtype=torch.uint8)
        torch.save({**tensors, metadata.KEY: extra}, buffer)
        file = path.with_suffix(".pth")
        file.write_bytes(buffer.getvalue())
    else:
        text = raw.decode(errors="replace")
        file = path.with_suffix(".safetensors")
        file.write_bytes(safetensors.torch.save(tensors, metadata={"nanogpt": text}))
    checkpoint.load(file)


def _sealed_seeds() -> list[bytes]:
    described = _tiny().describe()
    return [metadata.canonical_json({**described, "calibration_temperature": value})
            for value in (None, 1.25)]  # fmt: skip


def _read_config(path: Path) -> None:
    TrainConfig(**cli._read_config_file(str(path), TrainConfig))


def make_readers() -> list[Reader]:
    """One of every kind."""
    record = RecordTokenizer([("a", ["x", "y"]), ("b", [])], CharTokenizer("abxy"), {"v": 1})
    bpe = BPETokenizer.train(iter(["the the cat"]), 259)
    tokenizers = [
        metadata.canonical_json(each)
        for each in (CharTokenizer("abé🙂").to_dict(), {"kind": "byte"}, record.to_dict())
    ]
    words = (b'"kind"', b'"bpe"', b'"record"', b'"fields"', b'"base"', b'"tokenizer"')
    names = [entry.name.encode() for entry in dataclasses.fields(TrainConfig)]
    yaml = [
        b"n-layer: 2\nn_head: 2\ntext: [a.txt, b.txt]\nlearning-rate: 1e-3\n",
        b"--seed: 7\ncompile: false\ndropout: 0.1 # a note\n",
        b"{seed: 1, bias: true}\n",
        b"base: &b\n  seed: 1\n<<: *b\n",
    ]
    sealed = _sealed_seeds()
    return [
        *(_rewards(suffix) for suffix in (".txt", ".jsonl", ".csv")),
        *_tables(),
        Reader("metadata", ".json", _read_metadata, sealed, _JSON),
        Reader("tokenizer description", ".json", _read_tokenizer, tokenizers, (*_JSON, *words)),
        Reader(
            "tokenizer bpe", ".json", _read_tokenizer, [metadata.canonical_json(bpe.to_dict())],
            (*_JSON, b"Replace", b'"Regex"', b"(a*)*b", b"ByteLevel", b"Strip"),
        ),
        Reader("config", ".yaml", _read_config, yaml, (*_YAML, *names)),
        Reader("terms", ".txt", lambda path: read_terms(str(path), "--terms"),
               [b"one\ntwo words\n", b"\xc3\xa9\r\n"], _TEXT),
        Reader("model .safetensors", ".safetensors", checkpoint.load, _files(".safetensors"),
               _JSON, _mend_header),
        Reader("model .pth", ".pth", checkpoint.load, _files(".pth"), (b"PK\3\4", b"PK\1\2")),
        Reader("sealed metadata", ".json", _read_sealed, sealed,
               (*_JSON, b'"n_head":0', b'"dropout":2', b'"bias":null', b'"rotary":true', *words)),
    ]  # fmt: skip


def named(name: str) -> Any:
    """The reader of that name. Raises: KeyError."""
    return {reader.name: reader for reader in make_readers()}[name]
