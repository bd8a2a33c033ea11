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

from nanogpt import checkpoint, metadata
from nanogpt.config import AdvancedConfig, default_learning_rate
from nanogpt.data import Corpus, prepare
from nanogpt.errors import InputError, UsageError
from nanogpt.machine import versions
from nanogpt.model import GPT
from nanogpt.plan import choose_kernels, find_start, make_identity, run_path
from nanogpt.report.alignment import AlignmentReport, render_alignment_report
from nanogpt.reporter import flags_as_text
from nanogpt.run_directory import RunDirectory
from nanogpt.self_align import (
    AlignmentReward,
    FitConfig,
    GPTPolicy,
    SelfAlignConfig,
    SelfAlignTrainer,
    TextMeasures,
)
from nanogpt.terms import read_terms
from nanogpt.tokenizer import Tokenizer, UnknownCharacterError

Say = Callable[[str], None]
Machine = tuple[torch.device, torch.dtype, dict[str, str]]
_HELD_OUT_TERMS = 1 / 3
# Of what training from scratch takes.
_LEARNING_RATE = 1 / 40
_REPORTED_TEXTS = 3


def align(config: AdvancedConfig, initial: GPT, machine: Machine, say: Say) -> int:
    """Read terms and text, go from round to round, write the last good one. The exit code."""
    assert config.align_terms is not None
    assert initial.tokenizer is not None
    terms = list(dict.fromkeys(read_terms(config.align_terms, "--align-terms")))
    _check_spelling(terms, initial.tokenizer, config)
    trained, held_out = split_terms(terms, config.seed)
    corpus = _original_text(config, initial.tokenizer, say)
    device, dtype, choices = machine
    identity = make_identity(
        config,
        hashlib.sha256(metadata.canonical_json([corpus.content_sha256, terms])).hexdigest(),
        initial.tokenizer,
        initial,
        without=("align_terms", "anchor_text"),
    )
    name = f"{Path(config.init or 'gpt').stem}-aligned"
    output = Path(config.output)
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
                "versions": versions(),
            }
            folder.check_space(4 * 4 * 4 * initial.config.n_parameters())
            folder.begin(content, flags_as_text(config))
        run = _Run(config, folder, trained, held_out, choices, say)
        say(f"terms: {len(trained)} to learn, {len(held_out)} held out for judging")
        if not held_out:
            say("note: fewer than three terms, so none is held out for judging")
        train_tokens, val_tokens = corpus.split(config.val_fraction)
        model = initial.set_kernels(picked).to(device)
        trainer = run.make_trainer(model, train_tokens, val_tokens, dtype)
        if start is not None:
            folder.cut_journals(start.state["journals"])
            trainer.load_state(start.load_trainer())
            run.earlier = start.state["seconds"]
            if trainer.stopped is not None:
                say(f"this run is finished, in {folder.path} (--resume never trains anew)")
            else:
                say(f"going on after round {len(trainer.rounds) - 1}")
        return run.carry_out(trainer, output)


def split_terms(terms: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Terms to learn, and a third of them that only judges; none of fewer than three."""
    count = max(1, round(len(terms) * _HELD_OUT_TERMS)) if len(terms) >= 3 else 0
    order = np.random.default_rng(seed).permutation(len(terms))
    held = set(order[:count].tolist())
    return (
        [term for i, term in enumerate(terms) if i not in held],
        [term for i, term in enumerate(terms) if i in held],
    )


def _check_spelling(terms: Sequence[str], tokenizer: Tokenizer, config: AdvancedConfig) -> None:
    """Raises: InputError naming a term that the vocabulary cannot write in any case."""
    for term in terms:
        problem: UnknownCharacterError | None = None
        for spelling in (term, term.lower(), term.upper(), term.capitalize()):
            try:
                tokenizer.encode(spelling)
                break
            except UnknownCharacterError as error:
                problem = problem or error
        else:
            assert problem is not None
            raise InputError(
                f"--align-terms: the model of {config.init} cannot write {term!r}: its vocabulary "
                f"lacks the character {problem.character!r}"
            )


def _original_text(config: AdvancedConfig, tokenizer: Tokenizer, say: Say) -> Corpus:
    sources = None if config.anchor_text is None else (config.anchor_text,)
    try:
        corpus = prepare(sources, tokenizer_kind=tokenizer.kind, tokenizer=tokenizer, note=say)
    except InputError as error:
        if sources is not None:
            raise
        raise UsageError(
            f"--anchor-text is needed: the text that comes with Python does not fit the model "
            f"({error})"
        ) from None
    if sources is None:
        say("note: without --anchor-text the text that comes with Python stands for original text")
    return corpus


class _Run:
    """Rounds and what they leave."""

    def __init__(
        self,
        config: AdvancedConfig,
        folder: RunDirectory,
        terms: list[str],
        held_out: list[str],
        choices: dict[str, str],
        say: Say,
    ) -> None:
        self.config, self.folder, self.say = config, folder, say
        self.terms, self.held_out, self.choices = terms, held_out, choices
        self.started, self.earlier = time.monotonic(), 0.0
        self.warned: list[str] = []

    def make_trainer(
        self, model: GPT, train_tokens: np.ndarray, val_tokens: np.ndarray, dtype: torch.dtype
    ) -> SelfAlignTrainer:
        """The rounds' settings, from the flags."""
        config, tokenizer = self.config, model.tokenizer
        assert tokenizer is not None
        rate = config.learning_rate or default_learning_rate(model.config.n_embd) * _LEARNING_RATE
        fit = FitConfig(
            max_completion_length=config.max_completion_length,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=rate,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
        )
        try:
            policy = GPTPolicy(model, train_tokens, val_tokens, fit, dtype=dtype)
        except ValueError as error:
            raise InputError(f"--anchor-text: {error}") from None
        reward = AlignmentReward(self.terms, usual_nll=policy.usual_nll())
        corpus = tokenizer.decode(np.asarray(train_tokens).tolist())
        settings = SelfAlignConfig(
            rounds=config.rounds,
            num_generations=config.num_generations,
            beta=config.beta or 1.0,
            scale_rewards="none" if config.scale_rewards == "none" else "std",
            max_weight=config.max_weight,
            anchor_fraction=config.anchor_fraction,
            kl_budget=config.kl_budget,
            seed=config.seed,
        )
        return SelfAlignTrainer(
            policy,
            reward,
            settings,
            accepts=reward.accepts,
            measure=TextMeasures(self.terms, self.held_out, corpus),
            progress=lambda what, part: self.say(f"{what} …"),
        )

    def carry_out(self, trainer: SelfAlignTrainer, output: Path) -> int:
        """Rounds until it stops by itself; every one is saved."""
        while trainer.stopped is None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", RuntimeWarning)
                trainer.step()
            for warning in caught:
                self.say(f"WARNING: {warning.message}")
            if trainer.stopped is None or trainer.rounds[-1]["round"] > self._told:
                self._tell_round(trainer)
            self._save(trainer)
        kept = max(row["round"] for row in trainer.rounds if row["kept"])
        self.say(f"stopped: {trainer.stopped}")
        model = trainer.policy.model  # type: ignore[attr-defined]
        if kept == 0:
            self.say("no round was kept: the model written is the one of --init")
        checkpoint.write_output(model, output)
        self.say(f"wrote {output}: round {kept}")
        report = self._write_report(trainer, kept, model)
        self.say(f"report: {report}")
        if self.config.json:
            summary = {
                "status": "finished",
                "stopped": trainer.stopped,
                "round": kept,
                "rounds": trainer.rounds,
                "terms": self.terms,
                "held_out_terms": self.held_out,
                "output": str(output),
                "run_dir": str(self.folder.path),
                "report": str(report),
            }
            print(json.dumps(summary))
        else:
            print(_table(trainer.rounds, kept))
        return 0

    _told = -1

    def _tell_round(self, trainer: SelfAlignTrainer) -> None:
        row = trainer.rounds[-1]
        if row["round"] <= self._told:
            return
        self._told = row["round"]
        self.folder.append("metrics.jsonl", {**row, "step": row["round"]})
        name = "the base" if row["round"] == 0 else f"round {row['round']}"
        change = "" if row.get("val_loss") is None else f", general text {row['val_loss']:.4f} nats"
        self.say(
            f"{name}: {row['term_rate']:.3g} terms in 1,000 tokens, KL {row['kl']:.3g} nats a "
            f"text{change}"
        )

    def _save(self, trainer: SelfAlignTrainer) -> None:
        state = {
            "finished": trainer.stopped is not None,
            "seconds": self._seconds,
            "journals": self.folder.journal_sizes(),
        }
        model = trainer.policy.model  # type: ignore[attr-defined]
        # A number of its own for what is saved without a new round: that it has stopped.
        step = len(trainer.rounds) + (trainer.stopped is not None)
        try:
            self.folder.save(step, model, trainer.state(), state, model)
        except OSError as error:
            self.say(f"WARNING: round {step} could not be saved: {error.strerror or error}")

    @property
    def _seconds(self) -> float:
        return round(self.earlier + time.monotonic() - self.started, 3)

    def _write_report(self, trainer: SelfAlignTrainer, kept: int, model: GPT) -> Path:
        shape = model.config
        samples = trainer._drawn[kept].samples.texts
        base = trainer._drawn[0].samples.texts
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
