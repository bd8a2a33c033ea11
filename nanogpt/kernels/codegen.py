"""Compile every Triton kernel for a GPU that is not here, and read what the assembler says.

python -m nanogpt.kernels.codegen --target 90           one line a kernel, exit code 1 for a problem
python -m nanogpt.kernels.codegen --target 80 --only attention --json

The real launchers run with tensors on the device "meta", so that what is compiled is what a GPU
would be given; only the launch itself is left out. A problem is a spill, too many registers, too
much shared memory, matrix products that ptxas has serialised, or a missing wgmma or bulk copy
where the target has them. A development tool: nothing else imports it.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nanogpt.kernels import launch_triton
from nanogpt.kernels.launch_triton import Target

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
_REGISTERS = 65_536


@dataclass(frozen=True)
class Compiled:
    """What one kernel became.

    Attributes:
        case: which launcher, with which arguments.
        registers: of a thread. shared_bytes: of a program. spill_bytes: stores and loads.
        wgmma, tcgen05, bulk_copies: matrix and tensor-copy instructions in the PTX.
        problems: in words; empty where all is well.
    """

    case: str
    kernel: str
    target: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    warps: int
    wgmma: int
    tcgen05: int
    bulk_copies: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One call of a launcher; `descriptors` where its operands fit the tensor copy engine."""

    name: str
    run: Callable[[], Any]
    products: bool = True
    descriptors: bool = False
    half: bool = True


class _NoDevice:
    """As much of a driver as the compiler asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_cases(cases: list[Case], capability: int) -> Iterator[Compiled]:
    """Compile what each case launches.

    Raises: RuntimeError under TRITON_INTERPRET=1, where kernels are not compiled.
    """
    if launch_triton.INTERPRETED:
        raise RuntimeError("kernels are interpreted here: unset TRITON_INTERPRET")
    driver.set_active(_NoDevice(GPUTarget("cuda", capability, 32)))  # type: ignore[arg-type]
    launch_triton.compile_for = Target(capability, MULTIPROCESSORS[capability])
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    found: list[tuple[Any, str]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        before = len(self.device_caches[0][0])
        with contextlib.redirect_stdout(log):
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if len(self.device_caches[0][0]) > before:  # else it stands in the table already
            found.append((kernel, log.getvalue()))
        return kernel

    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        for case in cases:
            found.clear()
            case.run()
            for kernel, log in found:
                yield _read(case, capability, kernel, log)
    finally:
        JITFunction.run = launch  # type: ignore[method-assign]
        launch_triton.compile_for = None


def _read(case: Case, capability: int, kernel: Any, log: str) -> Compiled:
    """Judge one kernel by its PTX, its metadata and the log of ptxas."""
    ptx = kernel.asm["ptx"]
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)), default=0)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    wgmma = ptx.count("wgmma.mma_async")
    bulk = len(re.findall(r"cp\.async\.bulk\.tensor|cp\.reduce\.async\.bulk", ptx))
    has_products = wgmma or "mma.sync" in ptx or "tcgen05.mma" in ptx
    problems = []
    if not registers:
        problems.append("no log of ptxas")
    if spills:
        problems.append(f"{spills} bytes spilled")
    if registers * warps * 32 > _REGISTERS:
        problems.append(f"{registers} registers in {warps} warps")
    if shared > SHARED_BYTES[capability]:
        problems.append(f"{shared:,} bytes of shared memory of {SHARED_BYTES[capability]:,}")
    if "serialized" in log:
        problems.append("wgmma serialised by ptxas")
    if capability == 90 and case.half and case.products and has_products and not wgmma:
        problems.append("no wgmma")
    if capability >= 90 and case.descriptors and has_products and not bulk:
        problems.append("no bulk tensor copy")
    return Compiled(
        case.name, kernel.metadata.name.strip("_"), capability, registers, shared, spills, warps,
        wgmma, ptx.count("tcgen05.mma"), bulk, tuple(problems),
    )  # fmt: skip


def attention_cases() -> Iterator[Case]:
    """Forward, both backward forms and decoding: every entry of the tile table."""
    from nanogpt.kernels import attention_triton as attention

    for dtype in (torch.bfloat16, torch.float32):
        for width, queries in ((32, 1024), (64, 1024), (80, 1000), (128, 1024), (256, 1024)):
            # As the model has them: views of one (B, T, 3, H, D) product.
            qkv = torch.empty(2, queries, 3, 4, width, dtype=dtype, device="meta")
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            lse = torch.empty(2, 4, queries, device="meta")
            yield from _attention_forms(attention, str(dtype)[6:], q, k, v, lse)
    for width in (68, 200):  # rows that begin anywhere
        q = torch.empty(2, 4, 100, width, dtype=torch.bfloat16, device="meta")
        yield from _attention_forms(
            attention, "bfloat16 odd strides", q, q, q, torch.empty(2, 4, 100, device="meta")
        )


def _attention_forms(
    attention: Any, label: str, q: Any, k: Any, v: Any, lse: torch.Tensor
) -> Iterator[Case]:
    name = f"attention D={q.shape[-1]} {label}"
    half = q.element_size() == 2
    descriptors = half

    def case(form: str, run: Callable[[], Any], **options: Any) -> Case:
        wide = {"half": half, "descriptors": descriptors, **options}
        return Case(f"{name} {form}", run, **wide)

    yield case("forward", lambda: attention.forward(q, k, v, 0.125))
    for form, exact in (("backward", False), ("backward, deterministic", True)):
        yield case(form, lambda e=exact: attention.backward(q, k, v, q, lse, q, 0.125, e))
    one = q[:, :, :1]
    length = torch.empty(1, dtype=torch.int32, device="meta")
    for form, count in (("decode", None), ("decode, length on the device", length)):
        run = lambda c=count: attention.decode(one, k, v, 0.125, c)  # noqa: E731
        yield case(form, run, products=False, descriptors=False)


def layer_norm_cases() -> Iterator[Case]:
    """Widths from 64 to the widest, with and without a residual."""
    from nanogpt.kernels import layer_norm_triton as norm

    for width in (64, 384, 768, 1600, 4096, norm.WIDEST):
        x = torch.empty(4096, width, dtype=torch.bfloat16, device="meta")
        wide = x.float()
        weight, number = x.new_empty(width), x.new_empty(4096, dtype=torch.float32)
        for residual in (None, wide):
            label = f"layer_norm C={width}{'' if residual is None else ' with a residual'}"
            yield Case(
                f"{label} forward",
                lambda x=x, r=residual, w=weight: norm.forward(x, r, w, w, 1e-5, x.dtype),
                products=False,
            )
            yield Case(
                f"{label} backward",
                lambda x=x, r=residual, w=weight, n=number: norm.backward(
                    x, w, n, n, x, r, x.dtype, None if r is None else r.dtype, True
                ),
                products=False,
            )


def cross_entropy_cases() -> Iterator[Case]:
    """A vocabulary of characters, one that fills a block, and GPT-2's."""
    from nanogpt.kernels import cross_entropy_triton as entropy

    targets = torch.empty(64, dtype=torch.int64, device="meta")
    number = torch.empty(64, device="meta")
    factor = torch.empty((), device="meta")
    for dtype in (torch.bfloat16, torch.float32):
        for vocabulary in (65, 8192, 50_257, 50_304):
            x = torch.empty(64, vocabulary, dtype=dtype, device="meta")
            calls: dict[str, Callable[[], Any]] = {
                "forward": lambda x=x: entropy.forward(x, targets, -100),
                "in place": lambda x=x: entropy.loss_and_gradient_in_place(
                    x, targets, factor, -100
                ),
                "backward": lambda x=x: entropy.backward(x, targets, number, factor, -100),
                "scale": lambda x=x: entropy.scale_in_place(x, factor),
            }
            for form, run in calls.items():
                name = f"cross_entropy V={vocabulary} {str(dtype)[6:]} {form}"
                yield Case(name, run, products=False)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "cross_entropy": cross_entropy_cases,
    "layer_norm": layer_norm_cases,
}


def main(argv: list[str] | None = None) -> int:
    """Print a line for every kernel; 1 where one has a problem."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=int, choices=sorted(MULTIPROCESSORS), default=90)
    parser.add_argument("--only", choices=sorted(CASES), action="append")
    parser.add_argument("--json", action="store_true", help="one JSON object a kernel")
    options = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    failed = False
    for operation in options.only or CASES:
        for row in compile_cases(list(CASES[operation]()), options.target):
            failed |= bool(row.problems)
            print(json.dumps(asdict(row)) if options.json else describe(row), flush=True)
    return int(failed)


def describe(row: Compiled) -> str:
    """One line."""
    instructions = f"wgmma {row.wgmma:3d} tcgen05 {row.tcgen05:3d} bulk {row.bulk_copies:2d}"
    numbers = f"{row.registers:3d} reg x {row.warps} warps, {row.shared_bytes:7,d} B, {instructions}"
    verdict = "; ".join(row.problems) or "ok"
    return f"sm_{row.target} {row.case:48s} {row.kernel:20s} {numbers}  {verdict}"


if __name__ == "__main__":
    sys.exit(main())
