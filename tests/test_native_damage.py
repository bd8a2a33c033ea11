"""Model files that contradict themselves: wrong indexes, zip headers and .safetensors headers."""

import dataclasses
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from native_archives import (
    COMMENT_BYTES,
    INDEX,
    TINY,
    Zip,
    archive,
    payloads,
    rewritten,
    tensors_for,
    without_comment,
    write_archive,
)
from native_outcomes import (
    assert_refused,
    outcome_of,
)

from nanogpt.metadata import canonical_json, seal
from nanogpt.tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def good(folder: Path) -> Path:
    """A small archive that has everything: biases, int8, tokenizer, calibration."""
    config = dataclasses.replace(TINY, bias=True)
    tokenizer = CharTokenizer('ab"\\').to_dict()
    return write_archive(
        folder / "good.pt", config, "int8", tokenizer=tokenizer, calibration_temperature=1.25
    )


WTE, QKV = "transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"
Index = dict[str, Any]


def _set(*path: str, to: Any) -> Callable[[Index], None]:
    def change(index: Index) -> None:
        for name in path[:-1]:
            index = index[name]
        index[path[-1]] = to

    return change


def _drop(*path: str) -> Callable[[Index], None]:
    def change(index: Index) -> None:
        for name in path[:-1]:
            index = index[name]
        del index[path[-1]]

    return change


def _swap(first: str, second: str) -> Callable[[Index], None]:
    def change(index: Index) -> None:
        a, b = index["tensors"][first], index["tensors"][second]
        a["record"], b["record"] = b["record"], a["record"]

    return change


def _rename(old: str, new: str) -> Callable[[Index], None]:
    def change(index: Index) -> None:
        index["tensors"][new] = index["tensors"].pop(old)

    return change


def _share(index: Index) -> None:
    norms = index["tensors"]
    norms["transformer.h.0.ln_1.weight"]["record"] = norms["transformer.ln_f.weight"]["record"]


def _text(pattern: str, replacement: str) -> Callable[[Index], bytes]:
    """Changes the text of the index, where a dict cannot hold the damage."""

    def change(index: Index) -> bytes:
        text = canonical_json(index).decode()
        changed = re.sub(pattern, lambda _: replacement, text, count=1)
        assert changed != text
        return changed.encode("utf-8", "surrogateescape")

    return change


def _whole(text: bytes) -> Callable[[Index], bytes]:
    return lambda index: text


INDEX_DAMAGE: dict[str, tuple[Callable[[Index], Any], str]] = {
    "another format": (_set("format", to="nanogpt-torchscript-2"), "has the format"),
    "a format that is no text": (_set("format", to=1), "'format'"),
    "no format": (_drop("format"), "lacks 'format'"),
    "no config": (_drop("config"), "lacks 'config'"),
    "a config that is a list": (_set("config", to=[]), "'config'"),
    "no tokenizer": (_drop("tokenizer"), "lacks 'tokenizer'"),
    "a tokenizer that is a text": (_set("tokenizer", to="char"), "'tokenizer'"),
    "no tensors": (_drop("tensors"), "lacks 'tensors'"),
    "tensors that are null": (_set("tensors", to=None), "'tensors'"),
    "an empty index": (_set("tensors", to={}), "is missing"),
    "no temperature": (_drop("calibration_temperature"), "lacks 'calibration_temperature'"),
    "a temperature of zero": (_set("calibration_temperature", to=0), "positive"),
    "a negative temperature": (_set("calibration_temperature", to=-1.5), "positive"),
    "a temperature that is true": (_set("calibration_temperature", to=True), "positive"),
    "an infinite temperature": (
        _text(r'"calibration_temperature":null', '"calibration_temperature":1e999'),
        "not JSON",
    ),
    "a temperature that is NaN": (
        _text(r'"calibration_temperature":null', '"calibration_temperature":NaN'),
        "not JSON",
    ),
    "an unknown quantization": (_set("quantize", to="int4"), "'int4'"),
    "another quantization": (_set("quantize", to="bf16"), "bfloat16"),
    "a vocabulary of none": (_set("config", "vocab_size", to=0), "vocab_size"),
    "a huge vocabulary": (_set("config", "vocab_size", to=2**62), "vocab_size"),
    "a size beyond 64 bits": (_set("config", "vocab_size", to=2**64), "'vocab_size'"),
    "a size with the sign bit": (_set("config", "vocab_size", to=2**63), "'vocab_size'"),
    "a negative size": (_set("config", "n_layer", to=-1), "'n_layer'"),
    "a size with a fraction": (_set("config", "n_embd", to=4.0), "'n_embd'"),
    "a size that is a text": (_set("config", "n_embd", to="4"), "'n_embd'"),
    "a size that is true": (_set("config", "n_layer", to=True), "'n_layer'"),
    "a missing size": (_drop("config", "block_size"), "lacks 'block_size'"),
    "an unknown field": (_set("config", "rope", to=True), "'rope'"),
    "a bias that is a number": (_set("config", "bias", to=1), "'bias'"),
    "a rotary that is a text": (_set("config", "rotary", to="yes"), "'rotary'"),
    "a qk_norm that is null": (_set("config", "qk_norm", to=None), "'qk_norm'"),
    "rotary positions beside learned ones": (
        _set("config", "rotary", to=True),
        "'transformer.wpe.weight' belongs to no part of the model",
    ),
    "dropout of one": (_set("config", "dropout", to=1.0), "'dropout'"),
    "heads that do not divide": (_set("config", "n_head", to=3), "n_head"),
    "more heads than width": (_set("config", "n_head", to=8), "n_head"),
    "a block too many": (_set("config", "n_layer", to=2), "transformer.h.1.ln_1.weight is missing"),
    "very many blocks": (_set("config", "n_layer", to=2**40), "n_layer"),
    "another width": (_set("config", "n_embd", to=8), "shape"),
    "a longer context": (_set("config", "block_size", to=5), "transformer.wpe.weight"),
    "biases that are not there": (_set("config", "bias", to=True), ".bias is missing"),
    "a missing tensor": (_drop("tensors", QKV), f"{QKV} is missing"),
    "a tensor of another name": (
        _rename("transformer.ln_f.weight", "transformer.ln_g.weight"),
        "transformer.ln_f.weight is missing",
    ),
    "a record that is not there": (_set("tensors", WTE, "record", to="constants/99"), "99'"),
    "a record above the folder": (_set("tensors", WTE, "record", to="../x"), "'../x'"),
    "an empty record": (_set("tensors", WTE, "record", to=""), "''"),
    "a record that is a number": (_set("tensors", WTE, "record", to=3), "'record'"),
    "no record": (_drop("tensors", WTE, "record"), "lacks 'record'"),
    "a record of another size": (_set("tensors", WTE, "record", to="version"), "bytes instead of"),
    "a record of code": (_set("tensors", WTE, "record", to="code/x.py"), "code/x.py"),
    "two tensors in one record": (_share, "belongs to two tensors"),
    "two tensors of one size swapped": (
        _swap("transformer.h.0.ln_1.weight", "transformer.ln_f.weight"),
        "check sum",
    ),
    "an unknown dtype": (_set("tensors", WTE, "dtype", to="float16"), "'float16'"),
    "another dtype": (_set("tensors", WTE, "dtype", to="bfloat16"), "shape"),
    "a shape with a larger product": (_set("tensors", WTE, "shape", to=[5, 5]), "shape"),
    "a shape with a smaller product": (_set("tensors", WTE, "shape", to=[5, 3]), "shape"),
    "a turned shape": (_set("tensors", WTE, "shape", to=[4, 5]), "shape (4, 5) instead of (5, 4)"),
    "a flat shape": (_set("tensors", WTE, "shape", to=[20]), "shape (20)"),
    "no shape": (_drop("tensors", WTE, "shape"), "lacks 'shape'"),
    "an empty shape": (_set("tensors", WTE, "shape", to=[]), "shape"),
    "a shape of nine sizes": (_set("tensors", WTE, "shape", to=[1] * 9), "'shape'"),
    "a shape of zeros": (_set("tensors", WTE, "shape", to=[0, 4]), "shape"),
    "a negative shape": (_set("tensors", WTE, "shape", to=[-5, -4]), "'shape'"),
    "a shape whose product overflows to the right one": (
        _set("tensors", WTE, "shape", to=[2**32, 2**32, 5, 4]),
        "shape",
    ),
    "a shape whose bytes overflow": (_set("tensors", WTE, "shape", to=[2**62, 4]), "shape"),
    "lying bytes": (_set("tensors", WTE, "bytes", to=84), "shape"),
    "huge bytes": (_set("tensors", WTE, "bytes", to=2**63 - 1), "shape"),
    "another check sum": (_set("tensors", WTE, "crc32", to="00000000"), WTE),
    "a check sum in capitals": (_set("tensors", WTE, "crc32", to="ABCDEF01"), "hexadecimal"),
    "a short check sum": (_set("tensors", WTE, "crc32", to="abc"), "hexadecimal"),
    "a check sum that is a number": (_set("tensors", WTE, "crc32", to=12345678), "'crc32'"),
    "an unknown member": (_set("tensors", WTE, "strides", to=[1, 5]), "'strides'"),
    "an entry that is a list": (_set("tensors", WTE, to=[]), WTE),
    "a record whose name would colour the terminal": (
        _set("tensors", WTE, "record", to="\n\x1b[31m"),
        "no record '\\x0a\\x1b[31m'",
    ),
    "a member twice": (_text(r'"bias":false', '"bias":false,"bias":false'), "'bias' twice"),
    "a member twice in other letters": (
        _text(r'"bias":false', '"bias":false,"bi\\u0061s":true'),
        "'bias' twice",
    ),
    "a second index": (_text(r'"tensors":', '"tensors":{},"tensors":'), "'tensors' twice"),
    "a second index in other letters": (
        _text(r'"tensors":', '"t\\u0065nsors":{},"tensors":'),
        "'tensors' twice",
    ),
    "a second tokenizer in other letters": (
        _text(r'"tokenizer":', '"tok\\u0065nizer":{},"tokenizer":'),
        "'tokenizer' twice",
    ),
    "an unfinished text": (_text(r'"tokenizer":null\}', '"tokenizer":"'), "not JSON"),
    "an unfinished escape": (_text(r'"tokenizer":null', '"tokenizer":"\\u12"'), "not JSON"),
    "an unknown escape": (_text(r'"tokenizer":null', '"tokenizer":"\\x"'), "not JSON"),
    "a line break in a text": (_text(r'"tokenizer":null', '"tokenizer":"\n"'), "not JSON"),
    "a name that is not UTF-8": (_text(WTE, "transformer.wte.weigh\udcff"), "not JSON"),
    "a number with a zero before": (_text(r'"n_layer":1', '"n_layer":01'), "not JSON"),
    "a number with a plus": (_text(r'"n_layer":1', '"n_layer":+1'), "not JSON"),
    "a number in hexadecimal": (_text(r'"n_layer":1', '"n_layer":0x1'), "not JSON"),
    "a comma too many": (_text(r'"n_layer":1', '"n_layer":1,'), "not JSON"),
    "a comment": (_text(r'"n_layer":1', '"n_layer":/**/1'), "not JSON"),
    "something after it": (_text(r"\}$", "}}"), "not JSON"),
    "a zero byte after it": (_text(r"\}$", "}\0"), "not JSON"),
    "nothing": (_whole(b""), "not JSON"),
    "white space": (_whole(b" \n\t"), "not JSON"),
    "a list": (_whole(b"[]"), "not JSON"),
    "null": (_whole(b"null"), "not JSON"),
    "a byte order mark": (_text("^", "\ufeff"), "not JSON"),
    "deep lists": (_text(r'"tokenizer":null', '"tokenizer":' + "[" * 100_000), "deeper"),
    "deep objects": (_text(r'"tokenizer":null', '"tokenizer":' + '{"a":' * 100_000), "deeper"),
    "deep and complete": (
        _text(r'"tokenizer":null', '"tokenizer":{"a":' + "[" * 64 + "]" * 64 + "}"),
        "deeper",
    ),
    "deep in the config": (
        _text(r'"n_layer":1', '"n_layer":' + "[" * 1000 + "]" * 1000),
        "deeper",
    ),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_a_wrong_index_is_refused(damage: str, tmp_path: Path) -> None:
    change, phrase = INDEX_DAMAGE[damage]
    path = tmp_path / "m.pt"
    # The comment is right each time, so that nothing but the index itself is to blame.
    path.write_bytes(archive(tensors_for(TINY), TINY, change=change))
    found = outcome_of(path)
    assert_refused(found, str(path), phrase)
    assert found.sentence.isprintable()


def test_a_tensor_that_belongs_to_no_part_of_the_model_is_refused(tmp_path: Path) -> None:
    deeper = dataclasses.replace(TINY, n_layer=2)
    path = tmp_path / "m.pt"
    path.write_bytes(archive(tensors_for(deeper), TINY))
    assert_refused(outcome_of(path), "transformer.h.1.", "belongs to no part of the model")


@pytest.mark.parametrize("lie", ["none", "bf16", "int8"])
@pytest.mark.parametrize("quantize", ["none", "bf16", "int8"])
def test_tensors_of_another_precision_than_the_file_names_are_refused(
    quantize: str, lie: str, tmp_path: Path
) -> None:
    path = write_archive(tmp_path / "m.pt", TINY, quantize, change=_set("quantize", to=lie))
    found = outcome_of(path)
    if quantize == lie:
        assert found.code == 0, found.sentence
    else:
        assert_refused(found, f"'{lie}' asks for")


def test_scales_of_an_int8_matrix_have_to_be_there(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.pt", TINY, "int8", change=_drop("tensors", f"{QKV}.scale"))
    assert_refused(outcome_of(path), f"the tensor {QKV}.scale is missing")


def test_an_index_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    many = b'{"tokenizer":null,"tensors":[' + b"0," * 9_000_000 + b"0]}"
    path = tmp_path / "m.pt"
    path.write_bytes(archive(tensors_for(TINY), TINY, change=_whole(many)))
    assert_refused(outcome_of(path), "too many to be ours")


def test_json_as_deep_as_is_allowed_is_read(tmp_path: Path) -> None:
    # The index, the tokenizer and 62 lists.
    text = _text(r'"tokenizer":null', '"tokenizer":{"a":' + "[" * 62 + "]" * 62 + "}")
    path = tmp_path / "m.pt"
    path.write_bytes(archive(tensors_for(TINY), TINY, change=text))
    assert outcome_of(path).code == 0, outcome_of(path).sentence


def test_white_space_and_escapes_that_mean_the_same_are_read(tmp_path: Path) -> None:
    def spread(index: Index) -> bytes:
        return b" \n" + json.dumps(index, indent="\t ").encode() + b"\r\n"

    path = tmp_path / "m.pt"
    path.write_bytes(archive(tensors_for(TINY), TINY, tokenizer={"a": []}, change=spread))
    assert outcome_of(path).code == 0, outcome_of(path).sentence


def _end(offset: int, layout: str, *values: Any) -> Callable[[Zip], None]:
    return lambda file: file.put(file.end + offset, layout, *values)


def _end64(offset: int, layout: str, *values: Any) -> Callable[[Zip], None]:
    return lambda file: file.put(file.end64 + offset, layout, *values)


def _first(which: str, offset: int, layout: str, *values: Any) -> Callable[[Zip], None]:
    def change(file: Zip) -> None:
        starts = {"central": file.central, "local": file.local}[which]
        file.put(starts[file.tensors[0]] + offset, layout, *values)

    return change


def _both(central: int, local: int, layout: str, *values: Any) -> Callable[[Zip], None]:
    def change(file: Zip) -> None:
        _first("central", central, layout, *values)(file)
        _first("local", local, layout, *values)(file)

    return change


def _same_place(file: Zip) -> None:
    first, second = file.tensors[:2]
    file.put(file.central[second] + 42, "L", file.local[first])


def _inside(file: Zip) -> None:
    # A whole record inside the payload of another.
    first, second = file.tensors[:2]
    file.put(file.central[second] + 42, "L", file.places[first][0])


def _longer(file: Zip) -> None:
    # Sizes that agree everywhere, but reach over the next record.
    name = file.tensors[0]
    size = file.places[name][1] + 1000
    file.put(file.central[name] + 20, "2L", size, size)
    file.put(sum(file.places[name]) + 8, "2L", size, size)


def _one_name(file: Zip) -> None:
    first, second = [name for name in file.tensors if len(name) == len("constants/1")][:2]
    for start, names in ((file.central[second], 46), (file.local[second], 30)):
        file.put(start + names, f"{len('archive/' + first)}s", f"archive/{first}".encode())


def _descriptor(offset: int, layout: str, *values: Any) -> Callable[[Zip], None]:
    return lambda file: file.put(sum(file.places[file.tensors[0]]) + offset, layout, *values)


ZIP_DAMAGE: dict[str, tuple[Callable[[Zip], None], str]] = {
    "two disks": (_end(4, "H", 1), "several disks"),
    "a directory on another disk": (_end(6, "H", 1), "several disks"),
    "fewer entries in the end record": (_end(10, "H", 3), "does not agree"),
    "more entries on this disk": (_end(8, "H", 999), "does not agree"),
    "another size in the end record": (_end(12, "L", 46), "does not agree"),
    "another offset in the end record": (_end(16, "L", 0), "does not agree"),
    "a huge count": (_end64(24, "2Q", 2**40, 2**40), "does not agree"),
    "a count beyond every number": (_end64(24, "2Q", 2**64 - 1, 2**64 - 1), "does not agree"),
    "two counts": (_end64(24, "Q", 5), "two numbers of entries"),
    "a huge directory": (_end64(40, "Q", 2**63), "does not agree"),
    "a directory far away": (_end64(48, "Q", 2**64 - 50), "does not agree"),
    "a long 64-bit record": (_end64(4, "Q", 2**64 - 1), "is not where"),
    "another 64-bit record": (_end64(0, "4s", b"PK\6\5"), "is not where"),
    "a locator elsewhere": (_end64(56 + 8, "Q", 0), "wrong place"),
    "a locator beyond the file": (_end64(56 + 8, "Q", 2**64 - 1), "wrong place"),
    "two disks in the locator": (_end64(56 + 16, "L", 2), "several disks"),
    "no locator": (_end64(56, "4s", b"\0\0\0\0"), "wrong place"),
    "no entry's signature": (_first("central", 0, "4s", b"PK\1\3"), "something else than entries"),
    "another version": (_first("central", 6, "H", 45), "does not agree with the directory"),
    "encryption": (_both(8, 6, "H", 0x0809), "flags"),
    "other flags": (_first("local", 6, "H", 0x0800), "does not agree with the directory"),
    "an unknown method": (_both(10, 8, "H", 12), "unknown way"),
    "another method in the header": (_first("local", 8, "H", 8), "does not agree"),
    "another time": (_first("local", 10, "L", 77), "does not agree"),
    "another sum in the directory": (_first("central", 16, "L", 77), "other sizes after it"),
    "a sum in the header": (_first("local", 14, "L", 77), "other sizes in its own header"),
    "two sizes": (_first("central", 20, "L", 7), "two sizes"),
    "smaller sizes": (_first("central", 20, "2L", 7, 7), "other sizes after it"),
    "huge sizes": (_first("central", 20, "2L", 2**32 - 2, 2**32 - 2), "reaches into"),
    "64-bit sizes that are not there": (
        _first("central", 20, "2L", 2**32 - 1, 2**32 - 1),
        "field of 64-bit sizes is cut short",
    ),
    "a long name": (_both(28, 26, "H", 0xFFFF), "outside of the file"),
    "a short name in the header": (_first("local", 26, "H", 3), "does not agree"),
    "a long extra field": (_first("central", 30, "H", 0xFFFF), "outside of the file"),
    "another extra field": (_first("local", 28, "H", 0), "has other sizes after it"),
    "an extra field that is cut": (_first("local", 28, "H", 6), "outside of the file"),
    "a huge extra field": (_first("local", 28, "H", 0xFFFF), "outside of the file"),
    "a comment on an entry": (_first("central", 32, "H", 1), "comment on an entry"),
    "an entry on another disk": (_first("central", 34, "H", 1), "several disks"),
    "a record elsewhere": (_first("central", 42, "L", 0), "overlaps another or leaves a gap"),
    "a record behind the file": (_first("central", 42, "L", 2**32 - 2), "overlaps another"),
    "two records in one place": (_same_place, "overlaps another or leaves a gap"),
    "a record inside another": (_inside, "overlaps another or leaves a gap"),
    "a record over the next": (_longer, "other sizes after it"),
    "two records of one name": (_one_name, "is there twice"),
    "no header": (_first("local", 0, "4s", b"PK\3\5"), "no header of its own"),
    "another name in the header": (_first("local", 30, "7s", b"brchive"), "another name"),
    "another folder": (
        _first("central", 46, "7s", b"brchive"),
        "outside of the archive's folder",
    ),
    "no descriptor": (_descriptor(0, "4s", b"\0\0\0\0"), "other sizes after it"),
    "another sum in the descriptor": (_descriptor(4, "L", 77), "other sizes after it"),
    "another size in the descriptor": (_descriptor(12, "L", 77), "other sizes after it"),
}


@pytest.mark.parametrize("damage", ZIP_DAMAGE)
def test_a_zip_file_that_contradicts_itself_is_refused(
    damage: str, good: Path, tmp_path: Path
) -> None:
    change, phrase = ZIP_DAMAGE[damage]
    file = Zip(good)
    assert file.sealed() == file.good
    change(file)
    assert file.sealed() != file.good
    path = tmp_path / "m.pt"
    path.write_bytes(file.sealed())
    assert_refused(outcome_of(path), str(path), phrase)


def test_an_archive_written_by_another_program_is_read_too(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(rewritten(good.read_bytes()))
    assert outcome_of(path).code == 0, outcome_of(path).sentence


def test_tensors_have_to_be_stored_aligned_and_whole(good: Path, tmp_path: Path) -> None:
    raw = good.read_bytes()
    path = tmp_path / "m.pt"
    where = payloads(without_comment(raw))
    record = json.loads(raw[where[INDEX][0] : sum(where[INDEX])])["tensors"][WTE]["record"]

    path.write_bytes(rewritten(raw, compressed=record))
    assert_refused(outcome_of(path), record, "is compressed")
    path.write_bytes(rewritten(raw, compressed=INDEX))
    assert_refused(outcome_of(path), INDEX, "is compressed")
    path.write_bytes(rewritten(raw, aligned=False))
    assert_refused(outcome_of(path), "is not aligned to 64 bytes")

    def shorter(name: str, payload: bytes) -> tuple[str, bytes]:
        return name, payload[:-1] if name == record else payload

    path.write_bytes(rewritten(raw, shorter))
    assert_refused(outcome_of(path), record, "has 19 bytes instead of 20")

    def longer(name: str, payload: bytes) -> tuple[str, bytes]:
        return name, payload + b"\0" if name == record else payload

    path.write_bytes(rewritten(raw, longer))
    assert_refused(outcome_of(path), record, "has 21 bytes instead of 20")

    def renamed(name: str, payload: bytes) -> tuple[str, bytes]:
        return "constants/none" if name == record else name, payload

    path.write_bytes(rewritten(raw, renamed))
    assert_refused(outcome_of(path), f"there is no record '{record}'")


@pytest.mark.parametrize(
    "comment",
    [
        b"",
        b"nanogpt-crc32:0123456",
        b"nanogpt-crc32:012345678",
        b"nanogpt-crc32:0123456g",
        b"nanogpt-crc32:ABCDEF01",
        b"nanogpt-crc32 01234567",
        b"another program's own.",
    ],
)
def test_a_missing_or_malformed_check_sum_is_refused(
    comment: bytes, good: Path, tmp_path: Path
) -> None:
    raw = without_comment(good.read_bytes())
    path = tmp_path / "m.pt"
    path.write_bytes(raw[:-2] + len(comment).to_bytes(2, "little") + comment)
    own = len(comment) in (0, COMMENT_BYTES)
    assert_refused(outcome_of(path), "does not end with its" if own else "does not end as")


def test_a_check_sum_of_another_file_is_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(good.read_bytes()[:-8] + b"01234567")
    assert_refused(outcome_of(path), "does not match its check sum")


def _safetensors(
    change: Callable[[dict[str, Any], dict[str, Any]], Any] | None = None,
    text: Callable[[str], str] = lambda header: header,
    payload: Callable[[bytes], bytes] = lambda raw: raw,
    length: int | None = None,
) -> bytes:
    """A model file made by hand: `change` gets the header and the sealed metadata."""
    tensors = dict(sorted(tensors_for(TINY).items()))
    content: dict[str, Any] = {
        "config": dataclasses.asdict(TINY),
        "tokenizer": None,
        "calibration_temperature": None,
    }
    metadata = seal(content, tensors)
    header: dict[str, Any] = {}
    raw = b""
    for name, tensor in tensors.items():
        size = 4 * tensor.numel()
        offsets = [len(raw), len(raw) + size]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        raw += tensor.numpy().tobytes()
    if change is not None:
        change(header, metadata)
    header.setdefault("__metadata__", {"nanogpt": canonical_json(metadata).decode()})
    written = text(json.dumps(header)).encode()
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written) if length is None else length) + written + payload(raw)


def _entry(name: str, field: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, metadata: header[name].__setitem__(field, value)


def _told(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, metadata: metadata.__setitem__(name, value)


def _metadata(value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, metadata: header.__setitem__("__metadata__", value)


SAFETENSORS_DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "a header of no length": ({"length": 0}, "not JSON"),
    "a header longer than the file": ({"length": 10**6}, "impossible length"),
    "a header of a huge length": ({"length": 2**64 - 1}, "impossible length"),
    "another dtype": ({"change": _entry(WTE, "dtype", "BF16")}, "'BF16'"),
    "a dtype that is a number": ({"change": _entry(WTE, "dtype", 32)}, "'dtype'"),
    "offsets that overlap": ({"change": _entry(WTE, "data_offsets", [0, 80])}, "overlaps"),
    "offsets outside": ({"change": _entry(WTE, "data_offsets", [0, 2**40])}, "outside"),
    "offsets that turn back": ({"change": _entry(WTE, "data_offsets", [80, 0])}, "outside"),
    "negative offsets": ({"change": _entry(WTE, "data_offsets", [-80, 0])}, "two offsets"),
    "offsets with fractions": ({"change": _entry(WTE, "data_offsets", [0.0, 80.0])}, "two offsets"),
    "three offsets": ({"change": _entry(WTE, "data_offsets", [0, 8, 80])}, "two offsets"),
    "a shape too large": ({"change": _entry(WTE, "shape", [5, 5])}, "shape"),
    "a shape with zeros": ({"change": _entry(WTE, "shape", [0, 4])}, "shape"),
    "a shape that overflows": ({"change": _entry(WTE, "shape", [2**62, 2**62, 5])}, "shape"),
    "a turned shape": ({"change": _entry(WTE, "shape", [4, 5])}, "instead of (5, 4)"),
    "an unknown member": ({"change": _entry(WTE, "strides", [1])}, "'strides'"),
    "bytes of no tensor": ({"payload": lambda raw: raw + b"\0\0\0\0"}, "belong to no tensor"),
    "too few bytes": ({"payload": lambda raw: raw[:-4]}, "outside"),
    "other bytes": ({"payload": lambda raw: raw[:-1] + b"\0"}, "weights do not match"),
    "no metadata": ({"change": _metadata({})}, "has no configuration"),
    "metadata that is a list": ({"change": _metadata([])}, "not JSON"),
    "metadata that is a number": ({"change": _metadata({"nanogpt": 3})}, "not a text"),
    "metadata that is no JSON": ({"change": _metadata({"nanogpt": "3,"})}, "not JSON"),
    "half a character": (
        {"change": _metadata({"nanogpt": "\ud800"})},
        "stands for no character",
    ),
    "another format": ({"change": _told("format", "nanogpt-2")}, "has the format"),
    "another configuration": ({"change": _told("calibration_temperature", 2.0)}, "its metadata"),
    "another digest": ({"change": _told("sha256", "0" * 64)}, "metadata does not match"),
    "no digest of itself": (
        {"change": lambda header, metadata: metadata.pop("metadata_sha256")},
        "'metadata_sha256'",
    ),
    "no digest": ({"change": lambda header, metadata: metadata.pop("sha256")}, "'sha256'"),
    "a tensor less": (
        {"change": lambda header, metadata: header.pop(WTE)},
        "80 bytes that belong to no tensor",
    ),
    "a tensor twice": (
        {"text": lambda header: header.replace("h.0.ln_1", "h.0.ln_2")},
        "twice",
    ),
    "deep JSON": ({"text": lambda header: '{"a":' * 100 + header + "}" * 100}, "deeper"),
    "something after the header": ({"text": lambda header: header + "{}"}, "not JSON"),
}


def test_a_safetensors_file_made_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(_safetensors())
    assert outcome_of(path).code == 0, outcome_of(path).sentence


@pytest.mark.parametrize("damage", SAFETENSORS_DAMAGE)
def test_a_wrong_safetensors_file_is_refused(damage: str, tmp_path: Path) -> None:
    change, phrase = SAFETENSORS_DAMAGE[damage]
    path = tmp_path / "m.safetensors"
    path.write_bytes(_safetensors(**change))
    assert_refused(outcome_of(path), str(path), phrase)
