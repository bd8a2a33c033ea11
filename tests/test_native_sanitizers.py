"""The engine's programs under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Each is built once into build/tests-*, which is kept: a second run compiles what has changed. What a
sanitizer finds ends a program with another code than 0.
"""

import os
import subprocess

import pytest
from native_programs import native_program

ISA = ("scalar float32", "scalar bfloat16", "scalar int8")


def run(program, **changes):
    return subprocess.run(
        [program], env={**os.environ, **changes}, capture_output=True, text=True, check=False
    )


def test_the_decoder_agrees_with_the_equations():
    done = run(native_program("decode_check"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in ISA)


@pytest.mark.parametrize(
    "sanitizers",
    ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)],
)
def test_the_decoder_is_clean_with_every_instruction_set_and_thread_count(sanitizers):
    done = run(native_program("decode_check", sanitizers), TSAN_OPTIONS="halt_on_error=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in ISA)
    assert "Sanitizer" not in done.stderr
