"""Every Triton kernel compiled for three GPUs that are not here, and what the assembler says."""

import os
import subprocess
import sys
import textwrap
from functools import cache

import pytest

from nanogpt.kernels.codegen import CASES, MULTIPROCESSORS


def compiler(*arguments, code=None):
    """A process that compiles: this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = ["-c", textwrap.dedent(code)] if code else ["-m", "nanogpt.kernels.codegen", *arguments]
    return subprocess.run(
        [sys.executable, *run], env=environment, capture_output=True, text=True, check=False
    )


@cache
def both(operation):
    """All targets of one operation, two processes at a time."""
    waiting, done = list(MULTIPROCESSORS), {}
    while waiting:
        batch, waiting = waiting[:2], waiting[2:]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        running = {
            target: subprocess.Popen(
                [
                    *(sys.executable, "-m", "nanogpt.kernels.codegen"),
                    *("--target", str(target), "--only", operation),
                ],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for target in batch
        }
        for target, process in running.items():
            output, _ = process.communicate()
            done[target] = process.returncode, output
    return done


@pytest.mark.parametrize("target", MULTIPROCESSORS)
@pytest.mark.parametrize("operation", CASES)
def test_every_kernel_compiles_without_a_problem(operation, target, capsys):
    code, output = both(operation)[target]
    with capsys.disabled():
        print()
        print(output)
    assert code == 0, output
    lines = output.splitlines()
    assert len(lines) > 5
    assert all(line.endswith("  ok") for line in lines)


def test_a_planted_spill_and_too_much_shared_memory_are_found():
    done = compiler(
        code="""
        from nanogpt.kernels import attention_triton as attention, codegen
        from nanogpt.kernels.attention_triton import Tile
        attention.TILES["by_keys", 128, 2, 90] = Tile(64, 128, 4, 2)
        attention.TILES["forward", 128, 2, 90] = Tile(128, 128, 8, 6)
        attention.TILES["forward", 64, 2, 90] = Tile(128, 128, 4, 2)
        names = "attention D=128 bf", "attention D=64 bfloat16 forward"
        cases = [c for c in codegen.attention_cases() if c.name.startswith(names)]
        for row in codegen.compile_cases(cases[:4], 90):
            print(codegen.describe(row))
        """
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert any("by_keys" in line and "spilled" in line for line in lines)
    assert any("forward" in line and "bytes of shared memory of" in line for line in lines)
    assert any("forward" in line and "wgmma serialised by ptxas" in line for line in lines)
    assert any(line.endswith("  ok") for line in lines)


def test_a_missing_wgmma_and_a_missing_bulk_copy_are_found():
    done = compiler(
        code="""
        import torch
        from nanogpt.kernels import attention_triton as attention, codegen
        from nanogpt.kernels.attention_triton import Tile
        attention.TILES["forward", 64, 2, 90] = Tile(32, 32, 4, 2)
        attention._uses_descriptors = lambda generation, x: False
        q = torch.empty(1, 1, 512, 64, dtype=torch.bfloat16, device="meta")
        case = codegen.Case("thin", lambda: attention.forward(q, q, q, 1.0), descriptors=True)
        for row in codegen.compile_cases([case], 90):
            print(codegen.describe(row))
        """
    )
    assert "no wgmma; no bulk tensor copy" in done.stdout, done.stderr


def test_an_entry_that_nothing_compiles_is_found():
    done = compiler(
        code="""
        import sys
        from nanogpt.kernels import codegen, layer_norm_triton
        layer_norm_triton.TILES = {("never", 90): None}
        sys.exit(codegen.main(["--only", "layer_norm", "--target", "90"]))
        """
    )
    assert done.returncode == 1
    assert "that nothing compiled: [('never', 90)]" in done.stdout


def test_interpreted_kernels_are_not_compiled():
    done = subprocess.run(
        [sys.executable, "-m", "nanogpt.kernels.codegen", "--only", "layer_norm"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "unset TRITON_INTERPRET" in done.stderr
