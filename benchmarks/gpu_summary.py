"""The end of a GPU run: at most 60 lines."""

import re
from typing import Any

from nanogpt.measuring import bytes_rate, flops_rate, in_words, rate

LIMIT = 60
COMPILED = re.compile(r"compile|max-autotune")
"""Peers that `auto` cannot take, since the caller compiles."""


def summary(found: Any, seconds: float) -> list[str]:
    """One line for each shape with all its passes, then what failed, what is slow, what is missing.

    Args:
        found: the run's Findings.
        seconds: how long it took.
    """
    lines = [f"== summary, {seconds:.0f} s"]
    if found.ceilings:
        lines.append(
            f"copy {bytes_rate(found.ceilings['copy_bytes_per_second'])}, "
            f"matmul {flops_rate(found.ceilings['matmul_flops'])}"
        )
    for kernel, counts in found.checks.items():
        words = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
        lines.append(f"correctness of {kernel}: {words}")
    lines += _by_shape(found.rows)
    last = _slower(found.rows)
    last += _few("out of time, skipped", found.skipped)
    last += _few("not available", sorted(set(_missing(found.notes))))
    last += _few("FAILED", [" ".join(text.split()) for text in found.failures], 6)
    last.append(f"{len(found.rows)} rows, {len(found.failures)} failures")
    room = LIMIT - len(last)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"… {len(lines) - room + 1} more lines are in the JSON files"]
    return lines + last


def _by_shape(rows: list[dict[str, Any]]) -> list[str]:
    """suite shape: variant pass rate (of the ceiling) xratio | …"""
    grouped: dict[str, list[str]] = {}
    for row in rows:
        shape = dict(row["shape"])
        label = f"{shape.pop('ours', '')} {shape.pop('pass', '')}".strip()
        shown = rate(row) or f"{row['ours_seconds'] * 1e3:.3f} ms"
        share = row["fraction_of_ceiling"]
        shown += f" ({share:.0%})" if share is not None else ""
        shown += f" x{row['ratio']:.2f} of {row['best_peer']}" if row["ratio"] else ""
        grouped.setdefault(_named(row, shape), []).append(f"{label} {shown}")
    return [f"{name}: {' | '.join(parts)}" for name, parts in grouped.items()]


def _named(row: dict[str, Any], shape: dict[str, Any]) -> str:
    return f"{row['suite'].removeprefix('gpu-')} {in_words(shape).replace(', ', ' ')}"


def _slower(rows: list[dict[str, Any]]) -> list[str]:
    """Where a peer beats every variant of ours: one that `auto` can take, or a compiled one."""
    eager: dict[str, tuple[float, str]] = {}
    compiled: dict[str, tuple[float, str]] = {}
    for row in rows:
        shape = {key: value for key, value in row["shape"].items() if key != "ours"}
        # A deterministic run is another contract: it competes with deterministic peers alone.
        if row["suite"] == "gpu-tuning":  # its peers are other tiles of ours
            continue
        exact = " deterministic" * ("deterministic" in str(row["shape"].get("ours")))
        name = _named(row, shape) + exact
        for peer, seconds in row["peers"].items():
            kind = compiled if COMPILED.search(peer) else eager
            ratio = seconds / row["ours_seconds"]
            best = kind.setdefault(f"{name} {peer}", (ratio, f"{name} ({peer} {{:.2f}})"))
            kind[f"{name} {peer}"] = max(best, (ratio, best[1]))

    def lost(kind: dict[str, tuple[float, str]]) -> list[str]:
        return [text.format(ratio) for ratio, text in kind.values() if ratio < 1]

    return [
        *_few("auto should take the peer here", lost(eager), 10),
        *_few("faster than ours, compiled", lost(compiled), 5),
    ]


def _missing(notes: list[str]) -> list[str]:
    start = "not available: "
    return [text.removeprefix(start) for text in notes if text.startswith(start)]


def _few(title: str, items: list[str], limit: int = 4) -> list[str]:
    """A title and its first items, one a line."""
    if not items:
        return []
    more = [f"  … and {len(items) - limit} more"] if len(items) > limit else []
    return [f"{title}:", *(f"  {item[:150]}" for item in items[:limit]), *more]
