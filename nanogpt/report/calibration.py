"""The report of a calibration: one HTML page that opens with no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanogpt.report.page import template
from nanogpt.report.plots import Chart, Series


@dataclass(frozen=True)
class CalibrationPage:
    """What the page shows.

    Attributes:
        temperature, standard_error: the fitted T; the error is None where there is none.
        before, after: nanogpt.reliability.CalibrationReport.as_dict, at T = 1 and at T.
        bits_per_nat: bits a byte for an NLL of one nat a token; None for text without bytes.
        difference: of the NLL, in nats a token: "mean", and "interval" or None.
        notes: sentences for the user.
        facts: what the temperature was fitted to, name to value.
    """

    title: str
    temperature: float
    standard_error: float | None
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    bits_per_nat: float | None
    difference: Mapping[str, Any]
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def render_calibration_report(page: CalibrationPage) -> str:
    """The page as HTML; the same numbers give the same bytes."""
    return template("calibration.html.j2").render(
        page=page,
        title=page.title,
        status="Calibration report",
        verdict=_verdict(page),
        figures=_figures(page),
        charts=_charts(page),
        rows=comparison(page),
        tables=[("How it was found", list(page.facts.items()))],
    )


def comparison(page: CalibrationPage) -> list[tuple[str, str, str]]:
    """(what it is, before, after) in the words of the page and of the terminal."""

    def row(name: str, key: str, digits: int = 4) -> tuple[str, str, str]:
        return name, _number(page.before[key], digits), _number(page.after[key], digits)

    def interval(content: Mapping[str, Any]) -> str:
        low, high = content["ece_interval"]
        return f"{low:.4f} … {high:.4f}"

    rows = [row("NLL, nats a token", "nll")]
    if page.bits_per_nat is not None:
        bits = [part["nll"] * page.bits_per_nat for part in (page.before, page.after)]
        rows.append(("bits a byte", f"{bits[0]:.4f}", f"{bits[1]:.4f}"))
    return [
        *rows,
        row("mean entropy of the predictions, nats", "entropy"),
        (
            "entropy − NLL",
            f"{page.before['entropy_gap']:+.4f}",
            f"{page.after['entropy_gap']:+.4f}",
        ),
        row("accuracy of the likeliest token", "accuracy"),
        row("its mean probability", "confidence"),
        row("ECE, 15 bins" if len(page.after["bins"]) == 15 else "ECE", "ece"),
        row("  of a perfect model, by noise alone", "ece_floor"),
        ("  95 % for what is not noise", interval(page.before), interval(page.after)),
        row("ECE, bins of equal counts", "adaptive_ece"),
        row("largest gap of a bin (MCE)", "mce"),
        row("Brier score of the likeliest token", "brier_top"),
        row("Brier score of all tokens", "brier"),
        row("AUROC of the probability", "auroc"),
        row("mean risk over coverages (AURC)", "aurc"),
    ]


def _verdict(page: CalibrationPage) -> str:
    """One sentence: what was wrong with the probabilities, and what is left of it."""
    over = page.before["confidence"] > page.before["accuracy"]
    way = "over-confident" if over else "under-confident"
    if page.before["is_consistent"] and page.after["is_consistent"]:
        found = "The model's probabilities were right within noise before"
    else:
        found = (
            f"The model was {way}: its likeliest token was right "
            f"{page.before['accuracy']:.1%} of the time, with a probability of "
            f"{page.before['confidence']:.1%}; now it is {page.after['confidence']:.1%}"
        )
    left = "noise alone would show" if page.after["is_consistent"] else "more than noise would show"
    return f"{found}. What is left, an ECE of {page.after['ece']:.2%}, is {left}."


def _figures(page: CalibrationPage) -> list[tuple[str, str]]:
    error = "" if page.standard_error is None else f" ± {page.standard_error:.2g}"
    low_high = ""
    if page.difference["interval"] is not None:
        low, high = page.difference["interval"]
        low_high = f", 95 %: {low:.4f} … {high:.4f}"
    return [
        (f"{page.temperature:.4g}", f"temperature{error}"),
        (f"{page.difference['mean']:+.4f}", f"NLL, nats a token{low_high}"),
        (f"{page.before['ece']:.2%}", "ECE before"),
        (f"{page.after['ece']:.2%}", f"ECE now; {page.after['ece_floor']:.2%} is noise"),
        (f"{page.after['n_tokens']:,}", "tokens judged"),
    ]


def _charts(page: CalibrationPage) -> list[tuple[str, str, list[tuple[str, str]], str]]:
    """(title, SVG, legend of (style, name), explanation)."""
    legend = [("train", "at temperature 1"), ("val", f"at temperature {page.temperature:.4g}")]

    def bins(name: str, content: Mapping[str, Any], style: str) -> Series:
        filled = [bin_ for bin_ in content["bins"] if bin_["count"]]
        points = [(bin_["confidence"], bin_["accuracy"]) for bin_ in filled]
        spans = [(bin_["confidence"], *bin_["interval"]) for bin_ in filled]
        return Series(name, points, style, marks=True, line=False, spans=spans)

    def shares(name: str, content: Mapping[str, Any], style: str) -> Series:
        points = []
        for bin_ in content["bins"]:
            share = bin_["count"] / content["n_tokens"]
            points += [(bin_["low"], share), (bin_["high"], share)]
        return Series(name, points, style)

    def risks(name: str, content: Mapping[str, Any], style: str) -> Series:
        return Series(name, content["risk_coverage"], style)

    both = (("before", page.before, "train"), ("after", page.after, "val"))
    diagonal = Series("perfect", [(0.0, 0.0), (1.0, 1.0)], "perfect")
    reliability = Chart(
        "Reliability",
        "probability of the likeliest token",
        "how often it was right",
        [diagonal, *(bins(*each) for each in both)],
        start_at_zero=True,
    )
    counts = Chart(
        "Where the tokens are",
        "probability of the likeliest token",
        "share of tokens",
        [shares(*each) for each in both],
        start_at_zero=True,
    )
    risk = Chart(
        "Risk and coverage",
        "share of tokens, the most confident first",
        "how often wrong",
        [risks(*each) for each in both],
        start_at_zero=True,
    )
    return [
        (
            "Reliability",
            reliability.svg(),
            [("level", "a perfect model"), *legend],
            "Each dot is a bin of tokens, with the 95 % interval of how often they were right. "
            "Below the line the model promises more than it keeps.",
        ),
        ("Where the tokens are", counts.svg(), legend, ""),
        (
            "Risk and coverage",
            risk.svg(),
            legend,
            "How often the model is wrong if it may leave out what it is least sure of.",
        ),
    ]


def _number(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"
