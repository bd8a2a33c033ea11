"""Memory: the forecast against what torch allocates, running out of it, and recomputation."""

import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from nanogpt import GPT, machine, memory, micro_batch, native
from nanogpt import train as train_module
from nanogpt.config import PRESETS, GPTConfig
from nanogpt.errors import is_out_of_memory
from nanogpt.memory import Workload, forecast, largest_batch, step_bytes
from nanogpt.native_step import NativeStep, unfit
from nanogpt.run_directory import RunDirectory
from nanogpt.trainer import evaluate, make_muon, make_optimizer, reserve_moments

SMALL = ("--n-layer", 2, "--n-head", 2, "--n-embd", 16, "--block-size", 16, "--batch-size", 8)
QUICK = (*SMALL, "--sample-tokens", 0, "--no-tensorboard", "--max-steps", 8, "--eval-interval", 4)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def train(nanogpt, text_file, tmp_path, monkeypatch):
    """Run `train` with a small model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return nanogpt("train", "--text", text_file, *QUICK, *arguments)

    return run


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is on."""

    def __init__(self, known):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _note(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.live += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.seen.discard(key)
        self.live -= size


SHAPES = {
    "small vocabulary": ({"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 65}, 12),
    "large vocabulary": ({"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 20_000}, 3),
    "one sequence": ({"n_layer": 2, "n_head": 4, "n_embd": 96, "vocab_size": 300}, 1),
}


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", SHAPES)
def test_the_forecast_counts_what_torch_keeps_and_makes(name, dropout, recompute, accumulates):
    shape, batch = SHAPES[name]
    model = GPT(**shape, block_size=32, dropout=dropout).train()
    model.recompute = recompute
    known = list(model.parameters())
    if accumulates:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known += [p.grad for p in model.parameters()]
    windows = torch.randint(0, shape["vocab_size"], (batch, 33))
    with Live(known) as live:
        _, loss = model(windows[:, :-1], windows[:, 1:], return_logits=False)
        kept = live.live
        loss.backward()
    gradients = 4 * model.config.n_parameters() if accumulates else 0
    kept_forecast, peak_forecast = step_bytes(
        Workload(model.config, batch, accumulates=accumulates, recompute=recompute)
    )
    # The windows are no tensors of the step here: 16 bytes a token.
    tokens = 16 * batch * 32
    assert kept_forecast - tokens == pytest.approx(kept, rel=0.01)
    assert peak_forecast - tokens == pytest.approx(live.peak + gradients, rel=0.02)


def test_without_one_of_its_parts_the_forecast_would_be_off(monkeypatch):
    """The check above can fail: a block's hidden layer is more than its tolerance."""
    work = Workload(GPTConfig(n_layer=3, n_head=4, n_embd=64, vocab_size=65, block_size=32), 12)
    kept, peak = step_bytes(work)
    monkeypatch.setattr(memory, "_mask_bytes", lambda work: 0)
    assert step_bytes(work) == (kept, peak)
    fused = Workload(work.shape, 12, kernels={"ffn": "triton"})
    assert step_bytes(fused)[0] < 0.9 * kept


@pytest.mark.parametrize("make", [make_optimizer, make_muon])
def test_the_forecast_counts_every_moment(make):
    shape = GPTConfig(vocab_size=50, block_size=8, n_layer=3, n_head=2, n_embd=16, bias=True)
    optimizer = make(GPT(shape), 1e-3, 0.1, (0.9, 0.99))
    reserve_moments(optimizer)
    moments = [
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    assert forecast(Workload(shape, 1, muon=make is make_muon)).optimizer == sum(moments)


def test_recomputation_and_smaller_micro_batches_are_forecast_to_take_less():
    work = Workload(GPTConfig(vocab_size=65, **PRESETS["small"]), 64)
    less = Workload(work.shape, 64, recompute=True)
    assert forecast(less).kept < forecast(work).kept / 4
    whole = forecast(work).model
    fits = largest_batch(work, whole // 2)
    assert fits in (8, 16, 32)
    assert forecast(Workload(work.shape, fits, accumulates=True)).model <= whole // 2
    assert largest_batch(work, whole) == 64 or largest_batch(work, whole) == 32
    assert largest_batch(work, 1000) is None


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_changes_no_bit_of_losses_and_weights(train, dropout):
    flags = ("--dropout", dropout, "--micro-batch-size", 4)
    assert train(*flags, "--run-dir", "plain", "--output", "plain.pth").code == 0
    assert train(*flags, "--run-dir", "less", "--output", "less.pth", "--recompute").code == 0
    assert losses("plain") == losses("less")
    assert Path("plain.pth").read_bytes() == Path("less.pth").read_bytes()


def test_recomputation_really_computes_blocks_twice():
    model = GPT(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=9).train()
    calls = []
    for block in model.transformer["h"]:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.zeros(1, 8, dtype=torch.long)
    for recompute, expected in ((False, 2), (True, 4)):
        calls.clear()
        model.recompute = recompute
        model(tokens, tokens)[1].backward()
        assert len(calls) == expected


def test_a_run_says_what_it_will_take_and_what_it_took(train):
    outcome = train("--json")
    told = json.loads(outcome.out)["memory_bytes"]
    assert 0 < told["program"] < told["forecast"]
    assert told["forecast"] == pytest.approx(told["peak"], rel=memory_limit(told))
    outcome = train("--resume", "never")
    assert re.search(r"^memory: about \d+\.\d\d GB of \d+\.\d\d GB", outcome.err, re.M)
    assert "WARNING" not in outcome.err


def memory_limit(told):
    """In this process other tests have run, whose memory the peak may hold or give back."""
    return 0.5 if told["peak"] > 0 else 0


def test_a_run_that_does_not_fit_is_told_what_would_help(train, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda device: 9_000_000)
    shape = ("--batch-size", 1024, "--max-steps", 1)
    outcome = train(*shape)
    assert outcome.code == 0
    line = next(line for line in outcome.err.splitlines() if line.startswith("memory:"))
    assert "WARNING: this may not fit" in line
    assert "--micro-batch-size" in line or "--recompute" in line
    monkeypatch.setattr(machine, "available_bytes", lambda device: 10)
    assert "a smaller --block-size" in train(*shape, "--resume", "never").err


def losses(run_dir):
    timing = ("seconds", "tokens_per_second")
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in timing} for x in lines]


def failing(real, largest, from_step=0, error=None):
    """optimizer_step in a memory that holds `largest` sequences: fails in the middle of a step."""
    message = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you"
    error = error or RuntimeError(message)

    def step(plan, trainer, model, windows):
        if trainer.position.step < from_step or plan.micro_batch_size <= largest:
            return real(plan, trainer, model, windows)
        # As torch leaves it: gradients of a part of the batch, dropout drawn.
        part = torch.from_numpy(windows[:3])
        model(part[:, :-1], part[:, 1:], return_logits=False)[1].backward()
        raise error

    return step


@pytest.mark.parametrize(
    "error", [None, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to")]
)
def test_where_memory_runs_out_the_run_is_that_of_a_smaller_micro_batch(train, monkeypatch, error):
    flags = ("--dropout", 0.1, "--batch-size", 8)
    small = ("--micro-batch-size", 2, "--run-dir", "small", "--output", "small.pth")
    assert train(*flags, *small).code == 0
    real = train_module.optimizer_step
    monkeypatch.setattr(train_module, "optimizer_step", failing(real, 2, error=error))
    outcome = train(*flags, "--run-dir", "run", "--output", "run.pth")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("WARNING: out of memory") == 2  # 8, then 4
    assert losses("run") == losses("small")
    assert Path("run.pth").read_bytes() == Path("small.pth").read_bytes()
    assert json.loads(Path("run/run.json").read_text())["micro_batches"] == [[0, 2]]
    kinds = [json.loads(x)["kind"] for x in Path("run/events.jsonl").read_text().splitlines()]
    assert kinds.count("out of memory") == 2


def test_gradients_of_the_step_that_failed_would_show(train, monkeypatch):
    """The comparison above can fail: without discarding, the losses differ."""
    real = train_module.optimizer_step
    flags = ("--kernels", "torch")  # the native engine's gradients are written, never added to
    train(*flags, "--micro-batch-size", 2, "--run-dir", "small")
    monkeypatch.setattr(micro_batch, "_discard", lambda trainer: None)
    monkeypatch.setattr(train_module, "optimizer_step", failing(real, 2))
    assert train(*flags, "--run-dir", "run").code == 0
    assert losses("run") != losses("small")


class Killed(BaseException):
    """Ends a process at once, with nothing saved."""


def test_a_run_whose_micro_batch_changed_goes_on_to_the_same_weights(train, monkeypatch):
    """Also from a checkpoint before the change: a step is repeated with the size that it had."""
    real = train_module.optimizer_step
    flags = ("--dropout", 0.1)
    monkeypatch.setattr(train_module, "optimizer_step", failing(real, 4, from_step=5))
    assert train(*flags, "--run-dir", "whole", "--output", "whole.pth").code == 0
    stored = json.loads(Path("whole/run.json").read_text())["micro_batches"]
    assert stored == [[0, 8], [5, 4]]

    used = []

    def killed_at_six(plan, trainer, model, windows):
        if trainer.position.step == 6:
            raise Killed
        return failing(real, 4, from_step=5)(plan, trainer, model, windows)

    monkeypatch.setattr(train_module, "optimizer_step", killed_at_six)
    with pytest.raises(Killed):
        train(*flags, "--run-dir", "parts", "--output", "parts.pth")

    def noting(plan, trainer, model, windows):
        used.append((trainer.position.step, plan.micro_batch_size))
        return real(plan, trainer, model, windows)

    monkeypatch.setattr(train_module, "optimizer_step", noting)
    assert train(*flags, "--run-dir", "parts", "--output", "parts.pth").code == 0
    assert used == [(4, 8), (5, 4), (6, 4), (7, 4)]
    assert Path("whole.pth").read_bytes() == Path("parts.pth").read_bytes()


def test_a_single_sequence_that_does_not_fit_ends_in_a_sentence(train, monkeypatch):
    real = train_module.optimizer_step
    monkeypatch.setattr(train_module, "optimizer_step", failing(real, 0))
    outcome = train()
    assert outcome.code == 1
    last = outcome.err.strip().splitlines()[-1]
    assert "a single sequence of 16 tokens" in last
    assert "--block-size" in last
    assert "--recompute" in last
    assert "Traceback" not in outcome.err


def test_other_errors_are_not_taken_for_too_little_memory(train, monkeypatch):
    real = train_module.optimizer_step
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(train_module, "optimizer_step", failing(real, 2, error=other))
    outcome = train()
    assert outcome.code == 1
    assert "out of memory" not in outcome.err


@pytest.mark.parametrize("largest", [3, 1, 0])
def test_an_evaluation_that_does_not_fit_is_computed_in_smaller_parts(monkeypatch, largest):
    model = GPT(vocab_size=28, n_layer=1, n_head=2, n_embd=16, block_size=8)
    tokens, device = np.random.default_rng(0).integers(0, 28, 203), torch.device("cpu")
    whole = evaluate(model, tokens, device=device)
    real, sizes = GPT.forward, []

    def forward(self, inputs, *arguments, **options):
        sizes.append(len(inputs))
        if len(inputs) > largest:
            raise RuntimeError("std::bad_alloc")
        return real(self, inputs, *arguments, **options)

    monkeypatch.setattr(GPT, "forward", forward)
    if not largest:
        with pytest.raises(RuntimeError, match="bad_alloc"):
            evaluate(model, tokens, device=device)
        return
    assert evaluate(model, tokens, device=device) == pytest.approx(whole, rel=1e-6)
    fitting = [size for size in sizes if size <= largest]
    assert sum(fitting) == 202 // 8 + 1
    assert len(sizes) - len(fitting) == {3: 3, 1: 4}[largest]


def test_an_evaluation_that_fails_otherwise_is_no_question_of_memory(monkeypatch):
    model = GPT(vocab_size=28, n_layer=1, n_head=2, n_embd=16, block_size=8)

    def forward(*arguments, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(RuntimeError, match="mat1"):
        evaluate(model, np.zeros(200, dtype=np.int64), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …", True),
        ("could not create a primitive", True),
        ("could not create a primitive descriptor for a matmul primitive", False),
        ("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_refused_memory_says_is_known(message, is_memory):
    assert is_out_of_memory(RuntimeError(message)) is is_memory
    assert not is_out_of_memory(ValueError(message))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("could not create a primitive")])
def test_memory_that_no_smaller_part_helps_is_said_in_a_sentence(train, monkeypatch, error):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr("nanogpt.trainer._loss_or_none", refuse)
    done = train()
    assert done.code == 1
    assert "nanogpt train: out of memory: a smaller --batch-size or model needs less" in done.err
    assert "bug" not in done.err


def test_a_damaged_list_of_sizes_is_not_used(tmp_path):
    with RunDirectory(tmp_path / "run", warn=print) as folder:
        for wrong in (None, [], [[0]], [[0, 0]], [[-1, 2]], [["0", 2]], [[3, 2]], {"0": 2}):
            folder.begin({"identity": {}, "micro_batches": wrong}, {})
            assert micro_batch.stored_sizes(folder) is None
        folder.begin({"identity": {}, "micro_batches": [[0, 4]]}, {})
        folder.remember(micro_batches=[[0, 4], [7, 2]])
        assert micro_batch.stored_sizes(folder) == [[0, 4], [7, 2]]


LIMITED = """
import json, resource, sys
import nanogpt.train as train
from nanogpt import machine, micro_batch, saver
limit, sizes = int(sys.argv[1]), json.loads(sys.argv[2])
if sizes:
    micro_batch.stored_sizes = lambda folder: sizes
real = train._train
def limited(*arguments):
    size = machine._status("VmSize") + limit
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    return real(*arguments)
train._train = limited
from nanogpt.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("kernels", "megabytes"), [("torch", 400), ("torch", 440), ("auto", 300)])
def test_a_process_that_is_refused_memory_goes_on_with_less(
    text_file, tmp_path, kernels, megabytes
):
    """A real allocator's refusal under RLIMIT_AS: the weights are those of the smaller batches.

    A heap in pieces may refuse at the second step what it granted at the first, so that the run
    without a limit takes each step with the size that the first one stored for it.
    """
    text_file.write_text(text_file.read_text() * 8)
    shape = "--n-layer 4 --n-head 2 --n-embd 64 --block-size 64 --batch-size 512 --max-steps 2"
    flags = ["--text", str(text_file), *shape.split(), "--sample-tokens", "0", "--no-tensorboard"]
    # The precision that is faster here, as "auto" measures it, need not be the same twice.
    flags += ["--kernels", kernels, "--dtype", "float32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(name, limit, sizes=None):
        command = [sys.executable, "-c", LIMITED, str(limit), json.dumps(sizes), "train", *flags]
        command += ["--run-dir", str(tmp_path / name), "--output", str(tmp_path / f"{name}.pth")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run("run", megabytes * 2**20)
    assert done.returncode == 0, done.stderr
    assert "WARNING: out of memory with 512 sequences" in done.stderr
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["micro_batches"]
    assert run("small", 2**40, stored).returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "small")
    assert (tmp_path / "run.pth").read_bytes() == (tmp_path / "small.pth").read_bytes()


@pytest.mark.slow
def test_the_forecast_is_within_fifteen_per_cent_of_the_measured_peak():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import memory as measured
    finally:
        sys.path.pop(0)
    for name in ("S", "S-256", "M-recompute"):
        row = measured.measure(measured.SHAPES[name])
        assert abs(row["ratio"] - 1) <= measured.LIMIT, measured.describe(name, row)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        ({"vocab_size": 65, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}, 12),
        ({"vocab_size": 300, "block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 64}, 64),
        ({"vocab_size": 50_257, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 96}, 4),
        ({"vocab_size": 200_001, "block_size": 64, "n_layer": 1, "n_head": 1, "n_embd": 8}, 5),
    ],
)
def test_the_native_engines_room_is_forecast(shape, batch, dtype, recompute):
    config = GPTConfig(**shape)
    if not native.available() or unfit(config, torch.device("cpu"), dtype):
        pytest.skip("the native engine does not compute it here")
    model = GPT(config)
    model.recompute = recompute
    step = NativeStep(model, dtype, 1)
    windows = np.zeros((batch, config.block_size + 1), dtype=np.int64)
    step.gradients(windows)
    evaluated = memory.evaluation_batch(config, "cpu")
    step.loss(np.zeros((evaluated, config.block_size + 1), dtype=np.int64))
    work = Workload(
        config, batch, product_bytes=dtype.itemsize, recompute=recompute, engine="native"
    )
    found = forecast(work)
    gradients = 4 * config.n_parameters()
    assert found.evaluation - gradients == pytest.approx(step.workspace_bytes, rel=0.05)
    assert found.step - gradients == found.kept


def test_advanced_recomputes_too(nanogpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"{n} and {n + 1} make {2 * n + 1}|{n % 5}" for n in range(60)]
    Path("rewards.txt").write_text("\n".join(lines))
    shape = ("--n-layer", 2, "--n-head", 2, "--n-embd", 16, "--block-size", 32, "--dropout", 0.1)
    flags = ("--offline-data", "rewards.txt", "--epochs", 1, "--batch-size", 16, *shape)
    real, used = GPT._hidden, []

    def noting(model, tokens, cache):
        used.append(model.recompute)
        return real(model, tokens, cache)

    monkeypatch.setattr(GPT, "_hidden", noting)
    assert nanogpt("advanced", *flags, "--run-dir", "a", "--output", "a.pth").code == 0
    assert not any(used)
    less = ("--run-dir", "b", "--output", "b.pth", "--recompute")
    outcome = nanogpt("advanced", *flags, *less)
    assert outcome.code == 0, outcome.err
    assert any(used)
    assert Path("a.pth").read_bytes() == Path("b.pth").read_bytes()
