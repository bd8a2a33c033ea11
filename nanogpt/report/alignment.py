"""The reports of `advanced`: offline RL, and self-alignment round by round."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanogpt.report.page import template
from nanogpt.report.plots import Chart, Histogram, Intervals, Series
from nanogpt.report.training import duration, shown

_LONGEST_SAMPLE = 600
_MOST_SAMPLES = 4


_USABLE_AUROC = 0.6


@dataclass(frozen=True)
class Part:
    """A section: a chart, a table, a note, or some of them."""

    title: str
    svg: str = ""
    legend: Sequence[tuple[str, str]] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ""


@dataclass(frozen=True)
class OfflineReport:
    """What the report of an offline run shows.

    Attributes:
        status: "finished" | "interrupted" | "running".
        checks: sentences about the reward file.
        stats: WeightStats as a dict; None where there are no weights (dpo, kto).
        weights: of all training records.
        rewards: of all training records.
        epochs: rows of metrics.jsonl.
        arms: of --compare, plain training first; empty without.
        judge: JudgeQuality as a dict, with --compare.
        seconds: of all processes of the run.
    """

    title: str
    status: str
    checks: Sequence[str] = ()
    stats: Mapping[str, Any] | None = None
    weights: Sequence[float] = ()
    rewards: Sequence[float] = ()
    epochs: Sequence[Mapping[str, Any]] = ()
    arms: Sequence[Mapping[str, Any]] = ()
    judge: Mapping[str, Any] | None = None
    samples: Sequence[tuple[str, str]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class AlignmentReport:
    """What the report of a self-alignment shows.

    Attributes:
        rounds: metrics of every round; the first row is the base, round 0.
        reason: why it stopped, one sentence.
        chosen: the round that was written.
        terms, held_out_terms: what was trained on, and what only judged.
    """

    title: str
    status: str
    rounds: Sequence[Mapping[str, Any]] = ()
    reason: str = ""
    chosen: int = 0
    terms: Sequence[str] = ()
    held_out_terms: Sequence[str] = ()
    samples: Sequence[tuple[str, str]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0


def render_offline_report(run: OfflineReport) -> str:
    """The page as HTML; the same run gives the same bytes."""
    parts = [
        _comparison_chart(run),
        _comparison_table(run),
        _nll_table(run),
        _loss_part(run),
        _weights_part(run),
        _rewards_part(run),
    ]
    figures = []
    if run.stats is not None:
        stats = run.stats
        figures += [
            (f"{stats['reward_mean']:.3f}", "mean reward of the data"),
            (f"{stats['reward_weighted']:.3f}", "mean reward under the weights"),
            (f"{stats['ess_fraction']:.0%}", "effective sample size"),
            (f"{stats['kl']:.3f}", "KL of the weighted data, nats"),
        ]
    figures.append((duration(run.seconds), "time"))
    return _page(
        run,
        f"Offline RL report, {run.status}",
        offline_verdict(run.arms, run.judge),
        figures,
        [part for part in parts if part is not None],
        [{"kind": "check", "message": message} for message in run.checks],
    )


def offline_verdict(
    arms: Sequence[Mapping[str, Any]], judge: Mapping[str, Any] | None = None
) -> str:
    """Whether the samples of the first model after plain training are better, and by what judge."""
    if len(arms) < 2:
        return "Nothing was compared: --compare trains plainly too and judges both."
    found = _compared(arms)
    # None: the texts that it was tried on are all alike.
    if judge is None or judge["auroc"] is None or judge["auroc"] >= _USABLE_AUROC:
        return found
    return (
        f"{found} But the judge hardly tells good texts from bad (AUROC {judge['auroc']:.2f} of "
        f"{judge['n_held_out']:,} texts), so that this says little: more rewarded texts would help."
    )


def _compared(arms: Sequence[Mapping[str, Any]]) -> str:
    plain, ours = arms[0], arms[1]
    gain = ours["above_plain"]
    figures = f"{ours['reward']['mean']:.3f} against {plain['reward']['mean']:.3f}"
    if gain["low"] > 0:
        return f"It helped: its samples are judged better than plain training's, {figures}."
    if gain["high"] < 0:
        return f"It did harm: its samples are judged worse than plain training's, {figures}."
    return f"No difference is seen: its samples and plain training's are judged alike, {figures}."


def render_alignment_report(run: AlignmentReport) -> str:
    """The page as HTML; the same run gives the same bytes."""
    base, last = (run.rounds[0], run.rounds[run.chosen]) if run.rounds else ({}, {})
    figures = []
    for key, name in (
        ("term_rate", "trained terms in 1,000 tokens"),
        ("heldout_term_rate", "held-out terms in 1,000 tokens"),
        ("val_loss", "general text, nats a token"),
        ("distinct_2", "distinct 2-grams"),
    ):
        if last.get(key) is not None:
            figures.append((f"{base[key]:.3g} → {last[key]:.3g}", name))
    figures.append((duration(run.seconds), "time"))
    verdict = run.reason
    if last.get("term_rate") is not None and base["term_rate"]:
        times = last["term_rate"] / base["term_rate"]
        verdict = f"It writes {times:.1f} times as many of its terms as its base. {run.reason}"
    return _page(
        run, f"Self-alignment report, {run.status}", verdict, figures, _round_parts(run), []
    )


def _page(
    run: OfflineReport | AlignmentReport,
    status: str,
    verdict: str,
    figures: Sequence[tuple[str, str]],
    parts: Sequence[Part],
    events: Sequence[Mapping[str, Any]],
) -> str:
    tables = [
        ("Model", run.model),
        ("Picked for this machine", run.choices),
        ("Flags", run.config),
        ("Versions", run.versions),
    ]
    return template("alignment.html.j2").render(
        title=run.title,
        status=status,
        verdict=verdict,
        figures=figures,
        parts=parts,
        events=[*events, *run.events],
        samples=[(name, text[:_LONGEST_SAMPLE]) for name, text in run.samples],
        tables=[
            (heading, [(name.replace("_", " "), shown(value)) for name, value in values.items()])
            for heading, values in tables
            if values
        ],
    )


def _interval(estimate: Mapping[str, float] | None, digits: int = 3) -> str:
    if estimate is None:
        return ""
    mean, low, high = (f"{estimate[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _comparison_chart(run: OfflineReport) -> Part | None:
    if not run.arms:
        return None
    rows = [
        (arm["name"], arm["reward"]["mean"], arm["reward"]["low"], arm["reward"]["high"])
        for arm in run.arms
    ]
    judged = ""
    if run.judge is not None:
        auroc = run.judge["auroc"]
        judged = (
            f" The judge weighs words and pairs of words; it was fitted on the other half of the "
            f"file ({run.judge['n_fitted'] + run.judge['n_held_out']:,} texts) and tells texts "
            f"above the mean reward from those below with an AUROC "
            + ("that is not known." if auroc is None else f"of {auroc:.3f}.")
        )
    chart = Intervals("Judged reward of samples", "judged reward, mean and 95 % interval", rows)
    return Part("Judged reward of samples", chart.svg(), note=judged.strip())


def _comparison_table(run: OfflineReport) -> Part | None:
    if not run.arms:
        return None
    head = [
        "model",
        "judged reward",
        "above plain",
        "KL to plain, nats a text",
        "distinct 1, 2, 3",
        "tokens",
    ]
    rows = [
        [
            arm["name"],
            _interval(arm["reward"]),
            _interval(arm["above_plain"]),
            _interval(arm["kl_to_plain"], 2),
            " ".join("–" if share is None else f"{share:.3f}" for share in arm["distinct"]),
            f"{arm['length']:.0f}",
        ]
        for arm in run.arms
    ]
    return Part("Samples side by side", head=head, rows=rows)


def _nll_table(run: OfflineReport) -> Part | None:
    if not run.arms:
        return None
    rows = [
        [
            arm["name"],
            f"{arm['nll']:.4f}",
            _interval(arm["nll_high"]),
            _interval(arm["nll_low"]),
        ]
        for arm in run.arms
    ]
    return Part(
        "Unseen records",
        head=["model", "nats a token", "records above the mean reward", "records below"],
        rows=rows,
        note="The last two columns are this model minus plain training in nats a text, taken text "
        "by text: below 0 the text has become more likely.",
    )


def _loss_part(run: OfflineReport) -> Part | None:
    def column(name: str) -> list[tuple[float, float]]:
        return [(row["epoch"], row[name]) for row in run.epochs if row.get(name) is not None]

    chart = Chart(
        "Loss",
        "epoch",
        "nats a token",
        [
            Series("training, weighted", column("train_loss"), "train", marks=True),
            Series("held out, weighted", column("val_loss"), "val", marks=True),
            Series("held out, unweighted", column("val_nll"), "rate", marks=True),
        ],
    )
    svg = chart.svg()
    if not svg:
        return None
    legend = [("train", "training, weighted"), ("val", "held out, weighted")]
    return Part("Loss", svg, [*legend, ("rate", "held out, unweighted")])


def _weights_part(run: OfflineReport) -> Part | None:
    if run.stats is None or not run.weights:
        return None
    stats = run.stats
    chart = Histogram.of("Weights", "weight of a record", "records", run.weights)
    beta = "not used" if not math.isfinite(stats["beta"]) else f"{stats['beta']:.4g}"
    return Part(
        "Weights",
        chart.svg(),
        note=f"Temperature {beta}; effective sample size {stats['ess']:,.0f} of {stats['n']:,} "
        f"records; the largest weight has {stats['max_share']:.2%} of all; "
        f"{stats['fraction_clipped']:.1%} of the weights are held down by --max-weight.",
    )


def _rewards_part(run: OfflineReport) -> Part | None:
    if not run.rewards:
        return None
    return Part("Rewards", Histogram.of("Rewards", "reward", "records", run.rewards).svg())


def _round_parts(run: AlignmentReport) -> list[Part]:
    if not run.rounds:
        return []

    def column(name: str) -> Series:
        points = [(row["round"], row[name]) for row in run.rounds if row.get(name) is not None]
        spans = [
            (
                row["round"],
                row[name] - 1.96 * row[f"{name}_se"],
                row[name] + 1.96 * row[f"{name}_se"],
            )
            for row in run.rounds
            if row.get(name) is not None and row.get(f"{name}_se") is not None
        ]
        style = {"term_rate": "val", "heldout_term_rate": "rate"}[name]
        return Series(name, points, style, marks=True, spans=spans)

    rates = Chart(
        "Terms",
        "round",
        "terms in 1,000 tokens",
        [column("term_rate"), column("heldout_term_rate")],
        start_at_zero=True,
    )
    head = ["round", "reward", "terms", "held out", "KL, nats a text", "general NLL", "distinct 2",
            "duplicates", "copied, characters"]  # fmt: skip
    keys = [("reward", ".3f"), ("term_rate", ".2f"), ("heldout_term_rate", ".2f"),
            ("kl", ".2f"), ("val_loss", ".4f"), ("distinct_2", ".3f"),
            ("duplicate_rate", ".1%"), ("longest_copied_characters", ".0f")]  # fmt: skip
    rows = [
        [
            f"{row['round']}" + (" (written)" if row["round"] == run.chosen else ""),
            *("" if row.get(key) is None else format(row[key], spec) for key, spec in keys),
        ]
        for row in run.rounds
    ]
    held = ", ".join(run.held_out_terms) or "none"
    return [
        Part(
            "Terms",
            rates.svg(),
            [("val", "trained terms"), ("rate", "held-out terms")],
            note=f"Trained: {', '.join(run.terms)}. Held out for judging: {held}.",
        ),
        Part("Rounds", head=head, rows=rows, note="Round 0 is the model that it began with."),
    ]
