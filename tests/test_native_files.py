"""What the native engine makes of model files: good, foreign, and damaged anywhere."""

import dataclasses
import json
import os
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from native_archives import (
    INDEX,
    TINY,
    payloads,
    rewritten,
    tensors_for,
    torchscript,
    without_comment,
    write_archive,
)
from native_outcomes import (
    SANITIZERS,
    assert_refused,
    outcome_of,
    outcomes,
)
from native_programs import native_program

from nanogpt import GPT, checkpoint
from nanogpt.metadata import canonical_json
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer


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


@pytest.fixture(scope="module")
def safetensors(folder: Path) -> Path:
    model = GPT(dataclasses.replace(TINY, vocab_size=257))
    model.tokenizer = ByteTokenizer()
    model.calibration_temperature = 0.75
    path = folder / "good.safetensors"
    checkpoint.save(model, path)
    return path


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantize", ["none", "bf16", "int8"])
def test_an_archive_of_every_precision_is_read(tmp_path: Path, quantize: str, bias: bool) -> None:
    config = dataclasses.replace(TINY, bias=bias)
    tokenizer = {"kind": "char", "characters": 'a"}\\{é😀'}
    path = write_archive(
        tmp_path / "m.pt", config, quantize, tokenizer=tokenizer, calibration_temperature=1.5
    )
    tensors = tensors_for(config, quantize)
    found = outcome_of(path)
    assert found.code == 0, found.sentence
    parity = 0
    for tensor in tensors.values():
        for byte in tensor.reshape(-1).view(torch.uint8).tolist():
            parity ^= byte
    assert found.sentence == (
        f"good: {len(tensors)} tensors, {quantize}, V=5 block=4 L=1 H=2 C=4 "
        f"{'with' if bias else 'without'} biases, temperature 1.5, "
        f"tokenizer of {len(canonical_json(tokenizer))} bytes, parity {parity}"
    )


@pytest.mark.parametrize("quantize", ["none", "bf16", "int8"])
def test_an_archive_of_another_architecture_is_read(tmp_path: Path, quantize: str) -> None:
    config = dataclasses.replace(TINY, rotary=True, qk_norm=True)
    found = outcome_of(write_archive(tmp_path / "m.pt", config, quantize))
    assert found.code == 0, found.sentence
    assert "without biases, rotary, qk_norm, temperature none" in found.sentence


def test_an_archive_from_before_there_was_a_choice_is_read(tmp_path: Path) -> None:
    def older(index: dict[str, Any]) -> None:
        del index["config"]["rotary"], index["config"]["qk_norm"]

    found = outcome_of(write_archive(tmp_path / "m.pt", change=older))
    assert found.code == 0, found.sentence
    assert "without biases, temperature none" in found.sentence


def test_a_safetensors_model_file_is_read(safetensors: Path) -> None:
    found = outcome_of(safetensors)
    assert found.code == 0, found.sentence
    assert found.sentence.startswith(
        "good: 9 tensors, none, V=257 block=4 L=1 H=2 C=4 without biases, temperature 0.75, "
        "tokenizer of 15 bytes"
    )


def test_a_tokenizer_with_escapes_is_read_from_safetensors(tmp_path: Path) -> None:
    # Escapes inside escapes: the metadata is JSON inside a JSON string.
    tokenizer = ByteTokenizer()
    model = GPT(TINY)
    model.tokenizer = tokenizer
    tokenizer.to_dict = lambda: {"kind": "char", "characters": 'é"\\/\n\t\x01😀\u2028'}  # type: ignore[method-assign]
    path = tmp_path / "m.safetensors"
    checkpoint.save(model, path)
    size = len(canonical_json(tokenizer.to_dict()))
    assert f"tokenizer of {size} bytes" in outcome_of(path).sentence


def test_an_archive_with_64_bit_sizes_is_read_and_its_bits_are_covered(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    raw = rewritten(good.read_bytes())
    assert b"PK\6\6" in raw
    path = tmp_path / "m.pt"
    path.write_bytes(raw)
    assert outcome_of(path).code == 0, outcome_of(path).sentence
    flips = [f"{path}\tflip\t{i}\t{i % 8}" for i in range(len(raw))]
    for found in outcomes(flips):
        assert_refused(found)


def test_an_ordinary_torchscript_file_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(torchscript(tensors_for(TINY)))
    assert_refused(outcome_of(path), str(path), "an ordinary TorchScript file", INDEX)
    path.write_bytes(torchscript(tensors_for(TINY), {"nanogpt.json": b"{}"}))
    assert_refused(outcome_of(path), "does not end with its check sum")


def test_a_state_dict_is_refused_as_one(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    checkpoint.save(GPT(TINY), path)
    assert_refused(outcome_of(path), "state dict")


def test_what_is_no_model_file_is_refused_in_words(tmp_path: Path) -> None:
    assert_refused(outcome_of(tmp_path / "none.pt"), "there is no model file", "none.pt")
    assert_refused(outcome_of(tmp_path), "is not a file")
    empty = tmp_path / "empty.pt"
    empty.touch()
    assert_refused(outcome_of(empty), "is empty")
    text = tmp_path / "text.pt"
    text.write_text("once upon a time", encoding="utf-8")
    assert_refused(outcome_of(text), "is not a model file")
    pipe = tmp_path / "pipe.pt"
    os.mkfifo(pipe)
    assert_refused(outcome_of(pipe), "is not a file")
    if os.geteuid() != 0:
        text.chmod(0)
        assert_refused(outcome_of(text), "cannot be opened")


def test_check_file_ends_with_the_exit_code(good: Path, tmp_path: Path) -> None:
    program = native_program("check_file")
    assert subprocess.run([program, good], capture_output=True, check=False).returncode == 0
    missing = subprocess.run([program, tmp_path / "none"], capture_output=True, check=False)
    assert missing.returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["good", "safetensors"])
def test_every_single_flipped_bit_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    size = path.stat().st_size
    places = [(i, bit) for i in range(size) for bit in range(8)]
    found = outcomes(f"{path}\tflip\t{i}\t{bit}" for i, bit in places)
    passed = [place for place, outcome in zip(places, found, strict=True) if outcome.code != 3]
    assert not passed
    assert len(found) == 8 * size


@pytest.mark.parametrize("kind", ["good", "safetensors"])
def test_a_flipped_bit_in_every_byte_is_refused_under_the_sanitizers(
    kind: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    size = path.stat().st_size
    for found in outcomes(
        (f"{path}\tflip\t{i}\t{(i * 5 + i // 8) % 8}" for i in range(size)), SANITIZERS
    ):
        assert_refused(found)


@pytest.mark.parametrize("kind", ["good", "safetensors"])
def test_every_shorter_file_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    lines = [f"{path}\tcut\t{length}" for length in range(path.stat().st_size)]
    for found in outcomes(lines, SANITIZERS):
        assert_refused(found)


def test_a_file_cut_at_every_boundary_of_a_record_is_refused(good: Path, tmp_path: Path) -> None:
    raw = good.read_bytes()
    boundaries = [place[0] for place in payloads(without_comment(raw)).values()]
    boundaries += [sum(place) for place in payloads(without_comment(raw)).values()]
    boundaries += [match.start() for match in re.finditer(rb"PK[\1-\7][\2-\10]", raw)]
    paths = []
    for length in {b + shift for b in boundaries for shift in (-1, 0, 1, 4)}:
        if 0 < length < len(raw):
            path = tmp_path / f"cut{length}.pt"
            path.write_bytes(raw[:length])
            paths.append(path)
    assert len(paths) > 100
    for sanitizers in ("", SANITIZERS):
        for found in outcomes(paths, sanitizers):
            assert_refused(found)


def test_a_longer_file_is_refused(good: Path, safetensors: Path, tmp_path: Path) -> None:
    for path, more in [(good, b"\0"), (good, good.read_bytes()), (safetensors, b"\0" * 4)]:
        longer = tmp_path / path.name
        longer.write_bytes(path.read_bytes() + more)
        assert_refused(outcome_of(longer))
    shifted = tmp_path / "shifted.pt"
    shifted.write_bytes(b"PK\3\4" + good.read_bytes())
    assert_refused(outcome_of(shifted))


def test_damage_in_a_tensor_is_named_by_its_record(good: Path, tmp_path: Path) -> None:
    raw = good.read_bytes()
    where = payloads(without_comment(raw))
    index = json.loads(raw[where[INDEX][0] : sum(where[INDEX])])
    assert len(index["tensors"]) == 21
    for name, entry in index["tensors"].items():
        damaged = bytearray(raw)
        damaged[where[entry["record"]][0] + entry["bytes"] - 1] ^= 0x10
        path = tmp_path / "m.pt"
        path.write_bytes(damaged)
        found = outcome_of(path, "")
        assert_refused(found, str(path), f"record '{entry['record']}'", name, "check sum")
