"""How probable the model held what it wrote: colours, a table, and what they come to.

The probability of a token is the model's own: softmax of its logits at the calibration temperature,
before any filter or reward. What they come to says how usual the model finds the text; it is no
probability that the text is right.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

# Up to which probability, and the colour of the 256 that every terminal has. Each has a contrast of
# 3:1 at least to white and to black.
STEPS = ((0.05, 160), (0.2, 166), (0.5, 136), (0.8, 64), (math.inf, 30))
_PLAIN = "\x1b[39m"


@dataclass(frozen=True)
class Calibration:
    """What is known of a model's calibration temperature.

    Attributes:
        temperature: the fitted one, or None.
        stale: whether one was fitted before the weights were trained further.
    """

    temperature: float | None = None
    stale: bool = False

    def in_words(self) -> str:
        """For the end of a sentence."""
        if self.temperature is not None:
            return f"calibrated at temperature {self.temperature:.4g}"
        if self.stale:
            return (
                "not calibrated: the temperature was fitted before the model was trained further; "
                "nanogpt calibrate fits one again"
            )
        return "not calibrated: nanogpt calibrate fits a temperature"


def colours_wanted(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether to colour what goes to a stream: on a terminal, or where FORCE_COLOR asks for it.

    NO_COLOR forbids it in any case.
    Source: no-color.org, force-color.org.
    """
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return stream.isatty() and environment.get("TERM") != "dumb"


def coloured(text: str, probability: float) -> str:
    """The text in the colour of its probability, from red (unlikely) to teal."""
    if not text:
        return ""
    colour = next(colour for limit, colour in STEPS if probability < limit)
    return f"\x1b[38;5;{colour}m{text}{_PLAIN}"


def table(rows: Sequence[tuple[bytes | None, float]]) -> str:
    """One token a line, as nanogpt-generate shows them.

    Args:
        rows: a token's bytes, None for the end of a text, and its probability.
    """
    lines = ["probability  token"]
    for raw, probability in rows:
        lines.append(f"{probability:11.6f}  {'<|endoftext|>' if raw is None else literal(raw)}")
    return "\n".join(lines)


def summary(probabilities: Sequence[float], calibration: Calibration) -> str:
    """The mean log-probability in nats and its exp, in one line."""
    if not probabilities:
        return f"no tokens; {calibration.in_words()}"
    mean = mean_log(probabilities)
    return (
        f"mean log-probability {mean:.4g} over {len(probabilities):,} tokens, a likelihood of "
        f"{math.exp(mean):.4g} a token (how usual the model finds the text, not P(correct)); "
        f"{calibration.in_words()}"
    )


def mean_log(probabilities: Sequence[float]) -> float:
    """The mean of the logs; -inf where one is 0."""
    if min(probabilities) <= 0:
        return -math.inf
    return math.fsum(math.log(p) for p in probabilities) / len(probabilities)


def literal(raw: bytes) -> str:
    """A token as a C string literal that is safe for a terminal."""
    escapes = {"\n": "\\n", "\t": "\\t", "\\": "\\\\", '"': '\\"'}
    shown = []
    for character in raw.decode("utf-8", "surrogateescape"):
        code = ord(character)
        if character in escapes:
            shown.append(escapes[character])
        elif 0x20 <= code < 0x7F or (code >= 0xA0 and not 0xDC80 <= code <= 0xDCFF):
            shown.append(character)
        else:
            own = character.encode("utf-8", "surrogateescape")
            shown.append("".join(f"\\x{byte:02x}" for byte in own))
    return f'"{"".join(shown)}"'
