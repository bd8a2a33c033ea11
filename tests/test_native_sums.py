"""Check sums in C++ against Python's."""

import hashlib
import random
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from native_outcomes import (
    ENVIRONMENT,
    SANITIZERS,
)
from native_programs import native_program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def noise(folder: Path) -> tuple[Path, bytes]:
    raw = random.Random(7).randbytes(300_000)
    path = folder / "noise"
    path.write_bytes(raw)
    return path, raw


def _answers(path: Path, requests: list[str], sanitizers: str = "") -> list[str]:
    done = subprocess.run(
        [native_program("check_sums", sanitizers), path],
        input="\n".join(requests),
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    return done.stdout.splitlines()


def _parts(lengths: Iterable[int], noise: bytes, seed: int) -> list[tuple[int, int, int]]:
    """Offset, length and split: every alignment to 64 bytes, splits anywhere."""
    chance = random.Random(seed)
    parts = []
    for i, length in enumerate(lengths):
        offset = min(i % 64 + 64 * chance.randrange(50), len(noise) - length)
        parts.append((offset, length, chance.randint(0, length)))
    return parts


@pytest.mark.parametrize("sanitizers", ["", SANITIZERS])
def test_every_way_to_the_crc32_agrees_with_zlib(
    noise: tuple[Path, bytes], sanitizers: str
) -> None:
    path, raw = noise
    program = native_program("check_sums", sanitizers)
    ways = subprocess.run([program, "--supported"], capture_output=True, text=True, check=True)
    assert "tables" in ways.stdout.split()
    chance = random.Random(1)
    lengths = [*range(700), *(chance.randint(0, 20_000) for _ in range(600)), 299_000, 300_000]
    for way in ways.stdout.split():
        parts = _parts(lengths, raw, seed=2)
        answers = _answers(path, [f"{way} {o} {n} {s}" for o, n, s in parts], sanitizers)
        assert len(answers) == len(parts)
        for (offset, length, split), answer in zip(parts, answers, strict=True):
            expected = f"{zlib.crc32(raw[offset : offset + length]):08x}"
            assert answer.split() == [expected] * 3, (way, offset, length, split)


def test_the_fastest_way_to_the_crc32_is_used_where_the_processor_has_it() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("the processor's features: no /proc/cpuinfo")
    features = set(flags.read_text(encoding="utf-8").split())
    done = subprocess.run(
        [native_program("check_sums"), "--supported"], capture_output=True, text=True, check=True
    )
    expected = {"tables"}
    if {"pclmulqdq", "sse4_1"} <= features:
        expected.add("clmul")
        if {"avx512f", "vpclmulqdq"} <= features:
            expected.add("clmul512")
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("sanitizers", ["", SANITIZERS])
def test_both_ways_to_the_sha256_agree_with_hashlib(
    noise: tuple[Path, bytes], sanitizers: str
) -> None:
    path, raw = noise
    parts = _parts([*range(200), 1000, 4096, 65_537, 300_000], raw, seed=3)
    answers = _answers(path, [f"sha {o} {n} {s}" for o, n, s in parts], sanitizers)
    assert len(answers) == len(parts)
    for (offset, length, _), answer in zip(parts, answers, strict=True):
        assert answer.split() == [hashlib.sha256(raw[offset : offset + length]).hexdigest()] * 2
