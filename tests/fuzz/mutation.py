"""Random changes of bytes."""

import random
from collections.abc import Sequence

_ENDS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
LARGEST_BYTES = 2**16
_MANY = (10, 100, 1000, 5000)


def mutated(rng: random.Random, seeds: Sequence[bytes], pieces: Sequence[bytes]) -> bytes:
    """One of the seeds with one to four changes.

    Args:
        pieces: what the format is made of.
    """
    raw = bytearray(rng.choice(seeds))
    for _ in range(1 + int(4 * rng.random())):
        _change(raw, rng, seeds, pieces)
    del raw[LARGEST_BYTES:]
    return bytes(raw)


def _change(
    raw: bytearray, rng: random.Random, seeds: Sequence[bytes], pieces: Sequence[bytes]
) -> None:
    if not raw:
        raw += rng.randbytes(1)
    size = len(raw)
    at = int(size * rng.random())
    way = int(10 * rng.random())
    if way == 0:
        raw[at] ^= 1 << int(8 * rng.random())
    elif way == 1:
        raw[at] = int(256 * rng.random())
    elif way == 2:
        width = 1 << int(4 * rng.random())
        value = rng.choice(_ENDS) & (1 << 8 * width) - 1
        raw[at : at + width] = value.to_bytes(width, "little")
    elif way == 3:
        if rng.random() < 0.25:
            del raw[at:]
    elif way == 4:
        del raw[at : at + 1 + int((64 if rng.random() < 0.2 else 4) * rng.random())]
    elif way == 5:
        part = raw[at : at + 1 + int((200 if rng.random() < 0.2 else 16) * rng.random())]
        to = int((size + 1) * rng.random())
        raw[to:to] = part
    elif way == 6:
        other = rng.choice(seeds)
        start = int(len(other) * rng.random())
        raw[at:at] = other[start : start + 1 + int(100 * rng.random())]
    elif pieces:
        piece = rng.choice(pieces)
        if rng.random() < 0.3:
            raw[at : at + len(piece)] = piece
        else:
            times = rng.choice(_MANY) if rng.random() < 0.01 else 1
            raw[at:at] = piece * times
