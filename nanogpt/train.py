"""Train a GPT on text: `python -m nanogpt.train --text book.txt`.

The file reads as the story of a run: `run` checks everything that can be wrong before it touches a
file, `_train` is the loop, `_finish` leaves the model file, the report and a sample.
"""

if __name__ == "__main__":
    # Before torch is imported, so that --help is quick; the module then runs under its own name.
    import sys

    from nanogpt.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt import checkpoint, machine
from nanogpt.cli import seconds_since_start
from nanogpt.config import TrainConfig, shape_from_flags
from nanogpt.data import Corpus, gather, prepare
from nanogpt.decoding import generate
from nanogpt.errors import NanoGPTError
from nanogpt.interruption import EXIT_CODES, signals_noted, terminable
from nanogpt.micro_batch import MicroBatches
from nanogpt.model import GPT
from nanogpt.plan import (
    Plan,
    bpe_vocab_size,
    check_against_initial,
    choose_kernels,
    choose_step,
    describe_memory,
    find_start,
    forecast_memory,
    keep_threads,
    machine_choices,
    make_identity,
    make_plan,
    run_path,
)
from nanogpt.progress import TrainingProgress
from nanogpt.recipe import resolve
from nanogpt.reporter import Reporter, flags_as_text
from nanogpt.run_directory import Checkpoint, RunDirectory
from nanogpt.saver import Saver
from nanogpt.trainer import (
    Outcome,
    Position,
    Trainer,
    can_defer,
    evaluate,
    make_trainer,
    optimizer_step,
    overfits,
)

_DIVERGED_AFTER = 100


def run(config: TrainConfig) -> int:
    """Check, plan, train, finish. Returns the exit code."""
    say = _quiet if config.json else _say
    config = resolve(config)
    output = Path(config.output)
    checkpoint.check_output(output)
    device, dtype, choices = machine_choices(config)
    choices["compile"] = "torch.compile (asked for)" if config.compile else "no"
    initial = checkpoint.load(config.init)[0] if config.init else None
    check_against_initial(config, initial)
    if initial is None:
        shape_from_flags(config, vocab_size=257)  # heads and widths, before any reading
    with terminable():
        corpus = prepare(
            config.text or None,
            tokenizer_kind=config.tokenizer or "char",
            vocab_size=bpe_vocab_size(config, say),
            tokenizer=initial.tokenizer if initial else None,
            encoding_errors=config.encoding_errors,
            note=say,
        )
        plan = make_plan(config, corpus, initial, device, dtype, choices)
        config = plan.config
        identity = make_identity(
            config, corpus.content_sha256, corpus.tokenizer, initial, without=("text",)
        )
        path = run_path(config, corpus.name, plan.shape, identity)
        with RunDirectory(path, warn=_say) as folder:
            start = find_start(config, folder, identity)
            finished = start is not None and start.state["position"]["finished"]
            if start is not None and finished:
                say(f"this run is finished, in {folder.path} (--resume never trains anew)")
                if folder.has_delivered(output):
                    return _already_finished(config, folder, start, output)
            picked, choices["kernels"] = choose_kernels(
                config.kernels,
                plan.shape,
                device,
                dtype,
                plan.micro_batch_size,
                folder if start else None,
            )
            plan, step = choose_step(plan, folder if start else None)
            if start is None:
                # Two checkpoints while a third is written: weights, best and two moments each.
                folder.check_space(3 * 4 * 4 * plan.shape.n_parameters())
                content = {
                    "identity": identity,
                    "choices": choices,
                    "kernels": picked,
                    "step": step,
                    "threads": torch.get_num_threads(),
                    "micro_batches": [[0, plan.micro_batch_size]],
                    "versions": machine.versions(),
                }
                folder.begin(content, flags_as_text(config))
            else:
                if plan.engine != "native":  # whose results do not depend on them
                    keep_threads(config.threads, folder, choices)
                folder.cut_journals(start.state["journals"])
            reporter = Reporter(plan, corpus, folder, machine.versions())
            memory = forecast_memory(plan, picked)
            choices["memory"] = describe_memory(plan, memory, picked)
            trainer = make_trainer(plan, corpus, initial, start, picked)
            if not finished:
                _introduce(plan, corpus, folder, trainer, reporter.baselines, say)
            saver = Saver(folder, start, _say)
            machine.forget_peak(device)
            stopped_by = _train(plan, trainer, corpus, folder, reporter, saver)
            sizes = {
                "program": memory.program,
                "forecast": memory.total,
                "peak": machine.peak_bytes(device),
            }
            return _finish(plan, trainer, folder, reporter, output, saver, stopped_by, sizes)


def _train(
    plan: Plan,
    trainer: Trainer,
    corpus: Corpus,
    folder: RunDirectory,
    reporter: Reporter,
    saver: Saver,
) -> int | None:
    """The loop. Returns the signal that ended it early, or None."""
    config, position = plan.config, trainer.position
    train_tokens, val_tokens = corpus.split(config.val_fraction)
    model: Callable[..., Any] = torch.compile(trainer.model) if config.compile else trainer.model
    trainer.model.train()
    trainer.deferring = can_defer(plan, trainer)
    earlier_seconds = position.seconds
    bar = TrainingProgress(plan.total_steps, position.step, quiet=config.json)
    sizes = MicroBatches(plan, folder, partial(_tell, folder, bar))
    began = time.perf_counter()

    def tick() -> None:
        nonlocal began
        now = time.perf_counter()
        position.row_seconds += now - began
        began = now

    def write(row: dict[str, Any]) -> None:
        position.seconds = earlier_seconds + seconds_since_start()
        row["seconds"] = round(position.seconds, 3)
        folder.append("metrics.jsonl", row)
        reporter.scalars(row)

    def noted(step: int, loss: float, tokens: int) -> None:
        nonlocal began
        tick()
        position.row_tokens += tokens
        bar.update(step, loss, position.row_tokens / max(position.row_seconds, 1e-9))
        if step % plan.log_interval == 0 and not plan.evaluates_after(step):
            write(_metrics_row(plan, position, step))
            began = time.perf_counter()

    losses = _Losses(position, folder, bar, noted)
    with bar, saver, signals_noted() as received:
        while position.step < plan.total_steps and not received:
            began = time.perf_counter()
            starts = plan.order.starts(position.step)
            windows = gather(train_tokens, starts, plan.shape.block_size)  # (B, T + 1)
            outcome = sizes.take(optimizer_step, trainer, model, windows)
            position.step += 1
            position.finished = position.step == plan.total_steps
            evaluate_now = plan.evaluates_after(position.step)
            tokens = len(starts) * plan.shape.block_size
            losses.add(position.step, outcome, tokens, late=not (evaluate_now or received))
            tick()
            if evaluate_now:
                row = _metrics_row(plan, position, position.step)
                row |= _evaluate_and_judge(plan, trainer, val_tokens, row, folder, bar)
                write(row)
                _write_sample(plan, trainer, folder, reporter)
                _save_checkpoint(trainer, saver)
                _show_so_far(reporter, position, bar)
        losses.settle()
        position.seconds = earlier_seconds + seconds_since_start()
        if received and not position.finished:
            name = signal.Signals(received[0]).name
            _event(
                folder, bar, position.step, "interrupted", f"{name} after {position.step:,} steps"
            )
            if not saver.has(position.step):
                _save_checkpoint(trainer, saver)
            return received[0]
    return None


def _metrics_row(plan: Plan, position: Position, step: int) -> dict[str, Any]:
    """The line of metrics for the steps since the last one, whose counters start again."""
    mean = position.loss_sum / position.loss_count if position.loss_count else None
    row = {
        "step": step,
        "epoch": round(step / plan.order.steps_per_epoch, 4),
        "train_loss": mean,
        "learning_rate": plan.learning_rate(step - 1),
        "tokens_per_second": round(position.row_tokens / max(position.row_seconds, 1e-9), 1),
    }
    position.loss_sum, position.loss_count = 0.0, 0
    position.row_seconds, position.row_tokens = 0.0, 0
    return row


def _evaluate_and_judge(
    plan: Plan,
    trainer: Trainer,
    val_tokens: np.ndarray,
    row: dict[str, Any],
    folder: RunDirectory,
    bar: TrainingProgress,
) -> dict[str, float]:
    """The validation part of a row of metrics; notes the best model and raises the alarm."""
    position = trainer.position
    if plan.bytes_per_target is None:  # no validation text: the last model is the best one
        position.best_step = position.step
        return {}
    val_loss = evaluate(
        trainer.model, val_tokens, device=plan.device, dtype=plan.dtype, native=trainer.native
    )
    is_best = position.best_val_loss is None or val_loss < position.best_val_loss
    if is_best:
        position.best_step, position.best_val_loss = position.step, val_loss
    bits = plan.bits_per_byte(val_loss)
    bar.evaluated(position.step, val_loss, bits, is_best)
    if row["train_loss"] is not None:
        position.recent = [*position.recent[-2:], [row["train_loss"], val_loss]]
    if overfits(position.recent):
        message = (
            f"validation rises while training falls: the best model was at step "
            f"{position.best_step:,}; more text, a smaller model or --dropout would help"
        )
        _event(folder, bar, position.step, "overfitting", message)
        position.recent.clear()
    return {"val_loss": val_loss, "val_bits_per_byte": bits}


class _Losses:
    """Takes note of what every step came to, and of steps that were skipped.

    Reading an `Outcome` waits for the device: it is read one step late, when the device has the
    next step to do.

    Args:
        noted: called with number, loss and tokens of each step, in order, whose outcome is known.
    """

    def __init__(
        self,
        position: Position,
        folder: RunDirectory,
        bar: TrainingProgress,
        noted: Callable[[int, float, int], None],
    ) -> None:
        self._position, self._folder, self._bar, self._noted = position, folder, bar, noted
        self._waiting: list[tuple[int, Outcome, int]] = []
        self._failures = 0

    def add(
        self, step: int, outcome: tuple[float, float] | Outcome, tokens: int, *, late: bool
    ) -> None:
        """Note a step.

        Args:
            tokens: how many it has learnt from.
            late: its outcome may be read with the next one.
        Raises: NanoGPTError where many steps in a row have failed.
        """
        if isinstance(outcome, Outcome):
            self._waiting.append((step, outcome, tokens))
        else:
            self._note(step, *outcome, tokens)
        self.settle(but=int(late))

    def settle(self, but: int = 0) -> None:
        """Read what is waiting, `but` so many."""
        while len(self._waiting) > but:
            step, outcome, tokens = self._waiting.pop(0)
            self._note(step, *outcome.read(), tokens)

    def _note(self, step: int, loss: float, grad_norm: float, tokens: int) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._position.loss_sum += loss
            self._position.loss_count += 1
            self._failures = 0
        else:
            self._skipped(step, loss, grad_norm)
        self._noted(step, loss, tokens)

    def _skipped(self, step: int, loss: float, grad_norm: float) -> None:
        self._failures += 1
        self._position.skipped_steps += 1
        message = f"step {step:,} was skipped: loss {loss:g}, gradient norm {grad_norm:g}"
        _event(self._folder, self._bar, step, "skipped", message)
        if self._failures >= _DIVERGED_AFTER:
            raise NanoGPTError(
                f"{self._failures} steps in a row had no finite loss and gradient: a smaller "
                f"--learning-rate or --dtype float32 may help"
            )


def _event(folder: RunDirectory, bar: TrainingProgress, step: int, kind: str, message: str) -> None:
    bar.say(f"note: {message}")
    folder.append("events.jsonl", {"step": step, "kind": kind, "message": message})


def _tell(folder: RunDirectory, bar: TrainingProgress, step: int, message: str) -> None:
    """About memory that has run out: on the screen and in the journal."""
    bar.say(f"WARNING: {message}")
    folder.append("events.jsonl", {"step": step, "kind": "out of memory", "message": message})


def _write_sample(plan: Plan, trainer: Trainer, folder: RunDirectory, reporter: Reporter) -> None:
    if plan.config.sample_tokens:
        text = _sample(trainer.model, plan.device, plan.config)
        folder.append("samples.jsonl", {"step": trainer.position.step, "text": text})
        reporter.text(trainer.position.step, text)


def _sample(model: GPT, device: torch.device, config: TrainConfig) -> str:
    """Text from the beginning of a document; the same draws at every evaluation."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    start = torch.tensor([[tokenizer.end_of_text_id]], device=device)
    out = generate(
        model, start, config.sample_tokens, temperature=0.8, seed=config.seed, engine="auto"
    )
    assert isinstance(out, torch.Tensor)
    return tokenizer.decode(out[0].tolist())


def _show_so_far(reporter: Reporter, position: Position, bar: TrainingProgress) -> None:
    try:
        reporter.write(position, "running")
    except OSError as error:
        bar.say(f"WARNING: the report cannot be written now: {error.strerror or error}")


def _save_checkpoint(trainer: Trainer, saver: Saver) -> None:
    position = trainer.position
    state = {"position": dataclasses.asdict(position)}
    is_best = position.best_step == position.step
    saver.save(position.step, trainer.model, trainer.state(), state, is_best=is_best)


def _introduce(
    plan: Plan,
    corpus: Corpus,
    folder: RunDirectory,
    trainer: Trainer,
    baselines: dict[str, float],
    say: Callable[[str], None],
) -> None:
    shape = plan.shape
    say(
        f"text {corpus.name}: {corpus.n_bytes:,} bytes, {corpus.n_tokens:,} tokens of a "
        f"{corpus.tokenizer.kind} vocabulary of {shape.vocab_size:,}"
    )
    say(
        f"model: {shape.n_parameters():,} parameters, {shape.n_layer} layers, "
        f"{shape.n_head} heads, width {shape.n_embd}, context {shape.block_size}"
    )
    say(
        f"run: {plan.total_steps:,} steps of {plan.batch_size} sequences, "
        f"{plan.total_steps / plan.order.steps_per_epoch:.2f} epochs, in {folder.path}"
    )
    for name, choice in plan.choices.items():
        if name != "kernels" or plan.engine != "native":  # which has its own
            say(f"{name}: {choice}")
    if baselines:
        shown = ", ".join(f"{name} {bits:.3f}" for name, bits in baselines.items())
        say(f"to beat, in bits a byte: {shown}")
    if plan.bytes_per_target is None:
        say("no text is held out: no validation, and the last model counts as the best")
    if trainer.position.step:
        say(f"going on from step {trainer.position.step:,}")


def _finish(
    plan: Plan,
    trainer: Trainer,
    folder: RunDirectory,
    reporter: Reporter,
    output: Path,
    saver: Saver,
    stopped_by: int | None,
    memory: dict[str, int],
) -> int:
    """Leave the model file, the report and a sample; or say how to go on."""
    config, position = plan.config, trainer.position
    say = _quiet if config.json else _say
    reporter.close()
    status = "finished" if stopped_by is None else "interrupted"
    report = reporter.write(position, status)
    summary = {
        "status": status,
        "steps": position.step,
        "best_step": position.best_step,
        "val_loss": position.best_val_loss,
        "val_bits_per_byte": None,
        "baselines_bits_per_byte": reporter.baselines,
        "seconds": round(position.seconds, 3),
        "memory_bytes": memory,
        "output": str(output),
        "run_dir": str(folder.path),
        "report": str(report),
    }
    if position.best_val_loss is not None:
        summary["val_bits_per_byte"] = plan.bits_per_byte(position.best_val_loss)
    if stopped_by is not None:
        if not saver.has(position.step):
            raise NanoGPTError(f"stopped, and the last steps are not saved: {saver.goes_on()}")
        say(f"saved after {position.step:,} steps; the same command goes on from here")
    else:
        best = saver.best()
        if folder.deliver(best, output):
            say(f"wrote {output}: the best model, of step {position.best_step:,}")
        if summary["val_bits_per_byte"] is not None and reporter.baselines:
            beside = ", ".join(f"{name} {bits:.3f}" for name, bits in reporter.baselines.items())
            say(
                f"held-out text costs it {summary['val_bits_per_byte']:.3f} bits a byte; "
                f"without a model: {beside}"
            )
        say(f"report: {report}")
        if config.sample_tokens and not config.json:
            print(_sample(best.to(plan.device), plan.device, config))
    if config.json:
        print(json.dumps(summary))
    return 0 if stopped_by is None else EXIT_CODES[signal.Signals(stopped_by)]


def _already_finished(
    config: TrainConfig,
    folder: RunDirectory,
    start: Checkpoint,
    output: Path,
) -> int:
    """The same command again, with nothing left to do."""
    if config.json:
        position = start.state["position"]
        summary = {
            "status": "finished",
            "steps": position["step"],
            "best_step": position["best_step"],
            "val_loss": position["best_val_loss"],
            "seconds": position["seconds"],
            "output": str(output),
            "run_dir": str(folder.path),
            "report": str(folder.path / "report.html"),
        }
        print(json.dumps(summary))
    return 0


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _quiet(message: str) -> None:
    pass
