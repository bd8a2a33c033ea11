"""The report of a run: complete, escaped, self-contained, bounded."""

import math
import re
from html.parser import HTMLParser

import pytest

from nanogpt.report.plots import Chart, Series, smoothed
from nanogpt.report.training import TrainingReport, render_training_report

VOID = {"meta", "line", "circle", "br", "polyline"}


class Balance(HTMLParser):
    """Checks that tags nest, and collects attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        self.words.append(words)


def make_run(**changes):
    rows = [
        {
            "step": step,
            "train_loss": 3 / (1 + step / 40) + 1.5,
            "learning_rate": 1e-3 * (1 - step / 1000),
            "tokens_per_second": 16000.0 + step,
            "seconds": step / 20,
            **({"val_loss": 3 / (1 + step / 40) + 1.6} if step % 50 == 0 else {}),
        }
        for step in range(2, 402, 2)
    ]
    fields = {
        "title": "book: a GPT of 804,224 parameters",
        "status": "finished",
        "metrics": rows,
        "samples": [{"step": s, "text": f"Sample at {s}: hello"} for s in range(50, 450, 50)],
        "config": {"epochs": 3, "learning-rate": 0.004, "text": ["a.txt", "b.txt"]},
        "choices": {"device": "cpu", "kernels": "torch (auto)"},
        "corpus": {"name": "book", "n_bytes": 1_115_394},
        "baselines": {"order-5 n-gram": 2.25, "gzip -9": 3.1},
        "bits_per_nat_target": 1 / math.log(2),
        "model": {"n_layer": 4, "n_parameters": 804_224},
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "events": [{"step": 90, "kind": "skipped", "message": "step 90 was skipped: loss nan"}],
        "best_step": 400,
        "best_val_loss": 1.8727,
        "seconds": 95.0,
    }
    return TrainingReport(**{**fields, **changes})


def parse(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_everything_is_on_the_page():
    page = render_training_report(make_run())
    words = re.sub(r"\s+", " ", " ".join(parse(page).words))
    for expected in (
        "1.8727", "2.702", "2.250", "3.100", "1 min 35 s", "804.2 k", "book: a GPT",
        "still 20% more than an order-5 n-gram model", "step 90 was skipped", "Step 400",
        "Sample at 400: hello", "Sample at 50: hello", "learning-rate", "0.004", "a.txt, b.txt",
        "torch (auto)", "1,115,394", "2.13.0", "optimizer step", "nats a token",
    ):  # fmt: skip
        assert expected in words, expected
    assert page.count("<svg") == 3


def test_a_model_that_beats_the_ngram_is_told_so():
    page = render_training_report(make_run(best_val_loss=1.4))
    assert "10% fewer than an order-5 n-gram model" in page


def test_nothing_is_loaded_from_anywhere():
    page = render_training_report(make_run())
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(|<script|<link", page)


def test_hostile_text_is_escaped():
    bad = "</pre><script>alert(1)</script>\x00&"
    page = render_training_report(
        make_run(title=bad, samples=[{"step": 1, "text": bad}], config={bad: bad})
    )
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    parse(page)


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": [], "samples": [], "events": [], "best_val_loss": None, "best_step": None},
        {"metrics": make_run().metrics[:1]},
        {"metrics": [{"step": 1, "train_loss": math.nan, "tokens_per_second": math.inf}]},
        {"metrics": [{"step": i, "train_loss": None} for i in range(5)]},
        {"baselines": {}, "bits_per_nat_target": None},
        {"status": "interrupted", "events": [{"step": 1, "kind": "x", "message": "m"}] * 200},
    ],
)
def test_a_run_with_little_or_odd_to_show_has_a_page(changes):
    page = render_training_report(make_run(**changes))
    parse(page)
    assert "nan" not in re.sub(r"<style.*?</style>|skipped: loss nan", "", page, flags=re.S)


def test_a_long_run_has_a_page_of_bounded_size():
    rows = [{"step": i, "train_loss": 2.0, "learning_rate": 1.0} for i in range(100_000)]
    samples = [{"step": i, "text": "x" * 10_000} for i in range(500)]
    assert len(render_training_report(make_run(metrics=rows, samples=samples))) < 500_000


def test_the_same_run_gives_the_same_page():
    assert render_training_report(make_run()) == render_training_report(make_run())


def test_points_stand_where_their_values_are():
    chart = Chart("t", "x", "y", [Series("s", [(0, 0.0), (5, 5.0), (10, 10.0)], "train")])
    points = re.search(r'points="([^"]+)"', chart.svg())[1].split()
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
    assert x0 < x1 < x2
    assert y0 > y1 > y2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_ticks_are_round_and_surround_the_data():
    chart = Chart("t", "x", "y", [Series("s", [(0, 1.37), (1, 2.93)], "train")])
    labels = re.findall(r'text-anchor="end">([\d.]+)<', chart.svg())
    assert [float(label) for label in labels] == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_smoothing_keeps_a_line_straight_and_averages_noise():
    line = [(i, 3.0 * i) for i in range(1000)]
    assert [y for _, y in smoothed(line)] == pytest.approx([y for _, y in line])
    noise = [(i, (-1) ** i) for i in range(1000)]
    assert max(abs(y) for _, y in smoothed(noise)[50:-50]) < 0.1


def test_one_spike_does_not_flatten_the_curve():
    points = [(i, 2 + i / 1000) for i in range(200)] + [(200, 1e6)]
    svg = Chart("t", "x", "y", [Series("s", points, "train")]).svg()
    labels = re.findall(r'text-anchor="end">([\d.,]+)<', svg)
    assert float(labels[-1].replace(",", "")) < 10


@pytest.mark.parametrize(
    ("high", "labels"),
    [
        (12.5, ["0.0", "2.5", "5.0", "7.5", "10.0", "12.5"]),
        (1.2, ["0.00", "0.25", "0.50", "0.75", "1.00", "1.25"]),
        (12_000.0, ["0", "2,500", "5,000", "7,500", "10,000", "12,500"]),
        (5.0, ["0", "1", "2", "3", "4", "5"]),
    ],
)
def test_labels_of_an_axis_have_the_decimals_of_its_steps(high, labels):
    chart = Chart("t", "x", "y", [Series("s", [(0, 0.0), (1, high)], "train")], start_at_zero=True)
    found = re.findall(r'text-anchor="end">([\d.,]+)<', chart.svg())
    assert found == labels


def test_the_first_losses_of_a_quick_run_do_not_flatten_the_rest():
    losses = [(i, 12.0 - i) if i < 10 else (i, 2.4 - i / 500) for i in range(250)]
    labels = re.findall(
        r'text-anchor="end">([\d.,]+)<', Chart("t", "x", "y", [Series("s", losses, "train")]).svg()
    )
    assert float(labels[-1]) < 4


def test_labels_of_levels_do_not_cover_each_other():
    series = [Series("a", ((0, 1.0), (10, 2.0)), "train")]
    close = [("first", 1.50), ("second", 1.51), ("third", 1.52), ("far away", 1.0)]
    svg = Chart("t", "x", "y", series, levels=close).svg()
    found = re.findall(r'<text class="level" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)', svg)
    boxes = [(float(x), float(x) + 7 * len(name), float(y)) for x, y, name in found]
    assert [name for _, _, name in found] == [name for name, _ in close]
    for i, (left, right, y) in enumerate(boxes):
        for other_left, other_right, other_y in boxes[:i]:
            assert abs(y - other_y) >= 14 or right <= other_left or other_right <= left
