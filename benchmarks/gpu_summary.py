"""The end of a GPU run: at most 60 lines."""

from typing import Any

from recording import bytes_rate, flops_rate, in_words, rate

LIMIT = 60


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
    last += _few("FAILED", [text.splitlines()[0] for text in found.failures], 6)
    last.append(f"{len(found.rows)} rows, {len(found.failures)} failures")
    room = LIMIT - len(last)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"… {len(lines) - room + 1} more lines are in the JSON files"]
    return lines + last


def _by_shape(rows: list[dict[str, Any]]) -> list[str]:
    """suite shape ours: pass rate xratio | pass rate xratio."""
    grouped: dict[str, list[str]] = {}
    for row in rows:
        shape = {key: value for key, value in row["shape"].items() if key != "pass"}
        name = f"{row['suite'].removeprefix('gpu-')} {in_words(shape).replace(', ', ' ')}"
        ratio = f" x{row['ratio']:.2f} of {row['best_peer']}" if row["ratio"] else ""
        shown = rate(row) or f"{row['ours_seconds'] * 1e3:.3f} ms"
        share = row["fraction_of_ceiling"]
        shown += f" ({share:.0%})" if share is not None else ""
        grouped.setdefault(name, []).append(
            f"{row['shape'].get('pass', '')} {shown}{ratio}".strip()
        )
    return [f"{name}: {' | '.join(parts)}" for name, parts in grouped.items()]


def _slower(rows: list[dict[str, Any]]) -> list[str]:
    """Where the best peer beats every variant of ours: there `auto` should take it."""
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["ratio"] is None:
            continue
        shape = {key: value for key, value in row["shape"].items() if key != "ours"}
        # A deterministic run is another contract: it competes with deterministic peers alone.
        exact = ", deterministic" * ("deterministic" in str(row["shape"].get("ours")))
        name = f"{row['suite'].removeprefix('gpu-')} {in_words(shape).replace(', ', ' ')}{exact}"
        peer = f"{row['best_peer']} {row['ratio']:.2f}"
        if name not in best or row["ratio"] > best[name][0]:
            best[name] = (row["ratio"], peer)
    slow = [f"{name} ({peer})" for name, (ratio, peer) in best.items() if ratio < 1]
    return _few("auto should take the peer here", slow, 12)


def _missing(notes: list[str]) -> list[str]:
    start = "not available: "
    return [text.removeprefix(start) for text in notes if text.startswith(start)]


def _few(title: str, items: list[str], limit: int = 4) -> list[str]:
    """A title and its first items, one a line."""
    if not items:
        return []
    more = [f"  … and {len(items) - limit} more"] if len(items) > limit else []
    return [f"{title}:", *(f"  {item[:150]}" for item in items[:limit]), *more]
