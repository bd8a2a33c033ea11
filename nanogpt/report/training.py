"""The report of a training run: one HTML page that opens with no network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanogpt.report.page import template
from nanogpt.report.plots import Chart, Series, smoothed

_MOST_SAMPLES = 6
_LONGEST_SAMPLE = 2000


@dataclass(frozen=True)
class TrainingReport:
    """What a report shows.

    Attributes:
        status: "finished" | "interrupted" | "running".
        metrics: rows of metrics.jsonl.
        samples: {"step", "text"} in the order of writing.
        choices: what was picked for this machine, and why.
        baselines: name -> bits per byte.
        bits_per_nat_target: bits per byte for a loss of one nat per target; None without
            validation text.
        events: {"step", "kind", "message"}.
        best_val_loss: nats per target.
        seconds: of all processes of the run.
    """

    title: str
    status: str
    metrics: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    corpus: Mapping[str, Any] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)
    bits_per_nat_target: float | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    best_step: int | None = None
    best_val_loss: float | None = None
    seconds: float = 0.0


def render_training_report(run: TrainingReport) -> str:
    """The page as HTML; the same run gives the same bytes."""
    return template("training.html.j2").render(
        run=run,
        title=run.title,
        status=f"Training report, {run.status}",
        verdict=_verdict(run),
        figures=_figures(run),
        charts=[chart for chart in _charts(run) if chart[1]],
        samples=_chosen_samples(run.samples),
        tables=_tables(run),
    )


def _verdict(run: TrainingReport) -> str:
    """One sentence: how good the model is, against what is simple."""
    if run.best_val_loss is None or run.bits_per_nat_target is None:
        return "No text was held out, so nothing was validated."
    bits = run.best_val_loss * run.bits_per_nat_target
    ngram = run.baselines.get("order-5 n-gram")
    if ngram is None:
        return f"The best model needs {bits:.3f} bits for a byte of text it has not seen."
    share = abs(1 - bits / ngram)
    if bits < ngram:
        compared = f"{share:.0%} fewer than an order-5 n-gram model of the same text"
    else:
        compared = f"still {share:.0%} more than an order-5 n-gram model of the same text"
    return f"The best model needs {bits:.3f} bits for a byte of text it has not seen, {compared}."


def _figures(run: TrainingReport) -> list[tuple[str, str]]:
    """The large numbers at the top: (value, what it is)."""
    figures = []
    if run.best_val_loss is not None:
        step = f" at step {run.best_step:,}" if run.best_step else ""
        figures.append((f"{run.best_val_loss:.4f}", f"validation loss, nats a token{step}"))
        if run.bits_per_nat_target is not None:
            bits = run.best_val_loss * run.bits_per_nat_target
            figures.append((f"{bits:.3f}", "bits a byte"))
    figures += [(f"{bits:.3f}", f"{name}, bits a byte") for name, bits in run.baselines.items()]
    if "n_parameters" in run.model:
        figures.append((_short(run.model["n_parameters"]), "parameters"))
    rates = [row["tokens_per_second"] for row in run.metrics if row.get("tokens_per_second")]
    if rates:
        figures.append((_short(sorted(rates)[len(rates) // 2]), "tokens a second, median"))
    figures.append((duration(run.seconds), "time"))
    return figures


def _charts(run: TrainingReport) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(title, SVG, legend of (style, name))."""

    def column(name: str) -> list[tuple[float, float]]:
        return [(r["step"], r[name]) for r in run.metrics if r.get(name) is not None]

    train, val = column("train_loss"), column("val_loss")
    levels, best = [], None
    if run.bits_per_nat_target and val:
        levels = [(name, bits / run.bits_per_nat_target) for name, bits in run.baselines.items()]
    if run.best_step is not None and run.best_val_loss is not None:
        best = (run.best_step, run.best_val_loss, f"{run.best_val_loss:.4f}")
    loss = Chart(
        "Loss",
        "optimizer step",
        "nats a token",
        [
            Series("training", train, "train raw"),
            Series("training, smoothed", smoothed(train), "train"),
            Series("validation", val, "val", marks=True),
        ],
        levels=levels,
        highlight=best,
    )
    rate = Chart(
        "Learning rate",
        "optimizer step",
        "learning rate",
        [Series("learning rate", column("learning_rate"), "rate")],
        start_at_zero=True,
    )
    speed = Chart(
        "Speed",
        "optimizer step",
        "tokens a second",
        [Series("speed", column("tokens_per_second"), "rate")],
        start_at_zero=True,
    )
    legend = [("train", "training"), *([("val", "validation")] if val else [])]
    if levels:
        legend.append(("level", "baselines of the same text"))
    return [
        ("Loss", loss.svg(), legend),
        ("Learning rate", rate.svg(), []),
        ("Speed", speed.svg(), []),
    ]


def _chosen_samples(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """First, last and some between, newest first: (heading, text)."""
    count = len(samples)
    last = _MOST_SAMPLES - 1
    picked: Sequence[int] = range(count)
    if count > _MOST_SAMPLES:
        picked = sorted({round(i * (count - 1) / last) for i in range(last + 1)})
    chosen = [samples[i] for i in reversed(picked)]
    return [(f"Step {s['step']:,}", str(s["text"])[:_LONGEST_SAMPLE]) for s in chosen]


def _tables(run: TrainingReport) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, rows of (name, value)) of everything that identifies the run."""
    parts = (
        ("Text", run.corpus),
        ("Model", run.model),
        ("Picked for this machine", run.choices),
        ("Flags", run.config),
        ("Versions", run.versions),
    )
    return [
        (heading, [(name.replace("_", " "), shown(value)) for name, value in values.items()])
        for heading, values in parts
        if values
    ]


def shown(value: Any) -> str:
    """A value of a table, for reading."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def _short(value: float) -> str:
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= limit:
            return f"{value / (1e3 if unit == ' k' else limit):,.1f}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
