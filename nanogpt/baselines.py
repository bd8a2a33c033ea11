"""What a model of a text should beat: an n-gram model and DEFLATE, in bits per byte."""

import zlib

import numpy as np

_TRAIN_BYTES = 16 * 2**20
_VAL_BYTES = 4 * 2**20
_WINDOW = 32 * 1024


def text_baselines(train: bytes, val: bytes) -> dict[str, float]:
    """Bits per byte of `val` by models that know `train`; {} for an empty `val`.

    Large texts are cut to the last 16 MiB of `train` and the first 4 MiB of `val`.
    """
    train, val = train[-_TRAIN_BYTES:], val[:_VAL_BYTES]
    if not val or not train:
        return {}
    return {
        "order-5 n-gram": ngram_bits_per_byte(train, val),
        "gzip -9": gzip_bits_per_byte(train, val),
    }


def gzip_bits_per_byte(train: bytes, val: bytes) -> float:
    """DEFLATE level 9 with the last 32 KiB of `train` as its dictionary, container left out."""
    packer = zlib.compressobj(level=9, wbits=-15, zdict=train[-_WINDOW:])
    return 8 * len(packer.compress(val) + packer.flush()) / len(val)


def ngram_bits_per_byte(train: bytes, val: bytes, order: int = 5) -> float:
    """Byte-level n-gram model, interpolated modified Kneser-Ney.

    p_k(w | c) = max(0, n(cw) - D(n(cw))) / n(c) + mass(c) p_{k-1}(w | c without its first byte)

    and p_0 = 1/256. Below the highest order, n(cw) counts the different bytes before cw.

    Args:
        train: the text counted; its last bytes are the context of the first of `val`.
        order: n; order - 1 bytes of context.
    Source: Chen and Goodman 1999, An empirical study of smoothing techniques, section 3.3.
    """
    return float(-np.log2(ngram_probabilities(train, val, order)).mean())


def ngram_probabilities(train: bytes, val: bytes, order: int) -> np.ndarray:
    """(len(val),) float64: the model's probability of each byte; see `ngram_bits_per_byte`."""
    order = min(order, len(train))
    text = np.frombuffer(train[len(train) - order + 1 :] + val, dtype=np.uint8)
    p = np.full(len(val), 1 / 256)
    for k in range(1, order + 1):
        grams, counts = _counts(train, k, highest=k == order)
        context, inverse = np.unique(grams >> np.uint64(8), return_inverse=True)
        total = np.bincount(inverse, weights=counts)
        discounts = _discounts(counts)
        taken = discounts[np.minimum(counts, 3)]
        mass = np.bincount(inverse, weights=taken) / total

        wanted = _grams(text, k)[order - k :]
        at = np.minimum(np.searchsorted(grams, wanted), len(grams) - 1)
        found = grams[at] == wanted
        seen = np.minimum(np.searchsorted(context, wanted >> np.uint64(8)), len(context) - 1)
        known = context[seen] == wanted >> np.uint64(8)
        own = np.where(found, (counts[at] - taken[at]) / total[seen], 0.0)
        p = np.where(known, own + mass[seen] * p, p)
    return p


def _grams(text: np.ndarray, k: int) -> np.ndarray:
    """Every k consecutive bytes as one number, first byte highest."""
    keys = np.zeros(len(text) - k + 1, dtype=np.uint64)
    for i in range(k):
        keys = keys << np.uint64(8) | text[i : len(text) - k + 1 + i].astype(np.uint64)
    return keys


def _counts(train: bytes, k: int, *, highest: bool) -> tuple[np.ndarray, np.ndarray]:
    """Distinct k-grams in order and their counts (lower orders: of distinct bytes before)."""
    text = np.frombuffer(train, dtype=np.uint8)
    if highest:
        return np.unique(_grams(text, k), return_counts=True)
    longer = np.unique(_grams(text, k + 1))
    return np.unique(longer & np.uint64((1 << 8 * k) - 1), return_counts=True)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D for counts 0, 1, 2 and 3 or more, from the counts of counts."""
    ones, twos, threes, fours = (max(1, int((counts == c).sum())) for c in (1, 2, 3, 4))
    y = ones / (ones + 2 * twos)
    d = [1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes]
    # Small texts can give discounts outside their range; every count keeps and gives something.
    return np.array([0.0, *(float(np.clip(value, 0.1, c - 0.1)) for c, value in enumerate(d, 1))])
