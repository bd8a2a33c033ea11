"""Line charts as inline SVG: no library, no script, the same bytes for the same data."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 18, 14, 44
_MOST_POINTS = 600
_LINE_HEIGHT, _LETTER_WIDTH = 14, 7  # of a label, about


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        points: (x, y); those that are not finite are left out.
        style: CSS class of the line.
        marks: draw a dot at every point.
        line: connect the points.
        spans: vertical lines, (x, low, high), such as the interval of a point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    marks: bool = False
    line: bool = True
    spans: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """A chart with linear axes.

    Attributes:
        levels: horizontal dashed lines, (name, y).
        highlight: one point to mark with its own label, (x, y, label).
        start_at_zero: whether the y axis begins at 0.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    levels: Sequence[tuple[str, float]] = field(default_factory=tuple)
    highlight: tuple[float, float, str] | None = None
    start_at_zero: bool = False

    def svg(self) -> str:
        """The chart as an <svg> element; an empty string where nothing can be drawn."""
        drawn = [(s, _thin([p for p in s.points if _finite(p)])) for s in self.series]
        drawn = [(s, points) for s, points in drawn if points]
        if not drawn:
            return ""
        xs = [x for _, points in drawn for x, _ in points]
        ys = [y for _, points in drawn for _, y in points] + [y for _, y in self.levels]
        ys += [y for s, _ in drawn for _, *ends in s.spans for y in ends]
        x_axis = _Axis.fit(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
        low = 0.0 if self.start_at_zero else min(ys)
        y_axis = _Axis.fit(low, _robust_high(ys), _HEIGHT - _BOTTOM, _TOP, widen=True)
        parts = [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="{html.escape(self.title)}">',
            f"<title>{html.escape(self.title)}</title>",
            *self.grid(x_axis, y_axis),
        ]
        taken: list[tuple[float, int]] = []  # heights of labels, and where they end
        for name, value in self.levels:
            y = y_axis.place(value)
            parts.append(
                f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
            )
            # Beside those that it would cover.
            near = [end for height, end in taken if abs(height - y) < _LINE_HEIGHT]
            left = max(near, default=_LEFT + 40)
            taken.append((y, left + _LETTER_WIDTH * (len(name) + 2)))
            parts.append(
                f'<text class="level" x="{left}" y="{y + 14:.1f}" '
                f'text-anchor="start">{html.escape(name)}</text>'
            )
        for series, points in drawn:
            placed = [(x_axis.place(x), y_axis.place(y)) for x, y in points]
            for x, *ends in series.spans:
                at, (low, high) = x_axis.place(x), map(y_axis.place, ends)
                parts.append(
                    f'<line class="{series.style}" x1="{at}" x2="{at}" y1="{low}" y2="{high}"/>'
                )
            if series.line:
                path = " ".join(f"{x},{y}" for x, y in placed)
                parts.append(f'<polyline class="{series.style}" points="{path}"/>')
            if series.marks or len(placed) == 1:
                parts += [
                    f'<circle class="{series.style}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in placed
                ]
        parts += self._marked(x_axis, y_axis)
        return "\n".join([*parts, "</svg>"])

    def grid(self, x_axis: "_Axis", y_axis: "_Axis") -> list[str]:
        """Lines, ticks and labels of both axes."""
        bottom, parts = _HEIGHT - _BOTTOM, []
        for value in y_axis.ticks:
            y = y_axis.place(value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
            )
            label = y_axis.label(value)
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for value in x_axis.ticks:
            x = x_axis.place(value)
            label = x_axis.label(value)
            parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<text class="axis" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">'
            f"{html.escape(self.x_label)}</text>"
        )
        y = (_TOP + bottom) / 2
        parts.append(
            f'<text class="axis" transform="translate(14 {y}) rotate(-90)" text-anchor="middle">'
            f"{html.escape(self.y_label)}</text>"
        )
        return parts

    def _marked(self, x_axis: "_Axis", y_axis: "_Axis") -> list[str]:
        if self.highlight is None or not _finite(self.highlight[:2]):
            return []
        x, y = x_axis.place(self.highlight[0]), y_axis.place(self.highlight[1])
        # To the left of the point in the right half, so that the label stays inside.
        right_half = x > _WIDTH / 2
        anchor, shift = ("end", -4) if right_half else ("start", 4)
        return [
            f'<circle class="best" cx="{x}" cy="{y}" r="5"/>',
            f'<text class="best" x="{x + shift}" y="{y - 11:.1f}" text-anchor="{anchor}">'
            f"{html.escape(self.highlight[2])}</text>",
        ]


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    step: float

    @classmethod
    def fit(
        cls, low: float, high: float, start: float, end: float, *, widen: bool = False
    ) -> "_Axis":
        """An axis with round ticks; `widen` extends it to the ticks around the data."""
        if high - low < 1e-12 * max(1.0, abs(high)):
            spread = abs(high) * 0.1 or 1.0
            low, high = low - spread, high + spread
        step = _round_step((high - low) / 5)
        if widen:
            low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return cls(low, high, start, end, tuple(i * step for i in range(first, last + 1)), step)

    def place(self, value: float) -> float:
        clipped = min(max(value, self.low), self.high)
        share = (clipped - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def label(self, value: float) -> str:
        if abs(self.step) < 1e-3:
            return f"{value:.1e}" if value else "0"
        # As many decimals as the step has: 2.5 has one.
        return f"{value:,.{next(d for d in range(5) if _is_whole(self.step * 10**d) or d == 4)}f}"


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-9 * max(1.0, abs(value))


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred moving average over a fiftieth of the points."""
    usable = [p for p in points if _finite(p)]
    half = len(usable) // 100
    sums = [0.0]
    for _, y in usable:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(usable):
        reach = min(half, i, len(usable) - 1 - i)
        out.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return out


def _finite(point: tuple[float, ...]) -> bool:
    return all(isinstance(v, (int, float)) and math.isfinite(v) for v in point)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 600 points, the first and the last among them."""
    if len(points) <= _MOST_POINTS:
        return points
    scale = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(i * scale)] for i in range(_MOST_POINTS)]


def _robust_high(values: list[float]) -> float:
    """The largest value, unless a few spikes would flatten everything else."""
    ordered = sorted(values)
    typical = ordered[int(len(ordered) * 0.95)]
    low = ordered[0]
    return typical if ordered[-1] - low > 4 * (typical - low) > 0 else ordered[-1]


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))


@dataclass(frozen=True)
class Intervals:
    """Means with their intervals, one a line, on a common axis.

    Attributes:
        rows: (name, mean, low, high).
        levels: vertical dashed lines, (name, x).
    """

    title: str
    x_label: str
    rows: Sequence[tuple[str, float, float, float]]
    levels: Sequence[tuple[str, float]] = field(default_factory=tuple)

    def svg(self) -> str:
        """The chart as an <svg> element; an empty string without rows."""
        rows = [row for row in self.rows if _finite(row[1:])]
        if not rows:
            return ""
        left, top, pitch = 150, 26, 34
        bottom = top + pitch * len(rows)
        ends = [x for row in rows for x in row[1:]] + [x for _, x in self.levels]
        axis = _Axis.fit(min(ends), max(ends), left, _WIDTH - _RIGHT, widen=True)
        parts = [
            f'<svg viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}" role="img" '
            f'aria-label="{html.escape(self.title)}">',
            f"<title>{html.escape(self.title)}</title>",
        ]
        for value in axis.ticks:
            x = axis.place(value)
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
            parts.append(
                f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{axis.label(value)}</text>'
            )
        for name, value in self.levels:
            x = axis.place(value)
            parts.append(f'<line class="level" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
            parts.append(
                f'<text class="level" x="{x}" y="{top - 8}" text-anchor="middle">'
                f"{html.escape(name)}</text>"
            )
        for index, (name, mean, low, high) in enumerate(rows):
            y = top + pitch * (index + 0.5)
            start, at, end = axis.place(low), axis.place(mean), axis.place(high)
            parts.append(
                f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>'
            )
            parts.append(f'<line class="val" x1="{start}" x2="{end}" y1="{y}" y2="{y}"/>')
            parts.append(f'<circle class="val" cx="{at}" cy="{y}" r="4"/>')
        parts.append(
            f'<text class="axis" x="{(left + _WIDTH - _RIGHT) / 2}" y="{bottom + 38}" '
            f'text-anchor="middle">{html.escape(self.x_label)}</text>'
        )
        return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Histogram:
    """Counts in bins.

    Attributes:
        bins: (low edge, high edge, count), in order.
    """

    title: str
    x_label: str
    y_label: str
    bins: Sequence[tuple[float, float, int]]

    @classmethod
    def of(
        cls, title: str, x_label: str, y_label: str, values: Sequence[float], n_bins: int = 24
    ) -> "Histogram":
        """Bins of equal width over the values that are finite."""
        kept = [value for value in values if math.isfinite(value)]
        if not kept:
            return cls(title, x_label, y_label, ())
        low, high = min(kept), max(kept)
        if high == low:
            low, high = low - 0.5, high + 0.5
        width = (high - low) / n_bins
        counts = [0] * n_bins
        for value in kept:
            counts[min(n_bins - 1, int((value - low) / width))] += 1
        edges = [(low + i * width, low + (i + 1) * width) for i in range(n_bins)]
        bins = [(*edge, count) for edge, count in zip(edges, counts, strict=True)]
        return cls(title, x_label, y_label, bins)

    def svg(self) -> str:
        """The chart as an <svg> element; an empty string without bins."""
        if not self.bins:
            return ""
        frame = Chart(self.title, self.x_label, self.y_label, ())
        x_axis = _Axis.fit(self.bins[0][0], self.bins[-1][1], _LEFT, _WIDTH - _RIGHT)
        largest = max(count for *_, count in self.bins)
        y_axis = _Axis.fit(0.0, largest, _HEIGHT - _BOTTOM, _TOP, widen=True)
        parts = [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="{html.escape(self.title)}">',
            f"<title>{html.escape(self.title)}</title>",
            *frame.grid(x_axis, y_axis),
        ]
        for low, high, count in self.bins:
            left, right = x_axis.place(low), x_axis.place(high)
            y = y_axis.place(count)
            if count:
                parts.append(
                    f'<rect class="bar" x="{left + 0.5:.1f}" y="{y:.1f}" '
                    f'width="{max(1.0, right - left - 1):.1f}" '
                    f'height="{_HEIGHT - _BOTTOM - y:.1f}"/>'
                )
        return "\n".join([*parts, "</svg>"])
