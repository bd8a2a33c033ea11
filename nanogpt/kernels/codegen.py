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
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nanogpt.kernels import launch_triton
from nanogpt.kernels.dispatch import triton_kernels
from nanogpt.kernels.launch_triton import Target

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
# Generation 80 stays within what its small GPUs (8.6, 8.9) have.
SHARED_BYTES = {80: 101_376, 90: 232_448, 100: 232_448}
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
    driver.set_active(_NoDevice(GPUTarget("cuda", capability, 32)))
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

    JITFunction.run = compile_only
    try:
        for case in cases:
            found.clear()
            case.run()
            for kernel, log in found:
                yield _read(case, capability, kernel, log)
    finally:
        JITFunction.run = launch
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
        for width, queries in ((64, 1024), (80, 1000), (128, 1024), (256, 1024)):
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

    yield case("forward", partial(attention.forward, q, k, v, 0.125))
    for form, exact in (("backward", False), ("backward, deterministic", True)):
        yield case(form, partial(attention.backward, q, k, v, q, lse, q, 0.125, exact))
    one = q[:, :, :1]
    length = torch.empty(1, dtype=torch.int32, device="meta")
    for form, count in (("decode", None), ("decode, length on the device", length)):
        run = partial(attention.decode, one, k, v, 0.125, count)
        yield case(form, run, products=False, descriptors=False)


def ffn_cases() -> Iterator[Case]:
    """The product with its epilogues: every entry of the tile table."""
    from nanogpt.kernels import ffn_triton as ffn

    sizes = {"large": (65_536, 768, 3072), "small": (64, 768, 3072), "thin": (16, 768, 3072)}
    sizes["odd"] = (4097, 771, 3001)
    for dtype, (size_class, shape) in product((torch.bfloat16, torch.float32), sizes.items()):
        rows, width, hidden = shape

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        x, u = empty(rows, width), empty(rows, hidden)
        w1, w2 = empty(hidden, width), empty(width, hidden)
        b1, b2 = empty(hidden), empty(width)
        calls = {
            "up": partial(ffn.forward_up, x, w1, b1, True, True),
            "up, nothing saved": partial(ffn.forward_up, x, w1, None, False, True),
            "dhidden": partial(ffn.backward_hidden, x, w2, u, True, True),
            "out": partial(ffn.multiply, u, w2, b2, False, True),
            "dx": partial(ffn.multiply, u, w1, None, False, False),
            "dw1": partial(ffn.multiply, u, x, None, True, False),
        }
        # A thin tile is never the tile of a gradient of the weights.
        calls = {form: run for form, run in calls.items() if (size_class, form) != ("thin", "dw1")}
        half, aligned = dtype == torch.bfloat16, size_class != "odd"
        for form, run in calls.items():
            yield Case(
                f"ffn {size_class} {str(dtype)[6:]} {form}",
                run,
                # wgmma takes 64 rows at least; pointers do without.
                half=half and size_class in ("large", "small"),
                descriptors=aligned,
            )


def layer_norm_cases() -> Iterator[Case]:
    """Widths from 64 to the widest, with and without a residual."""
    from nanogpt.kernels import layer_norm_triton as norm

    for width in (64, 384, 768, 1600, 4096, norm.WIDEST):
        x = torch.empty(4096, width, dtype=torch.bfloat16, device="meta")
        wide = x.float()
        weight, number = x.new_empty(width), x.new_empty(4096, dtype=torch.float32)
        for residual in (None, wide):
            label = f"layer_norm C={width}{'' if residual is None else ' with a residual'}"
            forward = partial(norm.forward, x, residual, weight, weight, 1e-5, x.dtype)
            yield Case(f"{label} forward", forward, products=False)
            backward = partial(
                norm.backward, x, weight, number, number, x, residual, x.dtype,
                None if residual is None else residual.dtype, True,
            )  # fmt: skip
            yield Case(f"{label} backward", backward, products=False)


def cross_entropy_cases() -> Iterator[Case]:
    """A vocabulary of characters, one that fills a block, and GPT-2's."""
    from nanogpt.kernels import cross_entropy_triton as entropy

    targets = torch.empty(64, dtype=torch.int64, device="meta")
    number = torch.empty(64, device="meta")
    factor = torch.empty((), device="meta")
    for dtype in (torch.bfloat16, torch.float32):
        for vocabulary in (65, 8192, 50_257, 50_304):
            x = torch.empty(64, vocabulary, dtype=dtype, device="meta")
            calls = {
                "forward": partial(entropy.forward, x, targets, -100),
                "in place": partial(
                    entropy.loss_and_gradient_in_place, x, targets, factor, -100, vocabulary
                ),
                "in place, padded": partial(
                    entropy.loss_and_gradient_in_place, x, targets, factor, -100, vocabulary - 47
                ),
                "backward": partial(entropy.backward, x, targets, number, factor, -100),
                "scale": partial(entropy.scale_in_place, x, factor),
            }
            for form, run in calls.items():
                name = f"cross_entropy V={vocabulary} {str(dtype)[6:]} {form}"
                yield Case(name, run, products=False)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "ffn": ffn_cases,
    "cross_entropy": cross_entropy_cases,
    "layer_norm": layer_norm_cases,
}


class _Noted(dict[Any, Any]):
    """A tile table that remembers which of its entries were read."""

    def __init__(self, entries: dict[Any, Any]) -> None:
        super().__init__(entries)
        self.read: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def main(argv: list[str] | None = None) -> int:
    """Print a line for every kernel; 1 where one has a problem."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=int, choices=sorted(MULTIPROCESSORS), default=90)
    parser.add_argument("--only", choices=sorted(CASES), action="append")
    parser.add_argument("--json", action="store_true", help="one JSON object a kernel")
    options = parser.parse_args(argv)
    failed = False
    for operation in options.only or CASES:
        module = triton_kernels(operation)
        table = _Noted(getattr(module, "TILES", {}))
        module.TILES = table  # type: ignore[attr-defined]
        for row in compile_cases(list(CASES[operation]()), options.target):
            failed |= bool(row.problems)
            print(json.dumps(asdict(row)) if options.json else describe(row), flush=True)
        left = [key for key in table if options.target in key and key not in table.read]
        if left:
            failed = True
            print(f"entries of {operation}'s tile table that nothing compiled: {left}")
    return int(failed)


def describe(row: Compiled) -> str:
    """One line."""
    instructions = f"wgmma {row.wgmma:3d} tcgen05 {row.tcgen05:3d} bulk {row.bulk_copies:2d}"
    size = f"{row.registers:3d} reg x {row.warps} warps, {row.shared_bytes:7,d} B"
    verdict = "; ".join(row.problems) or "ok"
    return f"sm_{row.target} {row.case:48s} {row.kernel:20s} {size}, {instructions}  {verdict}"


if __name__ == "__main__":
    sys.exit(main())
