"""Each kernel's time beside its peers', forward and backward, at the shapes that matter."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_session import Session, deterministic
from recording import graph_seconds
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt import kernels

Function = Callable[[], Any]

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _passes(
    session: Session,
    suite: str,
    shape: dict[str, Any],
    dtype: torch.dtype,
    ours: dict[str, Function],
    peers: dict[str, Function],
    leaves: tuple[torch.Tensor, ...],
    work: dict[str, dict[str, float]],
) -> None:
    """One row for each pass and variant.

    Args:
        ours, peers: functions from the leaves to a tensor or a tuple of them.
        work: pass ("forward", "backward", "both") -> {"flops": …} or {"nbytes": …}.
    """
    with torch.no_grad():
        example = next(iter(peers.values()))()
    example = example if isinstance(example, tuple) else (example,)
    upstream = [torch.randn_like(x) for x in example]
    del example

    def back(outputs: Any) -> Any:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, upstream)

    def both(function: Function) -> Any:
        return back(function())

    functions = ours | peers
    for name, amount in work.items():
        what = f"{suite} {shape} {name}"
        if not session.has_time(what):
            return
        with session.guard(what):
            prepare = None
            timed: dict[str, Callable[..., Any]] = functions
            if name == "backward":
                prepare, timed = functions, dict.fromkeys(functions, back)
            elif name == "both":
                timed = {key: partial(both, function) for key, function in functions.items()}
            times = session.times(timed, prepare)
            for variant in ours:
                session.row(
                    suite,
                    {"pass": name, **shape, "ours": variant},
                    dtype,
                    times[variant],
                    {peer: times[peer] for peer in peers},
                    **amount,
                )


def _trained(function: Function, leaves: tuple[torch.Tensor, ...]) -> Function:
    """Forward and backward once: what a function must survive to be timed."""

    def run() -> Any:
        outputs = function()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])

    return run


def _ours(
    session: Session,
    what: str,
    variants: dict[str, Callable[[str], Function]],
    leaves: tuple[torch.Tensor, ...],
) -> dict[str, Function]:
    """The variants whose forward and backward run, as forward functions."""

    def trained(make: Callable[[str], Function]) -> Callable[[str], Function]:
        return lambda impl: _trained(make(impl), leaves)

    found = session.ours(what, {name: trained(make) for name, make in variants.items()})
    return {name: variants[name.partition(", ")[2]](name.partition(", ")[0]) for name in found}


def _peers(
    session: Session, what: str, functions: dict[str, Function], leaves: tuple[torch.Tensor, ...]
) -> dict[str, Function]:
    found = session.peers(what, {key: _trained(f, leaves) for key, f in functions.items()})
    return {name: functions[name] for name in found}


def run_attention(session: Session) -> None:
    """Training shapes of 16,384 tokens and 2,048 channels, GPT-2's own, then decoding."""
    shapes = [(16384 // t, 2048 // d, t, d) for d in (64, 128) for t in (1024, 4096, 16384)]
    shapes.insert(0, (64, 12, 1024, 64))
    shapes += [(16384 // t, 2048 // d, t, d) for d in (64, 128) for t in (2048, 8192)]
    dtype = torch.bfloat16
    if session.quick:
        shapes = [(1, 2, 32, 16)] if session.tiny else [(2, 12, 1024, 64)]
    if session.tiny:
        dtype = torch.float32
    for b, h, t, d in shapes:
        what = f"attention B {b}, H {h}, T {t}, D {d}"
        if session.has_time(what):
            with session.guard(what):
                _attention_shape(session, b, h, t, d, dtype)
    _decode_attention(session, dtype)


def _attention_shape(session: Session, b: int, h: int, t: int, d: int, dtype: torch.dtype) -> None:
    shape = {"B": b, "H": h, "T": t, "D": d}
    q, k, v = leaves = tuple(
        torch.randn(b, h, t, d, device=session.device, dtype=dtype).requires_grad_()
        for _ in range(3)
    )
    forward = 4 * b * h * t * t * d / 2
    work = {"forward": {"flops": forward}, "backward": {"flops": 2.5 * forward}}

    def make(impl: str) -> Function:
        return lambda: kernels.causal_attention(q, k, v, impl=impl)

    def sdpa(backends: list[SDPBackend]) -> torch.Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    candidates: dict[str, Function] = {
        name: partial(sdpa, [backend]) for name, backend in SDPA.items()
    }
    if session.device == "cpu":
        candidates = {"sdpa": partial(sdpa, [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])}
    what = f"attention {shape}"
    ours = _ours(session, what, {"": make}, leaves)
    peers = _peers(session, what, candidates, leaves)
    if not peers:
        return
    _passes(session, "gpu-attention", shape, dtype, ours, peers, leaves, work)
    with deterministic():
        what = f"deterministic attention {shape}"
        ours = _ours(session, what, {"deterministic": make}, leaves)
        peers = _peers(session, what, candidates, leaves)
        backward = {"backward": work["backward"]}
        if ours and peers:
            _passes(session, "gpu-attention", shape, dtype, ours, peers, leaves, backward)
    _gluon(session, shape, dtype, (q, k, v), candidates, forward)


def _gluon(
    session: Session,
    shape: dict[str, int],
    dtype: torch.dtype,
    given: tuple[torch.Tensor, ...],
    candidates: dict[str, Function],
    flops: float,
) -> None:
    """The Hopper kernel's forward pass, where the device runs it."""
    if session.device != "cuda":
        return
    from nanogpt.kernels import attention_gluon

    q, k, v = (x.detach() for x in given)
    reason = attention_gluon.unsupported(q, k, v)
    if reason is not None:
        session.note(f"not available: gluon attention {shape}: {reason}")
        return
    ours: dict[str, Function] = {
        "gluon": lambda: attention_gluon.forward(q, k, v, q.shape[-1] ** -0.5)
    }
    with torch.no_grad():
        peers = session.peers(f"attention {shape}", candidates)
        if not session.runs(f"gluon attention {shape}", ours["gluon"]):
            return
        times = session.times(ours | peers)
    row = {"pass": "forward", **shape, "ours": "gluon"}
    found = {peer: times[peer] for peer in peers}
    session.row("gpu-attention", row, dtype, times["gluon"], found, flops=flops)


def _decode_attention(session: Session, dtype: torch.dtype) -> None:
    """One query over a long cache: bound by one pass over keys and values."""
    heads, width, lengths, batches = 16, 128, (1024, 4096, 16384, 65536), (1, 64)
    if session.quick:
        lengths, batches = (1024,), (1,)
    if session.tiny:
        heads, width, lengths = 2, 16, (24,)
    for batch in batches:
        for length in lengths:
            shape = {"B": batch, "H": heads, "T": 1, "S": length, "D": width}
            what = f"decoding attention {shape}"
            nbytes = 2 * batch * heads * length * width * dtype.itemsize
            if session.device == "cuda":
                total = torch.cuda.get_device_properties(0).total_memory
                if nbytes > 0.6 * total:
                    session.note(f"skipped, too large for this device: {what}")
                    continue
            if session.has_time(what, 2):
                with session.guard(what), torch.no_grad():
                    _decode_attention_shape(session, shape, dtype, nbytes)


def _decode_attention_shape(
    session: Session, shape: dict[str, int], dtype: torch.dtype, nbytes: int
) -> None:
    b, h, s, d = (shape[key] for key in "BHSD")
    make = partial(torch.randn, device=session.device, dtype=dtype)
    # Enough sets that none is in the cache when its turn comes, and several calls in a graph.
    n_sets = 1 if session.tiny else max(1, min(64, -(-(2**28) // nbytes)))
    sets = [(make(b, h, 1, d), make(b, h, s, d), make(b, h, s, d)) for _ in range(n_sets)]
    calls = [sets[i % n_sets] for i in range(max(n_sets, 4))]

    def sdpa(
        backends: list[SDPBackend], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v)

    functions: dict[str, Callable[..., torch.Tensor]] = {
        name: partial(sdpa, [backend]) for name, backend in SDPA.items()
    }
    if session.device == "cpu":
        functions = {"sdpa": partial(sdpa, [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])}
    peers = session.peers(
        f"decoding attention {shape}", {n: partial(f, *sets[0]) for n, f in functions.items()}
    )

    def ours(impl: str) -> Function:
        return lambda: kernels.causal_attention(*sets[0], impl=impl)

    found = session.ours(f"decoding attention {shape}", {"": ours})
    for name in found:
        functions[name] = partial(kernels.causal_attention, impl=name)
    if session.device == "cpu":
        times = session.times(found | peers)
    else:
        times = {}
        for name in found | peers:
            recorded = [partial(functions[name], *given) for given in calls]

            def run(name: str = name, recorded: list[Function] = recorded) -> None:
                times[name] = graph_seconds(recorded)

            session.runs(f"a graph of {name} of {shape}", run, peer=name in peers)
    for name in found.keys() & times.keys():
        row = {"pass": "decoding", **shape, "ours": name}
        of_peers = {peer: times[peer] for peer in peers if peer in times}
        session.row("gpu-attention", row, dtype, times[name], of_peers, nbytes=nbytes)


def run_ffn(session: Session) -> None:
    """GPT-2's sizes, beside cuBLAS with pointwise kernels and beside torch.compile."""
    shapes = [(65536, 768, 3072), (16384, 1024, 4096), (8192, 1600, 6400)]
    dtype = torch.bfloat16
    if session.quick:
        shapes = [(16, 16, 64)] if session.tiny else shapes[1:2]
    if session.tiny:
        dtype = torch.float32
    # The search of max-autotune takes minutes: after everything else, where they are left.
    for mode in (None, "max-autotune-no-cudagraphs"):
        if mode and session.quick:
            continue
        for m, c, f in shapes if mode is None else shapes[:1]:
            what = f"ffn M {m}, C {c}, F {f}" + (f" beside {mode}" if mode else "")
            if session.has_time(what, 75 if mode else 2):
                with session.guard(what):
                    _ffn_shape(session, m, c, f, dtype, mode)


def _ffn_shape(
    session: Session, m: int, c: int, f: int, dtype: torch.dtype, mode: str | None
) -> None:
    make = partial(torch.randn, device=session.device, dtype=dtype)
    leaves = (make(m, c), make(f, c) * c**-0.5, make(f), make(c, f) * f**-0.5, make(c))
    x, w1, b1, w2, b2 = leaves = tuple(leaf.requires_grad_() for leaf in leaves)

    def eager(*given: torch.Tensor) -> torch.Tensor:
        x, w1, b1, w2, b2 = given
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)

    def plain(impl: str) -> Function:
        return lambda: kernels.gelu_ffn(x, w1, b1, w2, b2, impl=impl)

    def recomputing(impl: str) -> Function:
        return lambda: kernels.gelu_ffn(x, w1, b1, w2, b2, recompute=True, impl=impl)

    variants = {"": plain}
    if mode is None:
        variants["recomputing"] = recomputing
    torch._dynamo.reset()
    compiled = session.compiled(eager, mode)
    candidates: dict[str, Function] = {
        "torch": partial(eager, *leaves),
        "compile" if mode is None else "max-autotune": partial(compiled, *leaves),
    }
    shape = {"M": m, "C": c, "F": f}
    ours = _ours(session, f"ffn {shape}", variants, leaves)
    peers = _peers(session, f"ffn {shape}", candidates, leaves)
    flops = 4.0 * m * c * f
    work = {
        "forward": {"flops": flops},
        "backward": {"flops": 2 * flops},
        "both": {"flops": 3 * flops},
    }
    _passes(session, "gpu-ffn", shape, dtype, ours, peers, leaves, work)


def run_cross_entropy(session: Session) -> None:
    """GPT-2's vocabulary: logits that exist already, then together with the output head."""
    n, v, c, dtype = 65536, 50304, 768, torch.bfloat16
    if session.device == "cuda":
        # torch's own needs about 22 bytes a logit: two copies, float32 logits, their softmax …
        total = torch.cuda.get_device_properties(0).total_memory
        while n * v * 22 > 0.85 * total:
            n //= 2
    if session.quick:
        n = 2048
    if session.tiny:
        n, v, c, dtype = 6, 65, 16, torch.float32
    for name, part in (
        ("cross_entropy", partial(_cross_entropy, session, n, v, dtype)),
        ("linear_cross_entropy", partial(_linear_cross_entropy, session, n, c, v, dtype)),
        # As the tokenizer has it: rows that begin at no multiple of 16 bytes, but for ours.
        ("the head, V odd", partial(_linear_cross_entropy, session, n // 2, c, v - 47, dtype)),
    ):
        if session.has_time(name, 2):
            with session.guard(name):
                part()


def _targets(session: Session, n: int, v: int) -> torch.Tensor:
    targets = torch.randint(v, (n,), device=session.device)
    targets[::100] = -100
    return targets


def _float_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets)


def _cross_entropy(session: Session, n: int, v: int, dtype: torch.dtype) -> None:
    logits = torch.randn(n, v, device=session.device, dtype=dtype)
    given = torch.empty_like(logits).requires_grad_()
    targets = _targets(session, n, v)

    def fresh() -> torch.Tensor:
        """The logits again, since a run may have written its gradient over them."""
        with torch.no_grad():
            return given.copy_(logits)

    def both(function: Callable[..., torch.Tensor], *_: Any) -> Any:
        return torch.autograd.grad(function(given, targets), given)

    def ours(impl: str, **options: bool) -> Function:
        return partial(both, partial(kernels.cross_entropy, impl=impl, **options))

    variants = {"": ours, "in place": partial(ours, reuse_logits=True)}
    torch._dynamo.reset()
    compiled = session.compiled(_float_cross_entropy)
    candidates: dict[str, Function] = {
        "torch": partial(both, _float_cross_entropy),
        "torch, half": partial(both, F.cross_entropy),
        "compile": partial(both, compiled),
    }
    shape = {"N": n, "V": v}
    fresh()
    found = session.ours(f"cross_entropy {shape}", variants)
    fresh()
    peers = session.peers(f"cross_entropy {shape}", candidates)
    functions = found | peers
    peaks = {}
    for name, function in functions.items():
        fresh()
        peaks[name] = session.peak_bytes(function)
    times = session.times(functions, dict.fromkeys(functions, fresh))
    # One read, one write.
    _rows_with_peaks(
        session, shape, dtype, times, peaks, found, peers, nbytes=2 * n * v * dtype.itemsize
    )


def _rows_with_peaks(
    session: Session,
    shape: dict[str, Any],
    dtype: torch.dtype,
    times: dict[str, float],
    peaks: dict[str, int | None],
    found: dict[str, Function],
    peers: dict[str, Function],
    **amount: float,
) -> None:
    """A row for each variant of ours, with the memory that it and its peers took."""
    for name in found:
        session.row(
            "gpu-cross_entropy",
            {"pass": "both", **shape, "ours": name},
            dtype,
            times[name],
            {peer: times[peer] for peer in peers},
            peak_bytes=peaks[name],
            peers_peak_bytes={peer: peaks[peer] for peer in peers},
            **amount,
        )


def _linear_cross_entropy(session: Session, n: int, c: int, v: int, dtype: torch.dtype) -> None:
    make = partial(torch.randn, device=session.device, dtype=dtype)
    hidden, weight = make(n, c).requires_grad_(), (make(v, c) * c**-0.5).requires_grad_()
    targets = _targets(session, n, v)

    def both(function: Callable[..., torch.Tensor]) -> Any:
        return torch.autograd.grad(function(hidden, weight, targets), (hidden, weight))

    def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _float_cross_entropy(F.linear(hidden, weight), targets)

    def fused(impl: str) -> Function:
        return partial(both, partial(kernels.linear_cross_entropy, impl=impl))

    def separate(impl: str) -> Function:
        def run(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = F.linear(hidden, weight)
            return kernels.cross_entropy(logits, targets, reuse_logits=True, impl=impl)

        return partial(both, run)

    variants = {"head then loss": separate, "linear_cross_entropy": fused}
    torch._dynamo.reset()
    candidates: dict[str, Function] = {
        "torch": partial(both, eager),
        "compile": partial(both, session.compiled(eager)),
    }
    shape = {"N": n, "C": c, "V": v}
    found = session.ours(f"head and cross_entropy {shape}", variants)
    peers = session.peers(f"head and cross_entropy {shape}", candidates)
    functions = found | peers
    peaks = {name: session.peak_bytes(function) for name, function in functions.items()}
    times = session.times(functions)
    _rows_with_peaks(session, shape, dtype, times, peaks, found, peers, flops=6.0 * n * c * v)


def run_layer_norm(session: Session) -> None:
    """GPT-2's widths, with and without the residual addition."""
    shapes = [(65536, 768, True), (65536, 1600, True), (65536, 4096, True), (65536, 768, False)]
    dtype = torch.bfloat16
    if session.quick:
        shapes = [(16, 64, True), (16, 64, False)] if session.tiny else shapes[:1]
    if session.tiny:
        dtype = torch.float32
    for rows, c, residual in shapes:
        what = f"layer_norm rows {rows}, C {c}" + ", residual" * residual
        if session.has_time(what, 2):
            with session.guard(what):
                _layer_norm_shape(session, rows, c, residual, dtype)


def _layer_norm_shape(
    session: Session, rows: int, c: int, residual: bool, dtype: torch.dtype
) -> None:
    make = partial(torch.randn, device=session.device, dtype=dtype)
    leaves = (make(rows, c), make(c), make(c)) + ((make(rows, c),) if residual else ())
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)

    def eager(*given: torch.Tensor) -> Any:
        x, weight, bias, *added = given
        if not added:
            return F.layer_norm(x, weight.shape, weight, bias)
        total = x + added[0]
        return F.layer_norm(total, weight.shape, weight, bias), total

    def make_ours(impl: str) -> Function:
        x, weight, bias, *added = leaves
        if added:
            return lambda: kernels.layer_norm(x, weight, bias, residual=added[0], impl=impl)
        return lambda: kernels.layer_norm(x, weight, bias, impl=impl)

    torch._dynamo.reset()
    compiled = session.compiled(eager)
    candidates: dict[str, Function] = {
        "torch": partial(eager, *leaves),
        "compile": partial(compiled, *leaves),
    }
    shape: dict[str, Any] = {"rows": rows, "C": c, "residual": residual}
    ours = _ours(session, f"layer_norm {shape}", {"": make_ours}, leaves)
    peers = _peers(session, f"layer_norm {shape}", candidates, leaves)
    matrix = rows * c * dtype.itemsize
    # Forward reads x (and the residual) and writes y (and the sum). Backward reads the gradient of
    # y (and of the sum) and what was normalised, and writes one gradient.
    forward, backward = (4, 4) if residual else (2, 3)
    work = {
        "forward": {"nbytes": float(forward * matrix)},
        "backward": {"nbytes": float(backward * matrix)},
        "both": {"nbytes": float((forward + backward) * matrix)},
    }
    _passes(session, "gpu-layer_norm", shape, dtype, ours, peers, leaves, work)
