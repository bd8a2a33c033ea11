"""Every kernel against float64, by the rule of the tests, in every dtype, at awkward shapes.

|ours - exact| <= 2 |torch in the same dtype - exact| + 4 eps max|exact|, forward and gradients, in
the default mode and in the deterministic one. New memory is full of NaN, inputs must stay as they
are, and two deterministic runs must agree bit for bit.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_session import DeviceLost, Session, deterministic, last_lines, unavailable

from nanogpt import kernels

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        inputs: by name, floating tensors whose gradients are compared.
        call: implementation, inputs -> outputs.
        names: of the outputs.
        exact: the same in float64, where the implementation "reference" is not it.
        torch: the peer whose error sets the limit, where the implementation "torch" is not it.
        autocast: ours and torch's run under autocast to bfloat16.
        backward: whether gradients exist.
    """

    name: str
    inputs: dict[str, torch.Tensor]
    call: Callable[..., Outputs]
    names: tuple[str, ...] = ("out",)
    exact: Callable[..., Outputs] | None = None
    torch: Callable[..., Outputs] | None = None
    autocast: bool = False
    backward: bool = True


def run_correctness(session: Session, kernel: str) -> None:
    """All cases of one kernel; one line for each failure, a count at the end."""
    makers: dict[str, Callable[[Session], Iterator[Case]]] = {
        "attention": _attention_cases,
        "ffn": _ffn_cases,
        "cross_entropy": _cross_entropy_cases,
        "linear_cross_entropy": _linear_cross_entropy_cases,
        "layer_norm": _layer_norm_cases,
    }
    counts = {"cases": 0, "comparisons": 0, "failures": 0, "not_available": 0}
    reasons: set[str] = set()
    torch.manual_seed(0)
    for case in makers[kernel](session):
        if not session.has_time(f"correctness of {kernel} from {case.name} on"):
            break
        try:
            comparisons, problems = _check(session, case)
            if session.fell_back:
                counts["not_available"] += 1
        except DeviceLost:
            raise
        except Exception as error:
            reason = unavailable(error)
            if reason is not None:
                counts["not_available"] += 1
                reasons.add(reason)
                continue
            comparisons, problems = 0, [last_lines(error)]
            session.check_device()
        counts["cases"] += 1
        counts["comparisons"] += comparisons
        counts["failures"] += len(problems)
        for problem in problems:
            session.fail(case.name, problem)
    if kernel == "cross_entropy" and counts["cases"]:
        _all_ignored(session)
    for reason in sorted(reasons):
        session.note(f"not available: {session.impl} {kernel}: {reason}")
    session.emit("checks", kernel=kernel, **counts)
    session.say(
        f"correctness of {kernel}: {counts['cases']} cases, {counts['comparisons']} comparisons, "
        f"{counts['failures']} failures, {counts['not_available']} cases not available"
    )


def _check(session: Session, case: Case) -> tuple[int, list[str]]:
    """Comparisons made, and what is wrong."""
    impl = session.impl
    session.fell_back = False
    if session.tiny and impl != "auto":
        try:
            case.call(impl, *case.inputs.values())
        except Exception as error:
            if unavailable(error) is None:
                raise
            impl = "auto"  # a trial on a CPU proves the script, not the kernels
            session.fell_back = True
    ours = partial(case.call, impl)
    written: set[str] = set()
    upstream: list[torch.Tensor] = []
    torchs = _values(case, case.torch or partial(case.call, "torch"), upstream)
    definition = case.exact or partial(case.call, "reference")
    exact = _values(case, definition, upstream, wide=True)
    _poison(session)
    plain = _values(case, ours, upstream, written)
    with deterministic(fill=True):
        first = _values(case, ours, upstream, written)
        second = _values(case, ours, upstream, written)
    problems = []
    for mode, found in (("", plain), (" in deterministic mode", first)):
        for name, x in found.items():
            problem = _compare(x, torchs[name], exact[name])
            if problem:
                problems.append(f"{name}{mode}: {problem}")
    problems += [
        f"{name}: two deterministic runs differ"
        for name in first
        if not torch.equal(first[name], second[name])
    ]
    problems += [f"{name} was written to" for name in sorted(written)]
    return 2 * len(plain), problems


def _values(
    case: Case,
    function: Callable[..., Outputs],
    upstream: list[torch.Tensor],
    written: set[str] | None = None,
    wide: bool = False,
) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name.

    Args:
        upstream: gradients of the outputs; the first call draws them.
        written: takes the names of inputs that changed.
        wide: in float64.
    """
    leaves = [_leaf(x, wide).requires_grad_(case.backward) for x in case.inputs.values()]
    casts = case.autocast and not wide
    with torch.autocast(leaves[0].device.type, torch.bfloat16) if casts else nullcontext():
        outputs = function(*leaves)
    found = dict(zip(case.names, (x.detach().clone() for x in outputs), strict=True))
    if case.backward:
        if not upstream:
            upstream += [torch.randn(x.shape, dtype=x.dtype, device=x.device) for x in outputs]
        given = [g.to(x.dtype) for g, x in zip(upstream, outputs, strict=True)]
        names = (f"gradient of {name}" for name in case.inputs)
        found |= dict(zip(names, torch.autograd.grad(outputs, leaves, given), strict=True))
    if written is not None:
        for (name, x), leaf in zip(case.inputs.items(), leaves, strict=True):
            if not torch.equal(x, leaf):
                written.add(name)
    return found


def _leaf(x: torch.Tensor, wide: bool) -> torch.Tensor:
    """A tensor of its own with the same strides."""
    dtype = torch.float64 if wide else x.dtype
    own = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
    return own.copy_(x.detach())


def _poison(session: Session) -> None:
    """Leave NaN in the memory that the next allocations get: small and large ones of a GPU."""
    if session.device == "cuda":
        held = [torch.full((n,), torch.nan, device="cuda") for n in [2**24] * 8 + [2**17] * 32]
        del held


def _compare(ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> str | None:
    """What is wrong with ours, or None."""
    if ours.shape != torchs.shape or ours.dtype != torchs.dtype:
        return f"is {tuple(ours.shape)} {ours.dtype}, torch's {tuple(torchs.shape)} {torchs.dtype}"
    tiny = 4 * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    limit = 2 * (torchs.double() - exact).abs().max().item() + tiny
    error = (ours.double() - exact).abs().max().item()
    return None if error <= limit else f"error {error:.3g}, limit {limit:.3g}"  # NaN never passes


def _dtypes(session: Session) -> tuple[torch.dtype, ...]:
    if session.tiny:
        return (torch.float32, torch.float16)  # the interpreter has no bfloat16
    return (torch.bfloat16, torch.float16, torch.float32)


def _named(name: str, dtype: torch.dtype, **shape: Any) -> str:
    words = " ".join(f"{key}{value}" for key, value in shape.items())
    return f"{name} {words} {str(dtype).removeprefix('torch.')}"


def _attention_cases(session: Session) -> Iterator[Case]:
    if session.tiny:
        groups = [
            [
                (1, 2, 17, 17, 16, "packed"),
                (1, 1, 1, 9, 10, "plain"),
                (2, 2, 5, 9, 16, "transposed"),
            ]
        ]
    else:
        # Compiling takes most of the time, for each width and dtype: the usual widths come first.
        groups = [
            [
                (2, 3, 127, 127, 64, "packed"),
                (2, 4, 300, 300, 64, "packed"),
                (1, 2, 65, 200, 64, "plain"),
                (4, 8, 1, 1, 64, "plain"),
                (4, 8, 1, 1023, 64, "plain"),
                (2, 12, 1024, 1024, 64, "packed"),
                (1, 2, 4096, 4096, 64, "plain"),
                (2, 4, 256, 256, 128, "packed"),
                (2, 3, 257, 513, 128, "plain"),
                (1, 4, 1, 8191, 128, "transposed"),
                (1, 4, 2048, 2048, 128, "packed"),
            ],
            [
                (1, 3, 257, 257, 80, "packed"),
                (2, 2, 3, 4097, 80, "plain"),
                (2, 3, 130, 130, 16, "plain"),
                (2, 3, 129, 129, 32, "plain"),
                (2, 2, 333, 333, 96, "transposed"),
                (1, 2, 190, 190, 256, "plain"),
                (2, 2, 200, 200, 40, "plain"),
            ],
        ]
    for dtype, shapes in ((dtype, shapes) for shapes in groups for dtype in _dtypes(session)):
        for b, h, t, s, d, layout in shapes:
            name = _named("attention", dtype, B=b, H=h, T=t, S=s, D=d) + f" {layout}"
            make = partial(torch.randn, dtype=dtype, device=session.device)
            if layout == "packed" and t == s:

                def call(impl: str, qkv: torch.Tensor) -> Outputs:
                    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
                    out = kernels.causal_attention(q, k, v, impl=impl)
                    return (out.transpose(1, 2),)  # so that the gradient has these strides

                yield Case(name, {"qkv": make(b, t, 3, h, d)}, call)
                continue

            def plain(impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Outputs:
                return (kernels.causal_attention(q, k, v, impl=impl),)

            swap = layout == "transposed"
            sizes = {"q": t, "k": s, "v": s}
            inputs = {
                key: make(b, n, h, d).transpose(1, 2) if swap else make(b, h, n, d)
                for key, n in sizes.items()
            }
            yield Case(name, inputs, plain)
            if t == 1:  # without gradients it is another kernel
                yield Case(f"{name} decoding", inputs, plain, backward=False)
    yield from _gluon_cases(session)


def _gluon_cases(session: Session) -> Iterator[Case]:
    """The forward pass of the Hopper kernel, where the device runs it."""
    if session.device != "cuda":
        return
    from nanogpt.kernels import attention_gluon

    for dtype in (torch.bfloat16, torch.float16):
        for b, h, t, d in ((2, 12, 1024, 64), (2, 4, 300, 64), (1, 4, 2048, 128), (1, 3, 130, 128)):
            q, k, v = (torch.randn(b, h, t, d, dtype=dtype, device="cuda") for _ in "qkv")
            name = _named("gluon attention", dtype, B=b, H=h, T=t, D=d)
            reason = attention_gluon.unsupported(q, k, v)
            if reason is not None:
                session.note(f"not available: {name}: {reason}")
                continue
            scale = d**-0.5

            def call(
                impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = scale
            ) -> Outputs:
                if impl in ("torch", "reference"):
                    return kernels.causal_attention(q, k, v, impl=impl), _lse2(q, k, scale)
                out, lse = attention_gluon.forward(q, k, v, scale)
                return out, lse.reshape(q.shape[:3])

            inputs = {"q": q, "k": k, "v": v}
            yield Case(name, inputs, call, ("out", "lse"), backward=False)


def _lse2(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """log2 of the sum of exp(logits), (B, H, T), in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf).logsumexp(-1) / math.log(2)


def _ffn_cases(session: Session) -> Iterator[Case]:
    tiny = [((5,), 16, 64, True), ((3, 2), 16, 32, False)]
    shapes = [
        ((129,), 768, 3072, True),
        ((257,), 64, 256, False),
        ((1,), 768, 3072, True),
        ((1000,), 384, 1536, True),
        ((33,), 104, 416, True),
        ((3, 65), 128, 512, False),
        ((4096,), 768, 3072, True),
        ((2047,), 1600, 6400, True),
    ]
    recomputes = (False, True)
    for dtype in (*_dtypes(session), None):  # None: weights in float32 under autocast
        for rows, c, f, biases in tiny if session.tiny else shapes:
            if dtype is None and (session.tiny or (f > 2000 and rows[0] > 129)):
                continue
            kept = dtype or torch.float32
            make = partial(torch.randn, dtype=kept, device=session.device)
            inputs = {"x": make(*rows, c), "w1": make(f, c) * c**-0.5, "w2": make(c, f) * f**-0.5}
            if biases:
                inputs |= {"b1": make(f), "b2": make(c)}
            for recompute in recomputes:

                def call(
                    impl: str,
                    x: torch.Tensor,
                    w1: torch.Tensor,
                    w2: torch.Tensor,
                    b1: torch.Tensor | None = None,
                    b2: torch.Tensor | None = None,
                    recompute: bool = recompute,
                ) -> Outputs:
                    options = {"recompute": True} if recompute else {}
                    return (kernels.gelu_ffn(x, w1, b1, w2, b2, impl=impl, **options),)

                name = _named("ffn", kept, M=rows, C=c, F=f)
                name += " biases" * biases + " recompute" * recompute
                name += " autocast" * (dtype is None)
                yield Case(name, inputs, call, autocast=dtype is None)


def _cross_entropy_cases(session: Session) -> Iterator[Case]:
    tiny = [(5, 65), (3, 7)]
    shapes = [
        (128, 50257),
        (130, 50304),
        (1000, 65),
        (7, 3),
        (33, 1000),
        (4097, 257),
        (5, 128256),
        (2048, 50304),
    ]
    reuses = (False, True)
    for dtype in _dtypes(session):
        for n, v in tiny if session.tiny else shapes:
            targets = torch.randint(v, (n,), device=session.device)
            targets[0], targets[1] = 0, v - 1
            if n > 3:
                targets[2::5] = -100
            # Rows of logits that are part of wider ones, as with a padded vocabulary.
            for pad in (0, 47) if v == 50257 or session.tiny else (0,):
                logits = 3 * torch.randn(n, v + pad, device=session.device)
                inputs = {"logits": logits.to(dtype)[:, :v]}
                for reuse in reuses:

                    def call(
                        impl: str,
                        logits: torch.Tensor,
                        targets: torch.Tensor = targets,
                        reuse: bool = reuse,
                    ) -> Outputs:
                        options = {"reuse_logits": True} if reuse else {}
                        own = logits.mul(1) if reuse else logits  # what may be written over
                        return (kernels.cross_entropy(own, targets, impl=impl, **options),)

                    name = _named("cross_entropy", dtype, N=n, V=v)
                    yield Case(name + " strided" * bool(pad) + " reuse" * reuse, inputs, call)


def _all_ignored(session: Session) -> None:
    """With no target the mean is NaN, as torch's is."""
    logits = torch.randn(4, 65, device=session.device)
    targets = torch.full((4,), -100, device=session.device)
    impl = "auto" if session.tiny else session.impl
    with session.guard("cross_entropy with nothing to count"):
        loss = kernels.cross_entropy(logits, targets, impl=impl)
        if not torch.isnan(loss):
            session.fail("cross_entropy with nothing to count", f"{loss.item()} instead of NaN")


def _linear_cross_entropy_cases(session: Session) -> Iterator[Case]:
    tiny = [(5, 16, 65, None)]
    shapes = [
        (130, 64, 1000, None),
        (257, 768, 50257, None),
        (257, 768, 50304, 2**22),
        (257, 768, 50257, 2**22),
        (64, 128, 65, 2**12),
        (2048, 768, 50304, None),
        (2048, 768, 50257, None),
    ]
    for dtype in _dtypes(session):
        for n, c, v, chunk_bytes in tiny if session.tiny else shapes:
            targets = torch.randint(v, (n,), device=session.device)
            targets[::7] = -100
            make = partial(torch.randn, dtype=dtype, device=session.device)
            inputs = {"hidden": make(n, c), "weight": make(v, c) * c**-0.5}

            def call(
                impl: str,
                hidden: torch.Tensor,
                weight: torch.Tensor,
                targets: torch.Tensor = targets,
                chunk_bytes: int | None = chunk_bytes,
            ) -> Outputs:
                options = {"chunk_bytes": chunk_bytes, "impl": impl}
                return (kernels.linear_cross_entropy(hidden, weight, targets, **options),)

            def plain(
                hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor = targets
            ) -> Outputs:
                logits = F.linear(hidden, weight)
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                return (F.cross_entropy(wide, targets),)

            name = _named("linear_cross_entropy", dtype, N=n, C=c, V=v)
            name += f" chunk_bytes {chunk_bytes}" * bool(chunk_bytes)
            yield Case(name, inputs, call, exact=plain, torch=plain)


def _layer_norm_cases(session: Session) -> Iterator[Case]:
    tiny = [((5,), 64, True, True), ((2, 3), 65, False, False)]
    shapes = [
        ((513,), 64, True, False),
        ((7,), 65, True, True),
        ((1000,), 100, False, False),
        ((3, 129), 768, True, True),
        ((4097,), 768, True, False),
        ((129,), 1000, False, True),
        ((513,), 1600, True, True),
        ((130,), 4096, True, True),
        ((65,), 8192, True, True),
        ((1,), 8192, True, False),
        ((16384,), 768, True, True),
    ]
    for dtype in (*_dtypes(session), None):
        for rows, c, bias, residual in tiny if session.tiny else shapes:
            if dtype is None and (session.tiny or c > 1000):
                continue
            kept = dtype or torch.float32
            make = partial(torch.randn, dtype=kept, device=session.device)
            inputs = {"x": make(*rows, c) + 3, "weight": make(c)}
            inputs |= {"bias": make(c)} if bias else {}
            inputs |= {"residual": make(*rows, c)} if residual else {}

            def call(impl: str, *given: torch.Tensor, bias: bool, residual: bool) -> Outputs:
                x, weight, *rest = given
                b = rest.pop(0) if bias else None
                if residual:
                    return kernels.layer_norm(x, weight, b, residual=rest[0], impl=impl)
                return (kernels.layer_norm(x, weight, b, impl=impl),)

            name = _named("layer_norm", kept, rows=rows, C=c)
            name += " bias" * bias + " residual" * residual + " autocast" * (dtype is None)
            names = ("y", "sum") if residual else ("y",)
            bound = partial(call, bias=bias, residual=residual)

            def halved(*given: torch.Tensor, bound: Callable[..., Outputs] = bound) -> Outputs:
                # In an autocast region torch's y is float32 and ours has the region's precision.
                y, *rest = bound("torch", *given)
                return y.to(torch.get_autocast_dtype(y.device.type)), *rest

            peer = halved if dtype is None else None
            yield Case(name, inputs, bound, names, torch=peer, autocast=dtype is None)
