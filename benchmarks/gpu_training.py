"""GPT-2 124M from end to end: the training step, the loss curve, writing."""

import gc
import itertools
import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from gpu_session import Session
from torch import nn

from nanogpt import GPT, GPTConfig
from nanogpt.measuring import median_seconds
from nanogpt.plain_gpt import PlainGPT

HOPPER_PEAK_FLOPS = 989e12
"""Dense bf16, by the vendor's datasheet of H100 SXM and H200."""


def _config(session: Session) -> GPTConfig:
    if session.tiny:
        return GPTConfig(vocab_size=300, block_size=32, n_layer=2, n_head=2, n_embd=32, bias=True)
    return GPTConfig(
        vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True
    )


def _name(session: Session) -> str:
    return "tiny" if session.tiny else "GPT-2 124M"


def _stream(session: Session) -> torch.Tensor:
    """The bytes of Python's own language reference, on the device."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    return torch.tensor(list(text), dtype=torch.int64, device=session.device)


def _batches(
    session: Session, stream: torch.Tensor, config: GPTConfig, batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random windows, the same for every model."""
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(stream) - config.block_size - 1, (batch,), generator=generator)
        places = starts[:, None] + torch.arange(config.block_size + 1)
        windows = stream[places.to(session.device)]
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _casting(session: Session) -> Any:
    if session.tiny:
        return nullcontext()
    return torch.autocast(session.device, dtype=torch.bfloat16)


def _stepper(
    session: Session, model: nn.Module, forward: Callable[..., Any], data: Iterator[Any]
) -> Callable[[], torch.Tensor]:
    """One optimizer step: autocast, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    count = itertools.count(1)

    def step() -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * min(1.0, next(count) / 20)
        tokens, targets = next(data)
        with _casting(session):
            _, loss = forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def run_training(session: Session) -> None:
    """Steps of 32 x 1,024 tokens with each kind of kernel, then 50-step loss curves."""
    config = _config(session)
    batch = 2 if session.tiny else 8 if session.quick else 32
    stream = _stream(session)
    impl_of_ours = _runnable(session, config)
    if impl_of_ours is not None:
        _loss_curves(session, config, stream, impl_of_ours)
    # Name -> kernels (None: the recipe), compiled or not. Peers first, so that rows have them.
    kinds: list[tuple[str, str | None, bool]] = [("recipe, compile", None, True)]
    kinds += [("torch", "torch", False)]
    if impl_of_ours is not None:
        kinds += [(impl_of_ours, impl_of_ours, False)]
    kinds += [("torch, compile", "torch", True)]
    if impl_of_ours is not None:
        kinds += [(f"{impl_of_ours}, compile", impl_of_ours, True)]
    seconds: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    tokens = batch * config.block_size
    flops = config.flops_per_token() * tokens
    for name, impl, compiles in kinds:
        what = f"training, {name}"
        if not session.has_time(what, 3 if session.tiny else 35 if compiles else 8):
            continue
        with session.guard(what):
            seconds[name], peaks[name] = _time_steps(session, config, stream, batch, impl, compiles)
            took = seconds[name]
            session.say(f"{what}: {took * 1e3:.2f} ms a step, {tokens / took:,.0f} tokens/s")
            if impl is None or name.startswith("torch"):
                continue
            peers = [peer for peer in seconds if peer.startswith(("recipe", "torch"))]
            session.row(
                "gpu-training",
                {"model": _name(session), "batch": batch, "T": config.block_size, "ours": name},
                torch.float32 if session.tiny else torch.bfloat16,
                took,
                {peer: seconds[peer] for peer in peers},
                flops=flops,
                tokens_per_second=tokens / took,
                mfu_of_989_tflops=flops / took / HOPPER_PEAK_FLOPS,
                peak_bytes=peaks[name],
                peers_peak_bytes={peer: peaks[peer] for peer in peers},
            )


def _runnable(session: Session, config: GPTConfig) -> str | None:
    """The implementation that stands as ours: the one asked for, or else what auto makes of it."""
    tokens = torch.zeros(1, config.block_size, dtype=torch.int64, device=session.device)

    def attempt(forward: Callable[..., Any]) -> None:
        with _casting(session):
            _, loss = forward(tokens, tokens)
        loss.backward()

    for impl in dict.fromkeys((session.impl, "auto")):
        forward = _as_trained(_make(session, config, impl))
        if session.runs(f"training, {impl}", partial(attempt, forward)):
            return impl
    return None


def _make(session: Session, config: GPTConfig, impl: str | None) -> nn.Module:
    """A model; None makes the recipe."""
    torch.manual_seed(0)
    made = PlainGPT(config) if impl is None else GPT(config).set_kernels(impl)
    return made.to(session.device)


def _as_trained(model: nn.Module, compiled: Callable[..., Any] | None = None) -> Any:
    """What gives the loss: ours without logits, as its training loop asks for it."""
    options = {"return_logits": False} if isinstance(model, GPT) else {}
    return partial(model if compiled is None else compiled, **options)


def _time_steps(
    session: Session,
    config: GPTConfig,
    stream: torch.Tensor,
    batch: int,
    impl: str | None,
    compiles: bool,
) -> tuple[float, int | None]:
    """Median seconds of a step, and the most memory on a GPU."""
    model = _make(session, config, impl)
    if compiles:
        torch._dynamo.reset()
    forward = _as_trained(model, session.compiled(model) if compiles else None)
    step = _stepper(session, model, forward, _batches(session, stream, config, batch))
    for _ in range(1 if session.tiny else 3):
        step()
    peak = None
    if session.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    rounds = 2 if session.tiny else 12
    return median_seconds({"step": step}, rounds, device=session.device)["step"], peak


def _loss_curves(session: Session, config: GPTConfig, stream: torch.Tensor, ours_impl: str) -> None:
    """50 steps from the same weights on the same batches: ours must learn as torch does."""
    steps, batch = (4, 2) if session.tiny else (50, 8)
    curves: dict[str, list[float]] = {}
    for impl in ("torch", ours_impl):
        what = f"loss curve, {impl}"
        if not session.has_time(what, 5):
            return
        with session.guard(what):
            model = _make(session, config, impl)
            forward = _as_trained(model)
            step = _stepper(session, model, forward, _batches(session, stream, config, batch))
            losses = [step() for _ in range(steps)]
            curves[impl] = [round(loss.item(), 4) for loss in losses]
            del model, forward, step
            gc.collect()
    for impl, curve in curves.items():
        session.say(f"loss, {impl}: " + " ".join(f"{loss:.3f}" for loss in curve[:: steps // 4]))
        session.emit("curve", impl=impl, losses=curve)
    if len(curves) == 2:
        ours, torchs = curves[ours_impl], curves["torch"]
        ends = [statistics.mean(curve[-10:]) for curve in (ours, torchs)]
        widest = max(abs(a - b) for a, b in zip(ours, torchs, strict=True))
        text = f"last ten steps: ours {ends[0]:.4f}, torch {ends[1]:.4f}; widest gap {widest:.4f}"
        session.note(f"loss curves, {text}")
        learnt = torchs[0] - ends[1]
        if not (math.isfinite(widest) and abs(ends[0] - ends[1]) <= 0.02 * max(learnt, 1.0)):
            session.fail("loss curves", f"ours departs from torch's: {text}")


def run_decode(session: Session) -> None:
    """Writing with the cache in bf16, one text and 64 at once."""
    config = _config(session)
    dtype = torch.float32 if session.tiny else torch.bfloat16
    new = 8 if session.tiny else 64 if session.quick else 256
    for batch in (1, 2) if session.tiny else (1, 64):
        what = f"decoding, batch {batch}"
        if not session.has_time(what, 5):
            return
        with session.guard(what):
            prompt = torch.randint(256, (batch, 16), device=session.device)
            torch.manual_seed(0)
            model = GPT(config).to(session.device, dtype).eval()
            warm_up = partial(model.generate, prompt, 4, seed=1)
            seconds: dict[str, float] = {}
            for impl in dict.fromkeys(("torch", session.impl, "auto")):
                model.set_kernels(impl)
                if session.runs(f"{what}, {impl}", warm_up):
                    seconds[impl] = _write_seconds(session, model, prompt, new) / new
            for impl in seconds.keys() - {"torch"}:
                session.row(
                    "gpu-decode",
                    {"model": _name(session), "batch": batch, "tokens": new, "ours": impl},
                    dtype,
                    seconds[impl],
                    {"torch": seconds["torch"]} if "torch" in seconds else {},
                    nbytes=config.n_parameters(positions=False) * dtype.itemsize,
                    tokens_per_second=batch / seconds[impl],
                )


def _write_seconds(session: Session, model: GPT, prompt: torch.Tensor, new: int) -> float:
    """Median wall time of writing, the prompt included, as a user waits for it."""
    times = []
    for seed in range(2 if session.tiny else 4):
        started = time.perf_counter()
        model.generate(prompt, new, seed=seed)
        if session.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
