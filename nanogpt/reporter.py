"""What a run shows of itself: baselines of its text, TensorBoard files, report.html."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from nanogpt.baselines import text_baselines
from nanogpt.config import as_plain_dict
from nanogpt.data import Corpus
from nanogpt.plan import Plan
from nanogpt.report.training import TrainingReport, render_training_report
from nanogpt.run_directory import RunDirectory
from nanogpt.trainer import Position

_BASELINE_TRAIN_TOKENS, _BASELINE_VAL_TOKENS = 16_000_000, 4_000_000


class Reporter:
    """Baselines, TensorBoard and report.html of a run."""

    def __init__(
        self, plan: Plan, corpus: Corpus, folder: RunDirectory, versions: dict[str, str]
    ) -> None:
        self.plan, self.corpus, self.folder, self.versions = plan, corpus, folder, versions
        train, val = corpus.split(plan.config.val_fraction)
        decode = corpus.tokenizer.decode_array
        self.train_tokens, self.val_tokens = len(train), len(val)
        self.baselines = text_baselines(
            decode(train[-_BASELINE_TRAIN_TOKENS:]),
            decode(val[:_BASELINE_VAL_TOKENS]),
        )
        self._board = self._open_board()

    def _open_board(self) -> Any:
        if not self.plan.config.tensorboard:
            return None
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            print("TensorBoard files are left out: tensorboardX is not installed", file=sys.stderr)
            return None
        return SummaryWriter(str(self.folder.path / "tensorboard"))

    def scalars(self, row: dict[str, Any]) -> None:
        """Pass a row of metrics to TensorBoard."""
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, row["step"])

    def text(self, step: int, text: str) -> None:
        """Pass a sample to TensorBoard."""
        if self._board is not None:
            self._board.add_text("sample", text, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, position: Position, status: str) -> Path:
        """Write report.html as the run stands."""
        plan, corpus, tokenizer = self.plan, self.corpus, self.corpus.tokenizer
        per_nat = None if plan.bytes_per_target is None else plan.bits_per_byte(1.0)
        report = TrainingReport(
            title=f"{corpus.name}: a GPT of {plan.shape.n_parameters():,} parameters",
            status=status,
            metrics=self.folder.journal("metrics.jsonl"),
            samples=self.folder.journal("samples.jsonl"),
            config=flags_as_text(plan.config),
            choices=plan.choices,
            corpus={
                "name": corpus.name,
                "n_bytes": corpus.n_bytes,
                "n_tokens": corpus.n_tokens,
                "n_documents": corpus.n_documents,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer": tokenizer.kind,
                "train_tokens": self.train_tokens,
                "val_tokens": self.val_tokens,
            },
            baselines=self.baselines,
            bits_per_nat_target=per_nat,
            model={
                **dataclasses.asdict(plan.shape),
                "n_parameters": plan.shape.n_parameters(),
                "flops_per_token": plan.shape.flops_per_token(),
            },
            versions=self.versions,
            events=self.folder.journal("events.jsonl"),
            best_step=position.best_step,
            best_val_loss=position.best_val_loss,
            seconds=position.seconds,
        )
        return self.folder.write_report(render_training_report(report))


def flags_as_text(config: Any) -> dict[str, Any]:
    """The flags that differ from None, under the names that --config reads."""
    return {
        name.replace("_", "-"): value
        for name, value in as_plain_dict(config).items()
        if value is not None and value != []
    }
