"""What this machine does and which paths are picked: `python -m nanogpt.bench`.

Ours stands beside whatever else is installed, and beside what the machine showed to be possible.
"""

if __name__ == "__main__":
    # Before torch is imported, so that --help is quick; the module then runs under its own name.
    import sys

    from nanogpt.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))

import importlib
import importlib.util
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch

from nanogpt import checkpoint, machine, measuring, native
from nanogpt.config import BenchConfig, GPTConfig, TrainConfig, shape_from_flags
from nanogpt.errors import UsageError
from nanogpt.kernels.choice import calls, results
from nanogpt.kernels.linear import cuts_pay
from nanogpt.measuring import matmul_ceiling, median_seconds
from nanogpt.model import GPT
from nanogpt.plain_gpt import PlainGPT
from nanogpt.plan import check_against_initial, workload
from nanogpt.rehearsal import Rehearsal, random_corpus

_QUICK_SECONDS = 20
"""Below this the ceilings are measured on less work as well."""
_SHARES = {"kernels": 0.15, "training": 0.45, "generation": 0.3}
"""Of the time; the rest is for building and for what is never cut short."""
_PROMPT_TOKENS = 16
_WINDOWS = 64
"""Batches of random text that training goes through before it sees one again."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What every part measures with.

    Attributes:
        rehearsal: the training of the shape that was asked for.
        ceilings: see `measuring.measure_ceilings`.
    """

    config: BenchConfig
    rehearsal: Rehearsal
    ceilings: dict[str, float]

    @property
    def shape(self) -> GPTConfig:
        return self.rehearsal.plan.shape

    @property
    def device(self) -> torch.device:
        return self.rehearsal.plan.device

    @property
    def dtype(self) -> torch.dtype:
        return self.rehearsal.plan.dtype

    def medians(self, functions: dict[str, Callable[[], Any]], share: float) -> dict[str, float]:
        """Seconds of each function, within a share of the whole time."""
        seconds = share * self.config.seconds
        return median_seconds(functions, device=self.device.type, budget_seconds=seconds)

    def peers(self, found: dict[str, Any]) -> dict[str, Any]:
        """Those that were asked for."""
        return found if self.config.peers else {}


def run(config: BenchConfig) -> int:
    """Check, measure, print. Returns the exit code."""
    if config.compile and not config.peers:
        raise UsageError("--compile measures a peer, and --no-peers leaves them out")
    device = machine.resolve_device(config.device)
    if config.compile and device.type == "cpu" and not shutil.which("g++"):
        raise UsageError("--compile needs a C++ compiler (g++) on a CPU: install one")
    training = _training_flags(config)
    initial = checkpoint.load(config.init)[0] if config.init else None
    check_against_initial(training, initial)
    vocab_size = config.vocab_size if initial is None else initial.config.vocab_size
    shape = shape_from_flags(config, vocab_size) if initial is None else initial.config
    count = _new_tokens(config, shape)
    corpus = random_corpus(vocab_size, _WINDOWS * (config.batch_size + 1) * (shape.block_size + 1))
    rehearsal = Rehearsal(training, corpus, initial)
    _say("measuring what the machine can do")
    quick = config.seconds < _QUICK_SECONDS
    ceilings = measuring.measure_ceilings(quick, device.type)
    bench = Bench(config, rehearsal, ceilings)
    report: dict[str, Any] = {
        "device": measuring.device_name(device.type),
        "versions": machine.versions(),
        "ceilings": ceilings,
        "picked": _picked(bench),
        "model": {**_sizes(bench.shape), "parameters": bench.shape.n_parameters()},
    }
    _say("measuring the fused operations")
    rows = _kernels(bench)
    _say("measuring a training step")
    rows.append(_training(bench))
    _say("measuring generation")
    rows += _generation(bench, count)
    report["rows"] = rows
    print(json.dumps(report) if config.json else "\n".join(_in_words(report)))
    return 0


def _training_flags(config: BenchConfig) -> TrainConfig:
    """The run whose steps are measured."""
    known = {entry.name for entry in fields(TrainConfig)}
    shared = {entry.name for entry in fields(BenchConfig)} & known - {"compile", "vocab_size"}
    given = {name: getattr(config, name) for name in shared}
    return TrainConfig(**given, val_fraction=0.0, max_steps=1_000_000)


def _new_tokens(config: BenchConfig, shape: GPTConfig) -> int:
    """Raises: UsageError where they leave no room for a prompt."""
    if config.max_new_tokens is None:
        return max(1, min(128, shape.block_size // 2))
    if config.max_new_tokens >= shape.block_size > 1:
        raise UsageError(
            f"--max-new-tokens {config.max_new_tokens} must be below the context of "
            f"{shape.block_size} tokens"
        )
    return config.max_new_tokens


def _sizes(shape: GPTConfig) -> dict[str, int]:
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    return {name: getattr(shape, name) for name in names}


def _picked(bench: Bench) -> dict[str, str]:
    """What runs where nothing is asked for, and why."""
    found = dict(bench.rehearsal.plan.choices)
    missing = native.unfit(bench.rehearsal.trainer.model)
    if missing is None:
        found["sample"] = f"native engine ({native.describe()})"
    else:
        found["sample"] = f"torch with a cache (no native engine: {missing})"
    if bench.device.type == "cpu":
        pays = cuts_pay(torch.get_num_threads())
        how = "in parts by one thread each" if pays else "by torch's own operator"
        found["products of one row"] = f"{how} (measured)"
    return found


def _kernels(bench: Bench) -> list[Row]:
    """Forward and backward of each operation at a micro-batch of the training."""
    work = workload(bench.shape, bench.dtype, bench.rehearsal.plan.micro_batch_size)
    rows, width = work.batch * work.positions, work.heads * work.head_width
    attention = 3.5 * 2 * work.batch * work.heads * work.positions**2 * work.head_width
    flops = {
        "attention": attention,
        "ffn": 3 * 16 * rows * width**2,
        "cross_entropy": 3 * 2 * rows * width * work.vocabulary,
    }
    # Two matrices read and two written, forward and backward.
    nbytes = 8 * rows * width * bench.dtype.itemsize
    made = []
    for operation, (call, arguments) in calls(bench.device, work).items():
        impl = bench.rehearsal.kernels[operation]
        others = [name for name in ("torch", "reference") if name != impl]
        functions: dict[str, Callable[[], Any]] = {
            name: partial(results, call, arguments, name)
            for name in (impl, *bench.peers(dict.fromkeys(others)))
        }
        seconds = bench.medians(functions, _SHARES["kernels"] / 4)
        if operation in flops:
            floor = flops[operation] / matmul_ceiling(bench.ceilings, bench.dtype)
        else:
            floor = nbytes / bench.ceilings["copy_bytes_per_second"]
        shape = {"operation": operation, "B": work.batch, "T": work.positions, "ours": impl}
        ours = seconds.pop(impl)
        made.append(measuring.make_row("kernels", shape, _name(bench.dtype), ours, seconds, floor))
    return made


def _training(bench: Bench) -> Row:
    """One optimizer step: batch, forward, backward, clipping, AdamW."""
    batch, block = bench.config.batch_size, bench.shape.block_size
    peers: dict[str, Callable[[], Any]] = {}
    if bench.config.peers:
        plain = PlainGPT(bench.shape).to(bench.device)
        models: dict[str, tuple[torch.nn.Module, Callable[..., Any]]] = {"torch": (plain, plain)}
        if bench.config.compile:
            models["torch.compile"] = plain, torch.compile(plain)
        theirs = _transformers_model(bench.shape)
        if theirs is not None:
            theirs = theirs.to(bench.device).train()
            models["transformers"] = theirs, partial(_loss_of_theirs, theirs)
        # Autocast to bfloat16 is not always the faster one for them.
        for dtype in dict.fromkeys((bench.dtype, torch.float32)):
            for name, (model, forward) in models.items():
                shown = name if dtype == bench.dtype else f"{name}, {_name(dtype)}"
                peers[shown] = _step_of(model, forward, bench, dtype)
    seconds = bench.medians({"ours": bench.rehearsal.step, **peers}, _SHARES["training"])
    ours, tokens = seconds.pop("ours"), batch * block
    floor = bench.shape.flops_per_token() * tokens / matmul_ceiling(bench.ceilings, bench.dtype)
    return measuring.make_row(
        "training-step",
        {"batch": batch, "block": block},
        _name(bench.dtype),
        ours,
        seconds,
        floor,
        tokens_per_second=tokens / ours,
    )


def _step_of(
    model: torch.nn.Module, forward: Callable[..., Any], bench: Bench, dtype: torch.dtype
) -> Callable[[], float]:
    """The same step for another model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (bench.config.batch_size, bench.shape.block_size + 1)
    draw = np.random.default_rng(0)

    def step() -> float:
        windows = torch.from_numpy(draw.integers(0, bench.shape.vocab_size, shape))
        windows = windows.to(bench.device)
        with machine.autocast(bench.device, dtype):
            _, loss = forward(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _generation(bench: Bench, count: int) -> list[Row]:
    """Writing one text within the context, by each engine; a row's times are those of a token."""
    model: GPT = bench.rehearsal.trainer.model
    model.eval()
    prompt_tokens = max(1, min(_PROMPT_TOKENS, bench.shape.block_size - count))
    prompt = torch.randint(bench.shape.vocab_size, (1, prompt_tokens), device=bench.device)
    engines: dict[str, Callable[[], Any]] = {
        "torch": partial(model.generate, prompt, count, seed=1, engine="torch")
    }
    if native.unfit(model) is None:  # as `sample` calls it
        engine = native.engine_for(model, bench.config.threads or 0)
        engines["native"] = partial(engine.generate, prompt[0].tolist(), count, seed=1)
    peers: dict[str, Callable[[], Any]] = {}
    if bench.config.peers:
        plain = PlainGPT(bench.shape).to(bench.device).eval()
        peers["torch, without a cache"] = partial(plain.generate, prompt, count)
        theirs = _transformers_model(bench.shape)
        if theirs is not None:
            peers["transformers"] = _writer_of(theirs.to(bench.device).eval(), prompt, count)
    seconds = bench.medians({**engines, **peers}, _SHARES["generation"])
    each = {name: taken / count for name, taken in seconds.items()}
    weights = bench.shape.n_parameters(positions=False) * 4
    return [
        measuring.make_row(
            "generation",
            {"engine": name, "tokens": count},
            "float32",
            each[name],
            {peer: each[peer] for peer in peers},
            weights / bench.ceilings["read_bytes_per_second"],
            tokens_per_second=1 / each[name],
        )
        for name in engines
    ]


def _transformers_model(shape: GPTConfig) -> Any:
    """GPT-2 of this shape in transformers, with random weights, or None where it is not here."""
    if importlib.util.find_spec("transformers") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own dependencies
        transformers = importlib.import_module("transformers")
        config = transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.block_size,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.n_embd,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        return transformers.GPT2LMHeadModel(config)


def _loss_of_theirs(
    theirs: Any, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[None, torch.Tensor]:
    """transformers' logits under torch's loss. (Its own shifts labels, which `targets` are not.)"""
    logits = theirs(tokens, use_cache=False).logits
    flat = logits.view(-1, logits.shape[-1])
    return None, torch.nn.functional.cross_entropy(flat, targets.reshape(-1))


def _writer_of(theirs: Any, prompt: torch.Tensor, count: int) -> Callable[[], Any]:
    """transformers' generate, sampling from the whole distribution with its cache."""
    return partial(
        theirs.generate,
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=True,
        top_k=0,
        use_cache=True,
        pad_token_id=0,
    )


def _in_words(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    ceilings, versions, model = report["ceilings"], report["versions"], report["model"]
    shown = [
        f"reading {measuring.bytes_rate(ceilings['read_bytes_per_second'])}",
        f"copying {measuring.bytes_rate(ceilings['copy_bytes_per_second'])} (read plus written)",
        f"products {measuring.flops_rate(ceilings['matmul_flops'])}",
    ]
    if "matmul_flops_bfloat16" in ceilings:
        shown[-1] += f" ({measuring.flops_rate(ceilings['matmul_flops_bfloat16'])} in bfloat16)"
    lines = [
        f"machine: {report['device']}; {versions['system']}; torch {versions['torch']}",
        f"at most: {', '.join(shown)}",
        "model: " + ", ".join(f"{name} {value:,}" for name, value in model.items()),
        "",
        "picked:",
        *(f"  {name}: {choice}" for name, choice in report["picked"].items()),
        "",
    ]
    heads = ("", "ours", "best peer", "ratio", "rate", "of the ceiling")
    table = [heads, *map(_cells, report["rows"])]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    best, fraction = row["best_peer"], row["fraction_of_ceiling"]
    return (
        f"{row['suite']}: {measuring.in_words(row['shape'])}, {row['dtype']}",
        measuring.duration(row["ours_seconds"]),
        f"{best} {measuring.duration(row['peers'][best])}" if best else "none",
        f"{row['ratio']:.2f}" if best else "",
        measuring.rate(row),
        f"{fraction:.0%}" if fraction else "",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
