"""What check_file, the engine's reader as a program, says of model files."""

import dataclasses
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from native_programs import native_program

SANITIZERS = "address,undefined"
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "halt_on_error=1"}


@dataclasses.dataclass
class Outcome:
    code: int
    sentence: str


def outcomes(lines: Iterable[object], sanitizers: str = "") -> list[Outcome]:
    """What check_file says of each line of a list."""
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(
        [native_program("check_file", sanitizers)],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pairs = [line.split("\t", 1) for line in done.stdout.splitlines()]
    assert len(pairs) == text.count("\n")
    return [Outcome(int(code), sentence) for code, sentence in pairs]


def outcome_of(path: Path, sanitizers: str = SANITIZERS) -> Outcome:
    return outcomes([path], sanitizers)[0]


def assert_refused(found: Outcome, *phrases: str) -> None:
    """Exit code 3 and one sentence in words that has these phrases."""
    assert found.code == 3, found
    assert "terminate" not in found.sentence
    for phrase in phrases:
        assert phrase in found.sentence, found.sentence
