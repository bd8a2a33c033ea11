"""Other tiles than those of the tables, at the shapes that matter: what the tables should hold.

A row's "ours" is the entry that the table has now, its peers are the other tiles; a ratio below 1
names a better entry. `nanogpt.kernels.codegen` must stay clean for whatever is taken over.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_session import Session

from nanogpt.kernels.launch_triton import target_of

# (kernel, head width) -> tiles as BT, BS, warps, stages. None of them spills on sm_90.
ATTENTION = {
    ("forward", 64): ((128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3)),
    ("forward", 128): ((128, 128, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2), (128, 128, 8, 3)),
    ("by_keys_dq", 64): ((64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2)),
    ("by_keys_dq", 128): ((64, 64, 8, 2), (32, 128, 8, 2)),
    ("by_keys", 64): ((64, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2)),
    ("by_keys", 128): ((64, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2)),
    ("by_queries", 64): ((128, 64, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2)),
    ("by_queries", 128): ((128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2)),
}
# kind -> tiles as rows, columns, inner, warps, stages, parts.
FFN = {
    "up": ((128, 256, 64, 8, 4, 2), (128, 256, 64, 8, 3, 2), (128, 128, 64, 8, 4, 1)),
    "dhidden": ((128, 256, 64, 8, 4, 4), (128, 128, 64, 8, 4, 2), (128, 256, 64, 8, 3, 4)),
    "plain": ((128, 256, 64, 8, 4, 2), (128, 128, 64, 8, 4, 1), (128, 256, 64, 8, 3, 2)),
}


def run_tuning(session: Session) -> None:
    """Attention at GPT-2's shape and at 8k, the feed-forward at GPT-2's."""
    from nanogpt.kernels import attention_triton as attention
    from nanogpt.kernels import ffn_triton as ffn

    dtype = torch.float32 if session.tiny else torch.bfloat16
    random = partial(torch.randn, device=session.device, dtype=dtype)
    shapes = {64: [(64, 12, 1024), (2, 32, 8192)], 128: [(16, 16, 1024), (2, 16, 8192)]}
    if session.quick:
        shapes = {64: [(1, 1, 40) if session.tiny else (2, 12, 1024)]}
    for (kernel, width), tiles in ATTENTION.items():
        for batch, heads, positions in shapes.get(width, ()):
            q, k, v, g = (random(batch, heads, positions, width) for _ in range(4))
            out, lse = attention.forward(q, k, v, width**-0.5)
            run: Callable[[], Any] = partial(attention.forward, q, k, v, width**-0.5)
            if kernel != "forward":
                exact = kernel != "by_keys_dq"
                run = partial(attention.backward, q, k, v, out, lse, g, width**-0.5, exact)
            generation = target_of(q).generation if dtype == torch.bfloat16 else 80
            key = (kernel, width, dtype.itemsize, generation)
            shape = {"kernel": kernel, "B": batch, "H": heads, "T": positions, "D": width}
            _compare(session, shape, dtype, attention.TILES, key, tiles, attention.Tile, run)
    rows, width = (40, 32) if session.tiny else (4096 if session.quick else 65_536, 768)
    x, u = random(rows, width), random(rows, 4 * width)
    w1, w2 = random(4 * width, width), random(width, 4 * width)
    calls: dict[str, Callable[[], Any]] = {
        "up": partial(ffn.forward_up, x, w1, None, True, True),
        "dhidden": partial(ffn.backward_hidden, x, w2, u, True, True),
        "plain": partial(ffn.multiply, u, w2, None, False, True),
    }
    for kind, tiles in FFN.items():
        key = (kind, target_of(x).generation, dtype.itemsize, "large")
        shape = {"kernel": f"ffn {kind}", "N": rows, "C": width, "F": 4 * width}
        _compare(session, shape, dtype, ffn.TILES, key, tiles, ffn.Tile, calls[kind])


def _compare(
    session: Session,
    shape: dict[str, Any],
    dtype: torch.dtype,
    table: dict[Any, Any],
    key: tuple[Any, ...],
    tiles: tuple[tuple[int, ...], ...],
    make: Callable[..., Any],
    run: Callable[[], Any],
) -> None:
    """Time `run` under each tile; the table is left as it was."""
    what = f"tune {shape}"
    if not session.has_time(what, 2.0):
        return
    current = table[key]

    def under(entry: Any) -> Any:
        table[key] = entry
        return run()

    entries = {str(current): current} | {str(tile): tile for tile in (make(*t) for t in tiles)}
    with session.guard(what):
        try:
            functions = session.peers(
                what, {name: partial(under, entry) for name, entry in entries.items()}
            )
            if str(current) in functions:
                times = session.times(functions)
                ours = times.pop(str(current))
                session.row("gpu-tuning", {**shape, "ours": str(current)}, dtype, ours, times)
        finally:
            table[key] = current
