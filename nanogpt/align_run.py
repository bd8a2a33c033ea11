"""A run of self-alignment: rounds of sampling, scoring and training, kept after every round.

A third of the terms is held out: no round is rewarded for them, and what they do shows whether the
model has learnt their domain or the other terms by heart.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt import metadata
from nanogpt.config import AdvancedConfig
from nanogpt.data import prepare
from nanogpt.errors import InputError, NanoGPTError
from nanogpt.machine import versions
from nanogpt.model import GPT
from nanogpt.plan import choose_kernels, find_start, keep_threads, make_identity, run_path
from nanogpt.report.alignment import AlignmentReport, render_alignment_report
from nanogpt.reporter import flags_as_text
from nanogpt.run_directory import Checkpoint, RunDirectory, json_ready
from nanogpt.saver import Saver
from nanogpt.self_align import SelfAlignConfig, SelfAlignTrainer
from nanogpt.term_alignment import FitConfig, make_self_alignment, split_terms
from nanogpt.terms import read_terms

Say = Callable[[str], None]
Machine = tuple[torch.device, torch.dtype, dict[str, str]]
_REPORTED_TEXTS = 3


def align(config: AdvancedConfig, initial: GPT, machine: Machine, say: Say) -> int:
    """Read terms and text, go from round to round, write the last good one. The exit code."""
    assert config.align_terms is not None
    assert initial.tokenizer is not None
    terms = read_terms(config.align_terms, "--align-terms")
    anchor, anchor_digest = _original_text(config, initial, say)
    device, dtype, choices = machine
    identity = make_identity(
        config,
        hashlib.sha256(metadata.canonical_json([anchor_digest, terms])).hexdigest(),
        initial.tokenizer,
        initial,
        without=("align_terms", "anchor_text"),
    )
    name = f"{Path(config.init or 'gpt').stem}-aligned"
    output = Path(config.output)
    initial.recompute = config.recompute
    # Before anything is written: a term that cannot be spelled, or too short a text, is refused.
    trainer = _make_trainer(config, initial.to(device), terms, anchor, dtype, say)
    with RunDirectory(run_path(config, name, initial.config, identity), warn=say) as folder:
        start = find_start(config, folder, identity)
        picked, why = choose_kernels(
            config.kernels, initial.config, device, dtype, config.batch_size,
            folder if start else None,
        )  # fmt: skip
        choices = {**choices, "kernels": why}
        if start is None:
            content = {
                "identity": identity,
                "choices": choices,
                "kernels": picked,
                "threads": torch.get_num_threads(),
                "versions": versions(),
            }
            folder.check_space(4 * 4 * 4 * initial.config.n_parameters())
            folder.begin(content, flags_as_text(config))
        run = _Run(config, folder, terms, choices, say)
        initial.set_kernels(picked)
        say(f"terms: {len(run.terms)} to learn, {len(run.held_out)} held out for judging")
        if start is not None:
            keep_threads(config.threads, folder, choices)
            folder.cut_journals(start.state["journals"])
            trainer.load_state(start.load_trainer())
            run.earlier = start.state["seconds"]
            run.told = trainer.rounds[-1]["round"]
            if trainer.stopped is not None:
                say(f"this run is finished, in {folder.path} (--resume never trains anew)")
            else:
                say(f"going on after round {len(trainer.rounds) - 1}")
        return run.carry_out(trainer, output, start)


def _original_text(
    config: AdvancedConfig, initial: GPT, say: Say
) -> tuple[np.ndarray | None, str | None]:
    """Tokens of --anchor-text and its digest; None lets the model write it."""
    if config.anchor_text is None:
        say("note: without --anchor-text the model's own samples stand for original text")
        return None, None
    assert initial.tokenizer is not None
    kind = initial.tokenizer.kind
    corpus = prepare(
        (config.anchor_text,), tokenizer_kind=kind, tokenizer=initial.tokenizer, note=say
    )
    return corpus.split(0.0)[0], corpus.content_sha256


def _make_trainer(
    config: AdvancedConfig,
    model: GPT,
    terms: Sequence[str],
    anchor: np.ndarray | None,
    dtype: torch.dtype,
    say: Say,
) -> SelfAlignTrainer:
    """The rounds' settings, from the flags.

    Raises: InputError for a term that the vocabulary cannot write, or too short a text.
    """
    fit = FitConfig(
        max_completion_length=config.max_completion_length,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
    )
    settings = SelfAlignConfig(
        rounds=config.rounds,
        num_generations=config.num_generations,
        weighting="exp" if config.distil_beta is None else "identity",
        beta=config.beta or 1.0,
        scale_rewards=config.scale_rewards,
        max_weight=config.max_weight,
        anchor_fraction=config.anchor_fraction,
        kl_budget=config.kl_budget,
        distil_beta=config.distil_beta,
        seed=config.seed,
    )
    try:
        return make_self_alignment(
            model,
            terms,
            anchor,
            settings,
            fit,
            dtype=dtype,
            note=say,
            progress=lambda what, part: say(f"{what} …"),
        )
    except ValueError as error:
        raise InputError(f"--align-terms: {error}") from None


class _Run:
    """Rounds and what they leave."""

    def __init__(
        self,
        config: AdvancedConfig,
        folder: RunDirectory,
        terms: list[str],
        choices: dict[str, str],
        say: Say,
    ) -> None:
        self.config, self.folder, self.say = config, folder, say
        self.all_terms, self.choices = terms, choices
        self.terms, self.held_out = split_terms(terms, seed=config.seed)
        self.started, self.earlier = time.monotonic(), 0.0

    def carry_out(self, trainer: SelfAlignTrainer, output: Path, start: Checkpoint | None) -> int:
        """Rounds until it stops by itself; every one is saved."""
        with Saver(self.folder, start, self.say, unit="round") as saver:
            self._go_on(trainer, saver)
        return self._leave(trainer, output)

    def _go_on(self, trainer: SelfAlignTrainer, saver: Saver) -> None:
        while trainer.stopped is None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", RuntimeWarning)
                try:
                    trainer.step()
                except (KeyboardInterrupt, SystemExit):
                    number = len(trainer.rounds)
                    if number and not saver.has(number):
                        raise NanoGPTError(
                            f"stopped, and the last round is not saved: {saver.goes_on()}"
                        ) from None
                    done = f"saved after round {number - 1}" if number else "nothing was done yet"
                    self.say(f"{done}; the same command goes on from here")
                    raise
            for warning in caught:
                self.say(f"WARNING: {str(warning.message).replace('distil_beta', '--distil-beta')}")
            if trainer.stopped is None or trainer.rounds[-1]["round"] > self.told:
                self._tell_round(trainer)
            self._save(trainer, saver)

    def _leave(self, trainer: SelfAlignTrainer, output: Path) -> int:
        kept = max(row["round"] for row in trainer.rounds if row["kept"])
        reason = trainer.stopped or ""
        self.say(f"stopped: {reason.replace('distil_beta', '--distil-beta')}")
        model = trainer.policy.model  # type: ignore[attr-defined]
        if kept == 0:
            self.say("no round was kept: the model written is the one of --init")
        if self.folder.deliver(model, output):
            self.say(f"wrote {output}: round {kept}")
        report = self._write_report(trainer, kept, model)
        self.say(f"report: {report}")
        if self.config.json:
            summary = {
                "status": "finished",
                "stopped": trainer.stopped,
                "round": kept,
                "rounds": [json_ready(row) for row in trainer.rounds],
                "terms": self.terms,
                "held_out_terms": self.held_out,
                "output": str(output),
                "run_dir": str(self.folder.path),
                "report": str(report),
            }
            print(json.dumps(summary, allow_nan=False))
        else:
            print(_table(trainer.rounds, kept))
        return 0

    told = -1

    def _tell_round(self, trainer: SelfAlignTrainer) -> None:
        row = trainer.rounds[-1]
        if row["round"] <= self.told:
            return
        self.told = row["round"]
        self.folder.append("metrics.jsonl", json_ready({**row, "step": row["round"]}))
        name = "the base" if row["round"] == 0 else f"round {row['round']}"
        change = "" if row.get("val_loss") is None else f", general text {row['val_loss']:.4f} nats"
        self.say(
            f"{name}: {row['term_rate']:.3g} terms in 1,000 tokens, KL {row['kl']:.3g} nats a "
            f"text{change}"
        )

    def _save(self, trainer: SelfAlignTrainer, saver: Saver) -> None:
        state = {
            "finished": trainer.stopped is not None,
            "seconds": self._seconds,
        }
        model = trainer.policy.model  # type: ignore[attr-defined]
        # A number of its own for what is saved without a new round: that it has stopped.
        step = len(trainer.rounds) + (trainer.stopped is not None)
        saver.save(step, model, trainer.state(), state, is_best=True)

    @property
    def _seconds(self) -> float:
        return round(self.earlier + time.monotonic() - self.started, 3)

    def _write_report(self, trainer: SelfAlignTrainer, kept: int, model: GPT) -> Path:
        shape = model.config
        samples, base = trainer.texts(kept), trainer.texts(0)
        texts = [(f"Round {kept}", text) for text in samples[:_REPORTED_TEXTS]]
        if kept:
            texts += [("The base", text) for text in base[:_REPORTED_TEXTS]]
        report = AlignmentReport(
            title=f"{self.folder.path.name}: {len(self.terms)} terms",
            status="finished",
            rounds=trainer.rounds,
            reason=f"It stopped: {trainer.stopped}.",
            chosen=kept,
            terms=self.terms,
            held_out_terms=self.held_out,
            samples=texts,
            config=flags_as_text(self.config),
            choices=self.choices,
            model={**asdict(shape), "n_parameters": shape.n_parameters()},
            versions=versions(),
            seconds=self._seconds,
        )
        return self.folder.write_report(render_alignment_report(report))


def _table(rounds: Sequence[dict[str, Any]], kept: int) -> str:
    """The rounds as text."""
    head = ["round", "terms", "held out", "KL", "general text", "distinct-2", "duplicates"]
    rows = []
    for row in rounds:
        rates = [
            f"{row[name]:.2f} ± {row[f'{name}_se']:.2f}" if row.get(name) is not None else ""
            for name in ("term_rate", "heldout_term_rate")
        ]
        nll = row.get("val_loss")
        rows.append(
            [
                f"{row['round']}{' (written)' if row['round'] == kept else ''}",
                *rates,
                f"{row['kl']:.2f}",
                "" if nll is None else f"{nll:.4f} ({row['val_loss_change']:+.2%})",
                f"{row['distinct_2']:.3f}",
                f"{row['duplicate_rate']:.1%}",
            ]
        )
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    note = (
        "Terms in 1,000 tokens with standard errors; KL to the base in nats a text; general text "
        "in nats a token."
    )
    return "\n".join([*lines, "", note])
