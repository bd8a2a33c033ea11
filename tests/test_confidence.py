"""How confidence is shown: colours, table, summary."""

import io
import math

import pytest

from nanogpt import confidence
from nanogpt.confidence import Calibration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "wanted"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (io.StringIO(), {}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (io.StringIO(), {"FORCE_COLOR": ""}, False),
        (io.StringIO(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours_are_for_terminals_and_for_who_forces_them(stream, environment, wanted):
    assert confidence.colours_wanted(stream, environment) is wanted


def luminance(colour: int) -> float:
    """Relative luminance of one of the 216 colours of the cube, by WCAG 2."""
    levels = (0, 95, 135, 175, 215, 255)
    parts = [levels[(colour - 16) // 36], levels[(colour - 16) // 6 % 6], levels[(colour - 16) % 6]]
    linear = [p / 255 / 12.92 if p < 11 else ((p / 255 + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_can_be_read_on_white_and_on_black():
    colours = [colour for _, colour in confidence.STEPS]
    assert len(set(colours)) == 5
    for colour in colours:
        light = luminance(colour)
        assert 1.05 / (light + 0.05) >= 3
        assert (light + 0.05) / 0.05 >= 3


@pytest.mark.parametrize(
    ("probability", "colour"),
    [(0.0, 160), (0.049, 160), (0.05, 166), (0.3, 136), (0.5, 64), (0.8, 30), (1.0, 30)],
)
def test_a_token_has_the_colour_of_its_probability(probability, colour):
    assert confidence.coloured("é", probability) == f"\x1b[38;5;{colour}mé\x1b[39m"
    assert confidence.coloured("", probability) == ""


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"gene", '"gene"'),
        (b" a\n\t", '" a\\n\\t"'),
        (b'"\\', '"\\"\\\\"'),
        ("é".encode(), '"é"'),
        (b"\xc3", '"\\xc3"'),
        (b"\xa9a", '"\\xa9a"'),
        (b"\x1b[31m", '"\\x1b[31m"'),
        ("\x9b".encode(), '"\\xc2\\x9b"'),
    ],
)
def test_a_token_is_shown_so_that_no_terminal_obeys_it(raw, shown):
    assert confidence.literal(raw) == shown


def test_the_summary_is_the_mean_of_the_logs_and_no_probability_of_being_right():
    line = confidence.summary([0.5, 0.125], Calibration(1.25))
    assert f"mean log-probability {math.log(0.25):.4g} over 2 tokens" in line
    assert "a likelihood of 0.25 a token" in line
    assert "not P(correct)" in line
    assert line.endswith("calibrated at temperature 1.25")
    assert "likelihood of 0 a token" in confidence.summary([0.5, 0.0], Calibration())
    assert confidence.summary([], Calibration()).startswith("no tokens")


def test_the_calibration_is_fitted_missing_or_stale():
    assert "nanogpt calibrate fits a temperature" in Calibration().in_words()
    stale = Calibration(None, stale=True).in_words()
    assert stale.startswith("not calibrated")
    assert "trained further" in stale
    assert "nanogpt calibrate" in stale
