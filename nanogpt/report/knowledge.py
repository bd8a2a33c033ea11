"""The report of an exploration: one HTML page that opens with no network and runs no script."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from nanogpt.report.page import template

_OPEN_FINDINGS, _MOST_FINDINGS, _MOST_UNUSUAL, _MOST_FIELDS = 20, 100, 25, 40
_LONGEST = 80
_JOINERS = "\u200c\u200d"
"""Invisible inside words of some scripts and inside emoji; other such characters are not shown."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195", "#6b6862")
"""Told apart with any colour vision (Okabe and Ito 2008, darkened where they were too light)."""
_KINDS = {
    "duplicate_fields": "same field twice",
    "leak": "gives away",
    "dependency": "dependency",
    "joint_dependency": "joint dependency",
    "unusual": "unusual",
    "duplicates": "duplicates",
    "near_duplicates": "near duplicates",
    "group": "group",
    "drift": "drift",
    "constant": "constant",
    "id": "identifier",
}
Report = Mapping[str, Any]


def render_knowledge_report(report: Report) -> str:
    """The page as HTML; the same report gives the same bytes.

    Args:
        report: `nanogpt.explore.KnowledgeDiscovery.report`.
    """
    found = report["findings"]
    tested = [each for each in found if each["q"] is not None]
    shown = [_shown_finding(each) for each in found[:_MOST_FINDINGS]]
    groups = report.get("groups")
    return template("knowledge.html.j2").render(
        title=f"What {cut(str(report['data']))} holds",
        status="Knowledge discovery",
        verdict=_verdict(report, tested),
        figures=[
            (f"{report['n']:,}", "records"),
            (f"{len(report['fields']):,}", "fields"),
            (f"{len(tested):,}", f"findings at a false discovery rate of {report['alpha']:g}"),
        ],
        findings=shown[:_OPEN_FINDINGS],
        folded=shown[_OPEN_FINDINGS:],
        n_more=len(found) - len(shown),
        alpha=report["alpha"],
        fields=[_shown_field(field) for field in report["fields"]],
        unusual=[_shown_record(each) for each in report["anomalies"][:_MOST_UNUSUAL]],
        unusual_alpha=report["alpha"],
        map=_dependency_map(report["dependencies"], report["alpha"]),
        plane=None if groups is None or not groups["groups"] else _plane(groups),
        legend=[] if groups is None else _legend(groups),
        no_groups=groups is not None and not groups["groups"],
        map_cut=_first_of(report["dependencies"]["fields"]),
        drift=[_shown_drift(each) for each in report["drift"][:_MOST_FIELDS]],
        drift_cut=_first_of(report["drift"]),
        quality=_quality(report["quality"]),
        quality_cut=_first_of(report["quality"]),
        notes=[cut(note, 600) for note in report["notes"]],
        tables=[("How it was found", _facts(report))],
    )


def cut(text: str, most: int = _LONGEST) -> str:
    """A text in one printable line, cut where it is long."""
    line = "".join(c if c.isprintable() or c in _JOINERS else " " for c in text)
    return line if len(line) <= most else line[: most - 1] + "…"


def _first_of(shown: Sequence[Any]) -> str:
    """What to say where not all fields are shown; "" where they are."""
    if len(shown) <= _MOST_FIELDS:
        return ""
    return f"These are the first {_MOST_FIELDS} of {len(shown):,}; findings.json has them all."


def _verdict(report: Report, tested: Sequence[Report]) -> str:
    if not tested:
        return (
            f"Nothing passed: of everything that was tried, nothing holds at a false discovery "
            f"rate of {report['alpha']:g}. Independent fields look like this."
        )
    return f"The strongest finding: {cut(tested[0]['sentence'], 400)}."


def _shown_finding(finding: Report) -> dict[str, Any]:
    effect = "" if finding["q"] is None else f"{finding['effect']:,.3g} {finding['unit']}"
    if finding["effect"] == 1:
        effect = effect.replace("groups", "group").replace("1 records", "1 record")
    return {
        "kind": _KINDS.get(finding["kind"], finding["kind"]),
        "sentence": cut(finding["sentence"], 600),
        "effect": effect,
        "q": _q(finding["q"]),
        "n": f"{finding['n']:,}",
    }


def _q(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2g}" if value >= 1e-99 else "below 1e-99"


def _shown_field(field: Report) -> dict[str, Any]:
    bits = field["bits_marginal"], field["bits_model"]
    told = ""
    if bits[0] and bits[1] is not None:
        told = f"{max(0.0, 1 - bits[1] / bits[0]):.0%}"
    examples = ", ".join(
        f"{cut(value, 30)}" + (f" ({count:,})" if count > 1 else "")
        for value, count in field["examples"][:4]
    )
    histogram = field["histogram"]
    return {
        "name": cut(field["name"], 50),
        "kind": field["kind"],
        "missing": f"{field['missing']:,}",
        "distinct": f"{field['distinct']:,}",
        "picture": "" if histogram is None else _histogram(histogram),
        "examples": examples,
        "told": told if field["role"] == "used" else f"set aside: {field['reason']}",
    }


def _histogram(histogram: Report) -> str:
    counts = histogram["counts"]
    top = max(counts) or 1
    width = 150 / len(counts)
    bars = "".join(
        f'<rect class="bar" x="{i * width:.1f}" y="{30 - 30 * c / top:.1f}" '
        f'width="{max(0.5, width - 0.6):.1f}" height="{30 * c / top:.1f}"/>'
        for i, c in enumerate(counts)
    )
    low, high = histogram["edges"][0], histogram["edges"][-1]
    label = escape(f"from {low:.4g} to {high:.4g}")
    return f'<svg class="small" viewBox="0 0 150 30" role="img" aria-label="{label}">{bars}</svg>'


def _shown_record(each: Report) -> dict[str, Any]:
    expected = ", ".join(f"{cut(str(v), 40)} ({p:.0%})" for v, p in each["expected"])
    worst = [cell for cell in each["cells"] if cell["field"] == each["field"]]
    shown = each["cells"][:_MOST_FIELDS]
    if worst and worst[0] not in shown:
        shown = [*shown[:-1], worst[0]]
    cells = [
        {
            "field": cut(cell["field"], 40),
            "value": cut(cell["value"], 60),
            "guilty": cell["field"] == each["field"],
            "bits": f"{cell['bits']:.1f} bits",
        }
        for cell in shown
    ]
    left = len(each["cells"]) - len(cells)
    z = "—" if each["z"] is None else f"{each['z']:.1f}"
    return {
        "line": f"{each['line']:,}", "z": z, "q": _q(each["q"]), "expected": expected,
        "cells": cells, "n_left": f"{left:,}" if left else "", "field": cut(each["field"], 40),
    }  # fmt: skip


def _dependency_map(part: Report, alpha: float) -> str:
    """A square for every two fields: how much the row's field tells about the column's."""
    names = part["fields"][:_MOST_FIELDS]
    n = len(names)
    sure_of_any = any(q is not None and q <= alpha for row in part["q"] for q in row)
    if n < 2 or not sure_of_any:
        return ""
    left, top, size = 150, 120, max(14, min(44, 560 // n))
    out = []
    for i, name in enumerate(names):
        y, x = top + (i + 0.5) * size + 4, left + (i + 0.5) * size
        out.append(
            f'<text x="{left - 8}" y="{y:.1f}" text-anchor="end">{escape(cut(name, 20))}</text>'
        )
        out.append(
            f'<text x="{x:.1f}" y="{top - 8}" transform="rotate(-45 {x:.1f} {top - 8})" '
            f'class="slant">{escape(cut(name, 20))}</text>'
        )
        for j in range(n):
            share, q = part["share"][i][j], part["q"][i][j]
            x0, y0 = left + j * size, top + i * size
            box = f'x="{x0}" y="{y0}" width="{size - 1}" height="{size - 1}"'
            if i == j or share is None:
                out.append(f'<rect class="empty" {box}/>')
                continue
            sure = q is not None and q <= alpha
            label = escape(f"{cut(name, 40)} tells {share:.0%} of {cut(names[j], 40)}")
            strength = share if sure else 0.0
            fill = f'fill-opacity="{strength:.3f}"'
            out.append(f'<rect class="cell" {box} {fill}><title>{label}</title></rect>')
            if sure and size >= 28 and share >= 0.005:
                dark = ' class="on"' if share > 0.55 else ""
                out.append(
                    f'<text{dark} x="{x0 + size / 2:.1f}" y="{y0 + size / 2 + 4:.1f}" '
                    f'text-anchor="middle">{100 * share:.0f}</text>'
                )
    width, height = left + n * size + 70, top + n * size + 6
    box = f'viewBox="0 0 {width} {height}" style="max-width: {width}px"'
    return f'<svg class="map" {box} role="img">{"".join(out)}</svg>'


def _plane(groups: Report) -> str:
    ids = [group["id"] for group in groups["groups"]]
    out = []
    for x, y, group in sorted(groups["plane"], key=lambda point: point[2] in ids):
        cx, cy = 320 + 300 * x, 200 - 185 * y
        if group not in ids:
            out.append(f'<circle class="rest" cx="{cx:.1f}" cy="{cy:.1f}" r="2"/>')
            continue
        number = ids.index(group)
        out.append(_mark(number, cx, cy))
    return f'<svg viewBox="0 0 640 400" role="img">{"".join(out)}</svg>'


def _mark(number: int, x: float, y: float) -> str:
    """A shape and a colour for a group."""
    colour = _COLOURS[number % len(_COLOURS)]
    kind = number % 4
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{colour}"/>'
    corners = {
        1: ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)),
        2: ((0, -4.2), (4, 3.2), (-4, 3.2)),
        3: ((0, -4.4), (4.4, 0), (0, 4.4), (-4.4, 0)),
    }[kind]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'


def _legend(groups: Report) -> list[dict[str, Any]]:
    return [
        {
            "mark": f'<svg class="key" viewBox="0 0 12 12">{_mark(number, 6, 6)}</svg>',
            "size": f"{group['size']:,}",
            "q": _q(group["q"]),
            "terms": ", ".join(cut(term, 50) for term, z in group["terms"] if z > 0),
        }
        for number, group in enumerate(groups["groups"])
    ]


def _shown_drift(each: Report) -> dict[str, str]:
    of = "" if each["class"] is None else f" of {cut(each['class'])}"
    first, last = cut(each["labels"][0], 40), cut(each["labels"][-1], 40)
    return {
        "heading": f"{cut(each['field'], 50)}: {each['what']}{of} in each eighth, "
                   f"{first} to {last}",
        "picture": _steps(each["values"]),
    }  # fmt: skip


def _steps(values: Sequence[float | None]) -> str:
    halves = [None if value is None else value / 2 for value in values]  # their span is finite
    known = [half for half in halves if half is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    span = high - low or 1.0
    width = 240 / len(values)
    bars = "".join(
        f'<rect class="bar" x="{i * width:.1f}" y="{44 - 40 * ((v - low) / span):.1f}" '
        f'width="{width - 2:.1f}" height="{4 + 40 * ((v - low) / span):.1f}"/>'
        for i, v in enumerate(halves)
        if v is not None
    )
    return f'<svg class="steps" viewBox="0 0 240 48" role="img">{bars}</svg>'


def _quality(rows: Sequence[Report]) -> list[dict[str, Any]]:
    rows = rows[:_MOST_FIELDS]
    measures = ("unigram", "nearest", "model")
    top = max((row[name] or 0.0 for row in rows for name in measures), default=0.0) or 1.0
    found = []
    for row in rows:
        bars = []
        for place, (name, style) in enumerate(zip(measures, ("train", "rate", "val"), strict=True)):
            if row[name] is not None:
                width = 300 * max(0.0, row[name]) / top
                bars.append(
                    f'<rect class="{style}" x="0" y="{place * 10}" width="{width:.1f}" height="8"/>'
                )
        found.append(
            {
                "field": cut(row["field"], 40),
                "bars": f'<svg class="bars" viewBox="0 0 300 30" role="img">{"".join(bars)}</svg>',
                "numbers": ["—" if row[name] is None else f"{row[name]:.2f}" for name in measures],
                "accuracy": f"{row['accuracy']:.0%}" if "accuracy" in row else "",
            }
        )
    return found


def _facts(report: Report) -> list[tuple[str, str]]:
    model = report["model"]
    return [
        ("model", f"{model['parameters']:,} parameters, {model['n_layer']} layers, width "
                  f"{model['n_embd']}, {model['epochs']} epochs; {model['id']}"),
        ("unseen", f"each record was judged by a model trained on the other parts of "
                   f"{report['folds']}"),
        ("q", f"of all findings with a q of {report['alpha']:g} or less, no more than that share "
              f"is false on average, counting everything that was tried"),
        ("bits", "how much less surprising a value is to who knows the finding; 1 bit halves the "
                 "values that it could be"),
        ("seed", str(report["seed"])),
        ("versions", ", ".join(f"{name} {cut(each)}" for name, each in report["versions"].items())),
    ]  # fmt: skip
