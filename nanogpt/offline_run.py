"""An offline run: rewarded records -> weights -> a model, and with --compare the proof.

`train_offline` reads as the story of the run. Every model of a comparison has a run directory of
its own, so that an interrupted command goes on wherever it was.
"""

import copy
import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt import checkpoint
from nanogpt.comparison import compare, write_samples
from nanogpt.config import AdvancedConfig, GPTConfig, default_learning_rate, shape_from_flags
from nanogpt.errors import InputError, NanoGPTError, UsageError
from nanogpt.interruption import EXIT_CODES, signals_noted
from nanogpt.judge import BagOfWordsJudge
from nanogpt.machine import versions
from nanogpt.model import GPT
from nanogpt.offline_rl import (
    EpochMetrics,
    LabelTrainer,
    PreferenceTrainer,
    RewardWeightedConfig,
    RewardWeightedTrainer,
    binary_labels,
    preference_pairs,
)
from nanogpt.plan import (
    bpe_vocab_size,
    choose_kernels,
    find_start,
    keep_threads,
    make_identity,
    run_path,
)
from nanogpt.progress import TrainingProgress
from nanogpt.records import Examples, encode_records, mismatched_records, split_records
from nanogpt.report.alignment import OfflineReport, offline_verdict, render_offline_report
from nanogpt.reporter import flags_as_text
from nanogpt.reward_data import (
    Finding,
    RewardRecord,
    check_reward_data,
    read_reward_data,
    record_groups,
)
from nanogpt.run_directory import Checkpoint, RunDirectory, json_ready
from nanogpt.saver import Saver
from nanogpt.tilt import WeightStats
from nanogpt.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)

Say = Callable[[str], None]
Machine = tuple[torch.device, torch.dtype, dict[str, str]]
BASE, PLAIN, WEIGHTED, BEST = "base", "plain", "weighted", "best fifth"
_BEST_PART = 0.2
_FEW_RECORDS = 40
_SMALL_ESS = 0.1
_DIVERGED_AFTER = 20
# Training a model that already writes moves it gently; preferences more gently still.
_OF_TRAINED, _OF_PREFERENCES = 1 / 4, 1 / 40


@dataclass(frozen=True)
class OfflinePlan:
    """An offline run with every choice made; nothing of it changes while it goes on.

    Attributes:
        records: what the models learn from.
        held_out: validates every epoch and picks the best one; may be empty.
        judged: the other half of the file, with --compare; else empty.
        findings: about the file.
        settings: of each model by its name, in the order of training. The base, where there is one,
            is what the others begin with.
    """

    config: AdvancedConfig
    shape: GPTConfig
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    records: Sequence[RewardRecord]
    held_out: Sequence[RewardRecord]
    judged: Sequence[RewardRecord]
    findings: Sequence[Finding]
    settings: dict[str, RewardWeightedConfig]
    choices: dict[str, str]

    @property
    def objective(self) -> str:
        """Preferences and labels need rewards that differ; equal ones leave plain training."""
        constant = any(finding.name == "constant" for finding in self.findings)
        return "weighted" if constant else self.config.objective


def train_offline(config: AdvancedConfig, initial: GPT | None, machine: Machine, say: Say) -> int:
    """Read, check, weigh, train, and with --compare judge. Returns the exit code."""
    assert config.offline_data is not None
    records = read_reward_data(config.offline_data)
    tokenizer = _tokenizer(config, initial, records, say)
    if initial is None:
        shape = shape_from_flags(config, tokenizer.vocab_size)
    else:
        shape = replace(initial.config, dropout=config.dropout)
    plan = _make_plan(config, shape, tokenizer, machine, records)
    for finding in plan.findings:
        say(f"{'WARNING' if finding.serious else 'note'}: {finding}")
    identity = make_identity(
        config, _content_digest(records), tokenizer, initial, without=("offline_data",)
    )
    name = "rewards" if config.offline_data == "-" else Path(config.offline_data).stem
    run = _Run(plan, initial, run_path(config, name, shape, identity), identity, say)
    return run.carry_out()


def _tokenizer(
    config: AdvancedConfig, initial: GPT | None, records: Sequence[RewardRecord], say: Say
) -> Tokenizer:
    """That of --init, or one made from the records' texts, never from their rewards."""
    size = bpe_vocab_size(config, say)
    if initial is not None:
        assert initial.tokenizer is not None
        return initial.tokenizer
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        assert size is not None
        return BPETokenizer.train((record.text for record in records), size)
    return CharTokenizer("".join(sorted({c for record in records for c in record.text})))


def _make_plan(
    config: AdvancedConfig,
    shape: GPTConfig,
    tokenizer: Tokenizer,
    machine: Machine,
    records: Sequence[RewardRecord],
) -> OfflinePlan:
    """Raises: InputError for a text that cannot be spelled; UsageError for an impossible target."""
    device, dtype, choices = machine
    try:
        examples = encode_records(records, tokenizer, shape.block_size)
    except InputError as error:
        raise InputError(f"{config.offline_data}, {error}") from None
    prompts = [len(tokenizer.encode(record.prompt)) if record.prompt else 0 for record in records]
    counts = examples.record_counts.tolist()
    sizes = [count + prompt for count, prompt in zip(counts, prompts, strict=True)]
    findings = check_reward_data(records, sizes, shape.block_size)
    learnt: Sequence[RewardRecord] = records
    judged: Sequence[RewardRecord] = ()
    comparing = config.compare and not any(finding.name == "constant" for finding in findings)
    if comparing:
        if len(records) < _FEW_RECORDS:
            raise InputError(
                f"{config.offline_data} holds {len(records)} records, too few for --compare: it "
                f"needs {_FEW_RECORDS}, half to learn from and half for the judge"
            )
        ours, theirs = split_records(records, 0.5, config.seed)
        learnt, judged = _chosen(records, ours), _chosen(records, theirs)
        if len(judged) < _FEW_RECORDS // 2 or len(learnt) < _FEW_RECORDS // 2:
            raise InputError(
                f"{config.offline_data} cannot be cut into two halves for --compare: records "
                f"of one prompt, group or text stay together, which leaves {len(learnt)} and "
                f"{len(judged)}"
            )
        for half in (learnt, judged):
            if len({record.reward for record in half}) < 2:
                raise InputError(
                    f"{config.offline_data}: half of the records have one reward only, so "
                    f"--compare cannot tell better from worse: it needs more different rewards"
                )
    train, held = split_records(learnt, config.val_fraction, config.seed)
    if config.val_fraction and not len(held):
        message = "nothing can be held out: records of one prompt, group or text stay together"
        findings.append(Finding("held out", True, message))
    plan = OfflinePlan(
        config=config,
        shape=shape,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        records=_chosen(learnt, train),
        held_out=_chosen(learnt, held),
        judged=judged,
        findings=findings,
        settings=_settings(config, shape, len(train), comparing),
        choices=choices,
    )
    try:
        for settings in plan.settings.values():
            weigh(settings, plan.records)
        if plan.objective == "dpo":
            _pairs(plan.records, config)
    except ValueError as error:
        flag = "--target-kl" if config.target_kl is not None else "--target-ess"
        raise UsageError(f"{flag}: {error}") from None
    return plan


def _chosen(records: Sequence[RewardRecord], rows: np.ndarray) -> list[RewardRecord]:
    return [records[row] for row in rows.tolist()]


def _settings(
    config: AdvancedConfig, shape: GPTConfig, n: int, comparing: bool
) -> dict[str, RewardWeightedConfig]:
    plain_epochs = config.plain_epochs
    if plain_epochs is None:
        plain_epochs = 0 if config.init else config.epochs
    usual = config.learning_rate or default_learning_rate(shape.n_embd)
    share = _OF_TRAINED if config.init or plain_epochs else 1.0
    if config.objective != "weighted":
        share = _OF_PREFERENCES
    ess = config.target_ess
    weighted = RewardWeightedConfig(
        beta=config.beta or (1.0 if config.objective == "weighted" else 0.1),
        target_ess=ess * n if ess is not None and ess < 1 else ess,
        target_kl=config.target_kl,
        weighting=config.weighting,
        top_fraction=config.top_fraction,
        scale_rewards=config.scale_rewards,
        max_weight=config.max_weight,
        kl_coef=config.kl_coef,
        learning_rate=config.learning_rate or usual * share,
        warmup_steps=config.warmup_steps,
        num_train_epochs=config.epochs,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        grad_clip=config.grad_clip,
        seed=config.seed,
    )
    free = replace(weighted, target_ess=None, target_kl=None)
    plain = replace(free, weighting="identity")
    found = {}
    if plain_epochs:
        rate = usual * (_OF_TRAINED if config.init and not config.learning_rate else 1.0)
        found[BASE] = replace(plain, kl_coef=0.0, num_train_epochs=plain_epochs, learning_rate=rate)
    found[WEIGHTED] = weighted
    if comparing:
        found[PLAIN] = plain
        found[BEST] = replace(free, weighting="topk", top_fraction=_BEST_PART)
    return found


def weigh(
    settings: RewardWeightedConfig, records: Sequence[RewardRecord]
) -> tuple[torch.Tensor, WeightStats]:
    """Weights of records (n,) float64 of mean 1, within their groups where they have some."""
    return settings.weigh([record.reward for record in records], record_groups(records))


def _pairs(records: Sequence[RewardRecord], config: AdvancedConfig) -> np.ndarray:
    """Raises: InputError where no two records that are compared differ."""
    rewards = [record.reward for record in records]
    pairs = preference_pairs(rewards, record_groups(records), config.seed)
    if not len(pairs):
        raise InputError(
            f"{config.offline_data} makes no pairs for --objective dpo: no two records that are "
            f"compared have different rewards"
        )
    return pairs


def _content_digest(records: Sequence[RewardRecord]) -> str:
    digest = hashlib.sha256()
    for record in records:
        row = [record.prompt, record.completion, record.reward, record.group]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


class _Run:
    """One command: a model or three, in a run directory and folders below it."""

    def __init__(
        self, plan: OfflinePlan, initial: GPT | None, path: Path, identity: dict[str, Any], say: Say
    ) -> None:
        self.plan, self.initial, self.path = plan, initial, path
        self.identity, self.say = identity, say
        self.output = Path(plan.config.output)
        self.stats: WeightStats | None = None
        self.weights: list[float] = []

    def carry_out(self) -> int:
        """Train what is not trained yet, write, compare. Returns the exit code."""
        self._introduce()
        models: dict[str, GPT] = {}
        summary: dict[str, Any] = {}
        with RunDirectory(self.path, warn=self.say) as folder:
            self._begin(folder)
            for name in self.plan.settings:
                if name == WEIGHTED:
                    model, state, received = self._train(name, folder)
                    summary = self._summary(state, folder)
                else:  # with a directory of its own below
                    below = self.path / name.replace(" ", "-")
                    with RunDirectory(below, warn=self.say) as own:
                        model, state, received = self._train(name, own)
                if received is not None:
                    self._write_report(folder, "interrupted", [])
                    self.say("saved; the same command goes on from here")
                    return self._end(summary | {"status": "interrupted"}, received)
                models[name] = model
                if name == BASE:
                    self.initial = model
                if name == WEIGHTED and folder.deliver(model, self.output):
                    self.say(f"wrote {self.output}: the best model, of epoch {state['best_epoch']}")
            arms = self._compare(models, folder)
            report = self._write_report(folder, "finished", arms)
            self.say(f"report: {report}")
        if arms:
            summary["comparison"] = arms
            if not self.plan.config.json:
                print(_table(arms, self.judge))
        elif not self.plan.config.json:
            print(self._sample(models[WEIGHTED]))
        return self._end(summary | {"status": "finished", "report": str(report)}, None)

    def _introduce(self) -> None:
        plan, config = self.plan, self.plan.config
        shape = plan.shape
        self.say(
            f"{len(plan.records):,} records to learn from, {len(plan.held_out):,} held out"
            + (f", {len(plan.judged):,} for the judge" if plan.judged else "")
        )
        self.say(
            f"model: {shape.n_parameters():,} parameters, {shape.n_layer} layers, width "
            f"{shape.n_embd}, context {shape.block_size}"
        )
        if config.objective != "weighted":
            return
        weights, stats = weigh(plan.settings[WEIGHTED], plan.records)
        self.stats, self.weights = stats, weights.tolist()
        beta = f", beta {stats.beta:.4g}" if math.isfinite(stats.beta) else ""
        self.say(
            f"weights: {config.weighting}{beta}; effective sample size {stats.ess:,.0f} "
            f"({stats.ess_fraction:.0%}); mean reward {stats.reward_mean:.4g} in the data, "
            f"{stats.reward_weighted:.4g} under the weights; KL {stats.kl:.3g} nats"
        )
        kept = sum(weight > 0 for weight in self.weights) / len(self.weights)
        if config.weighting == "topk" and kept > 1.5 * config.top_fraction:
            self.say(
                f"note: {kept:.0%} of the records are learnt from and not the best "
                f"{config.top_fraction:.0%}: they share the lowest reward that is kept"
            )
        if stats.ess_fraction < _SMALL_ESS:
            self.say(
                f"WARNING: the weights use {stats.ess:,.0f} of {stats.n:,} records: a larger "
                f"--beta or --target-ess 0.5 would learn from more of them"
            )

    def _begin(self, folder: RunDirectory) -> None:
        """Say what the run is before its first model, so that --resume finds it."""
        config = self.plan.config
        find_start(config, folder, self.identity)  # refuses another configuration's run
        if config.resume != "never" and folder.read_identity() is not None:
            return
        content = {
            "identity": self.identity,
            "choices": self.plan.choices,
            "kernels": None,
            "versions": versions(),
        }
        folder.begin(content, flags_as_text(config))
        (folder.path / "comparison.json").unlink(missing_ok=True)

    # One model.

    def _train(
        self, name: str, folder: RunDirectory
    ) -> tuple[GPT, dict[str, Any], signal.Signals | None]:
        """The best model, the state at the end, and the signal that ended it early."""
        plan, config = self.plan, self.plan.config
        identity = self.identity if name == WEIGHTED else {**self.identity, "model": name}
        start = find_start(config, folder, identity)
        if start is not None and start.state["finished"]:
            if name == WEIGHTED:
                again = "--resume never trains anew"
                self.say(f"this run is finished, in {folder.path} ({again})")
            model = start.load_model("best").set_kernels("auto").to(plan.device)
            return model, start.state, None
        picked, why = choose_kernels(
            config.kernels, plan.shape, plan.device, plan.dtype, config.batch_size,
            folder if start else None,
        )  # fmt: skip
        if start is None:
            content = {
                "identity": identity,
                "choices": {**plan.choices, "kernels": why},
                "kernels": picked,
                "threads": torch.get_num_threads(),
                "versions": versions(),
            }
            folder.check_space(3 * 4 * 4 * plan.shape.n_parameters())
            folder.begin(content, flags_as_text(config))
        else:
            keep_threads(config.threads, folder, plan.choices)
            folder.cut_journals(start.state["journals"])
        model = self._model(start).set_kernels(picked).to(plan.device)
        trainer = self._trainer(name, model)
        return _Training(self, name, folder, model, trainer, start).go_on()

    def _model(self, start: Checkpoint | None) -> GPT:
        torch.manual_seed(self.plan.config.seed)
        model = start.load_model() if start else GPT(self.plan.shape)
        model.config = self.plan.shape
        if start is None and self.initial is not None:
            model.load_state_dict(self.initial.state_dict())
        model.tokenizer = self.plan.tokenizer
        model.recompute = self.plan.config.recompute
        return model

    def _trainer(self, name: str, model: GPT) -> RewardWeightedTrainer:
        plan, settings = self.plan, self.plan.settings[name]
        examples = self._examples(plan.records)
        options: dict[str, Any] = {"dtype": plan.dtype}
        if plan.held_out:
            options["eval_examples"] = self._examples(plan.held_out)
        if self.initial is not None and name != BASE:
            reference = copy.deepcopy(self.initial).to(plan.device).eval()
            options["reference"] = reference.requires_grad_(False)
        if plan.objective == "weighted" or name == BASE:
            weights, stats = weigh(settings, plan.records)
            if plan.held_out:
                # A target was met by the beta of what trains; what is held out takes the same.
                beta = stats.beta if math.isfinite(stats.beta) else settings.beta
                alike = replace(settings, target_ess=None, target_kl=None, beta=beta)
                options["eval_weights"] = weigh(alike, plan.held_out)[0]
            return RewardWeightedTrainer(model, settings, examples, weights, **options)
        rewards, held = ([r.reward for r in of] for of in (plan.records, plan.held_out))
        if plan.objective == "dpo":
            pairs, seed = _pairs(plan.records, plan.config), plan.config.seed
            if plan.held_out:
                options["eval_pairs"] = preference_pairs(held, record_groups(plan.held_out), seed)
            return PreferenceTrainer(model, settings, examples, pairs, **options)
        if plan.held_out:
            options["eval_desirable"] = binary_labels(held)
        if any(record.prompt for record in plan.records):
            options["mismatched"] = self._examples(
                mismatched_records(plan.records, plan.config.seed)
            )
        return LabelTrainer(model, settings, examples, binary_labels(rewards), **options)

    def _examples(self, records: Sequence[RewardRecord]) -> Examples:
        return encode_records(records, self.plan.tokenizer, self.plan.shape.block_size)

    # The proof.

    def _compare(self, models: dict[str, GPT], folder: RunDirectory) -> list[dict[str, Any]]:
        """The arms as dicts; kept in the run directory, so that they are made once."""
        plan, config = self.plan, self.plan.config
        if PLAIN not in models:
            if config.compare:
                self.say("all rewards are equal: there is nothing to compare")
            return []
        kept = folder.path / "comparison.json"
        if kept.exists():
            with kept.open(encoding="utf-8") as file:
                found: dict[str, Any] = json.load(file)
            self.judge = found["judge"]
            return list(found["arms"])
        self.say(f"fitting the judge on {len(plan.judged):,} other records")
        rewards = [record.reward for record in plan.judged]
        judge = BagOfWordsJudge([r.completion for r in plan.judged], rewards, config.seed)
        self.judge = json_ready(asdict(judge.quality))
        prompts = list(dict.fromkeys(r.prompt for r in plan.judged if r.prompt))
        sizes = [len(plan.tokenizer.encode(prompt)) for prompt in prompts]
        fit = [size <= plan.shape.block_size // 2 for size in sizes]
        if prompts and not all(fit):
            self.say(
                f"note: {fit.count(False):,} of {len(fit):,} prompts fill more than half of the "
                f"context; samples leave them out"
            )
            prompts = [prompt for prompt, fits in zip(prompts, fit, strict=True) if fits]
        longest = max((size for size, fits in zip(sizes, fit, strict=True) if fits), default=0)
        arms = compare(
            {name: models[name] for name in (PLAIN, WEIGHTED, BEST)},
            judge,
            self._examples(plan.judged),
            torch.tensor(rewards, dtype=torch.float64),
            n_samples=config.compare_samples,
            max_new_tokens=max(1, plan.shape.block_size - longest - 1),
            seed=config.seed,
            prompts=prompts,
            say=self.say,
        )
        as_dicts = [json_ready(asdict(arm)) for arm in arms]
        raw = json.dumps({"judge": self.judge, "arms": as_dicts}, indent=1).encode()
        checkpoint.write_atomically(kept, lambda file: file.write(raw))
        return as_dicts

    judge: dict[str, Any] | None = None

    # What it leaves.

    def _sample(self, model: GPT) -> str:
        _, (ids,) = write_samples(model, 1, self.plan.shape.block_size, seed=self.plan.config.seed)
        return self.plan.tokenizer.decode(ids)

    def _write_report(
        self, folder: RunDirectory, status: str, arms: Sequence[dict[str, Any]]
    ) -> Path:
        plan, shape = self.plan, self.plan.shape
        samples = [(arm["name"], text) for arm in arms for text in arm["samples"][:2]]
        rows = folder.journal("metrics.jsonl")
        report = OfflineReport(
            title=f"{self.path.name}: a GPT of {shape.n_parameters():,} parameters",
            status=status,
            checks=[str(finding) for finding in plan.findings],
            stats=None if self.stats is None else asdict(self.stats),
            weights=self.weights,
            rewards=[record.reward for record in plan.records],
            epochs=rows,
            arms=arms,
            judge=self.judge,
            samples=samples,
            config=flags_as_text(plan.config),
            choices=(folder.read_identity() or {}).get("choices", plan.choices),
            model={**asdict(shape), "n_parameters": shape.n_parameters()},
            versions=versions(),
            events=folder.journal("events.jsonl"),
            seconds=rows[-1]["seconds"] if rows else 0.0,
        )
        return folder.write_report(render_offline_report(report))

    def _summary(self, state: dict[str, Any], folder: RunDirectory) -> dict[str, Any]:
        return {
            "steps": state["trainer_step"],
            "best_epoch": state["best_epoch"],
            "val_loss": state["best_val_loss"],
            "weights": None if self.stats is None else json_ready(asdict(self.stats)),
            "findings": [asdict(finding) for finding in self.plan.findings],
            "output": str(self.output),
            "run_dir": str(folder.path),
        }

    def _end(self, summary: dict[str, Any], received: signal.Signals | None) -> int:
        if self.plan.config.json:
            print(json.dumps(json_ready(summary), allow_nan=False))
        return 0 if received is None else EXIT_CODES[received]


class _Training:
    """The epochs of one model, with a checkpoint after each and where a signal ends it."""

    def __init__(
        self,
        run: _Run,
        name: str,
        folder: RunDirectory,
        model: GPT,
        trainer: RewardWeightedTrainer,
        start: Checkpoint | None,
    ) -> None:
        self.run, self.name, self.folder = run, name, folder
        self.model, self.trainer = model, trainer
        self.saver = Saver(folder, start, run.say)
        self.best_epoch: int | None = None
        self.best_val_loss: float | None = None
        self.earlier = 0.0
        self.started = time.monotonic()
        if start is not None:
            trainer.load_state(start.load_trainer())
            self.best_epoch = start.state["best_epoch"]
            self.best_val_loss = start.state["best_val_loss"]
            self.earlier = start.state["seconds"]
            run.say(f"{name}: going on from step {trainer.progress.step:,}")

    def go_on(self) -> tuple[GPT, dict[str, Any], signal.Signals | None]:
        """Train to the end or to a signal: the best model, the state, the signal."""
        trainer, config = self.trainer, self.run.plan.config
        bar = TrainingProgress(trainer.total_steps, trainer.progress.step, quiet=config.json)
        with bar, self.saver, signals_noted() as received:
            bar.say(f"{self.name}: {trainer.total_steps:,} steps")
            tokens, skipped, since = 0, 0, time.monotonic()
            while not trainer.finished and not received:
                step = trainer.step()
                tokens += step.tokens
                bar.update(step.step, step.loss, tokens / max(time.monotonic() - since, 1e-9))
                skipped = skipped + 1 if step.skipped else 0
                if step.skipped:
                    self._event(bar, f"step {step.step:,} was skipped: its loss was not finite")
                if skipped >= _DIVERGED_AFTER:
                    raise NanoGPTError(
                        f"{skipped} steps in a row had no finite loss and gradient: a smaller "
                        f"--learning-rate or --dtype float32 may help"
                    )
                if step.step % trainer.steps_per_epoch == 0:
                    is_best = self._judge(trainer.measure_epoch(), step.learning_rate, bar)
                    self._save(is_best)
            if received:
                if not trainer.finished:
                    self._event(bar, f"{signal.Signals(received[0]).name} ended it early")
                    if not self.saver.has(trainer.progress.step):
                        self._save(is_best=False)
                if not self.saver.has(trainer.progress.step):
                    raise NanoGPTError(
                        f"stopped, and the last steps are not saved: {self.saver.goes_on()}"
                    )
                return self.model, self._state(), signal.Signals(received[0])
        return self.saver.best().to(self.run.plan.device), self._state(), None

    @property
    def _seconds(self) -> float:
        return round(self.earlier + time.monotonic() - self.started, 3)

    def _judge(self, epoch: EpochMetrics, rate: float, bar: TrainingProgress) -> bool:
        """Note the epoch's figures. Returns whether this is the best model so far."""
        weighted = self.run.plan.objective == "weighted" or self.name == BASE
        val_loss = (epoch.val_nll_weighted if weighted else epoch.val_loss).mean
        # Without anything held out the latest model is the best one.
        judged = self.trainer.eval_examples is not None
        is_best = not judged or self.best_val_loss is None or val_loss < self.best_val_loss
        if is_best:
            self.best_epoch = epoch.epoch
            self.best_val_loss = val_loss if math.isfinite(val_loss) else None
        row = {
            "step": epoch.step,
            "epoch": epoch.epoch,
            "train_loss": epoch.train_nll_weighted,
            "train_nll": epoch.train_nll,
            "val_loss": val_loss,
            "val_accuracy": epoch.val_accuracy.mean,
            "val_nll": epoch.val_nll.mean,
            "kl_ref": epoch.kl_ref.mean,
            "loss": epoch.loss,
            "grad_norm": epoch.grad_norm,
            "learning_rate": rate,
            "seconds": self._seconds,
        }
        self.folder.append("metrics.jsonl", json_ready(row))
        shown = [f"loss {epoch.loss:.4f}"]
        for value, text in (
            (val_loss, "held out {:.4f}"),
            (epoch.val_accuracy.mean, "{:.1%} the right way"),
            (epoch.val_nll.mean, "{:.4f} nats a token unweighted"),
            (epoch.kl_ref.mean, "KL to the start {:.4f} nats a token"),
        ):
            if math.isfinite(value):
                shown.append(text.format(value))
        mark = "  (best so far)" if is_best else ""
        bar.say(f"{self.name}, epoch {epoch.epoch}: {', '.join(shown)}{mark}")
        return is_best

    def _event(self, bar: TrainingProgress, message: str) -> None:
        bar.say(f"note: {message}")
        step = self.trainer.progress.step
        self.folder.append("events.jsonl", {"step": step, "kind": "event", "message": message})

    def _state(self) -> dict[str, Any]:
        return {
            "finished": self.trainer.finished,
            "trainer_step": self.trainer.progress.step,
            "best_epoch": self.best_epoch,
            "best_val_loss": self.best_val_loss,
            "seconds": self._seconds,
        }

    def _save(self, is_best: bool) -> None:
        step, state = self.trainer.progress.step, self._state()
        self.saver.save(step, self.model, self.trainer.state(), state, is_best=is_best)


def _table(arms: Sequence[dict[str, Any]], judge: Mapping[str, Any] | None) -> str:
    """The proof as text."""

    def interval(estimate: dict[str, float] | None) -> str:
        if estimate is None:
            return ""
        return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"

    head = ["model", "judged reward", "above plain", "KL to plain", "distinct-2", "good texts",
            "bad texts"]  # fmt: skip
    rows = [
        [
            arm["name"],
            interval(arm["reward"]),
            interval(arm["above_plain"]),
            "" if arm["kl_to_plain"] is None else f"{arm['kl_to_plain']['mean']:.2f}",
            "" if arm["distinct"][1] is None else f"{arm['distinct'][1]:.3f}",
            interval(arm["nll_high"]),
            interval(arm["nll_low"]),
        ]
        for arm in arms
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in [head, *rows]]  # fmt: skip
    return "\n".join(
        [
            *lines,
            "",
            "Means with 95 % intervals. KL in nats a text, along the model's own samples. Good and "
            "bad texts: unseen",
            "records above and below the mean reward, nats a text more than plain training gives "
            "them.",
            offline_verdict(arms, judge),
        ]
    )
