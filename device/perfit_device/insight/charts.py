"""Two small pictures as SVG: lines over updates, and bars. Colours are classes of the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from perfit_shared.terminal import one_line

__all__ = ["Bar", "Line", "bars", "lines"]

_WIDTH = 400  # narrow, so that letters are large enough on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 12, 32
_HEIGHT = 220
_BAR, _GAP, _NAME, _VALUE = 18, 10, 92, 56
_TICKS = 4
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Line:
    name: str
    css: str  # class: its colour and dashes
    values: Sequence[float]


def lines(title: str, labels: Sequence[str], series: Sequence[Line], marked: Sequence[bool]) -> str:
    """A point a label; those that are not `marked` stand hollow."""
    low, high, step = _scale([value for line in series for value in line.values])
    inner = _WIDTH - _LEFT - _RIGHT

    def x(i: int) -> float:
        return _LEFT + (inner / 2 if len(labels) == 1 else inner * (0.06 + 0.88 * i / (len(labels) - 1)))

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = []
    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y(value) + 4:.1f}">{value:.3g}</text>')
    every = math.ceil(len(labels) / 12)
    for i, label in enumerate(labels):
        if i % every == 0:
            place = f'x="{x(i):.1f}" y="{_HEIGHT - 10}"'
            parts.append(f'<text class="tick middle" {place}>{_plain(label)}</text>')
    for line in series:
        points = [(x(i), y(value)) for i, value in enumerate(line.values)]
        path = " ".join(f"{at:.1f},{up:.1f}" for at, up in points)
        parts.append(f'<polyline class="line {line.css}" points="{path}"/>')
        for (at, up), is_marked in zip(points, marked, strict=True):
            hollow = "" if is_marked else " hollow"
            parts.append(f'<circle class="dot {line.css}{hollow}" cx="{at:.1f}" cy="{up:.1f}" r="4.5"/>')
    return _svg(title, _HEIGHT, parts)


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    text: str  # beside it
    css: str = "one"


def bars(title: str, values: Sequence[Bar]) -> str:
    """Lying bars from 0."""
    most = max((bar.value for bar in values), default=0.0) or 1.0
    room = _WIDTH - _NAME - _VALUE
    parts = []
    for i, bar in enumerate(values):
        top = _GAP / 2 + i * (_BAR + _GAP)
        middle = top + _BAR / 2 + 5
        width = max(1.0, room * max(0.0, bar.value) / most)
        parts += [
            f'<text class="end" x="{_NAME - 10}" y="{middle:.1f}">{_plain(bar.name)}</text>',
            f'<rect class="bar {bar.css}" x="{_NAME}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{_BAR}" rx="3"/>',
            f'<text x="{_NAME + width + 8:.1f}" y="{middle:.1f}">{_plain(bar.text)}</text>',
        ]
    return _svg(title, round(len(values) * (_BAR + _GAP)), parts)


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    name = _plain(title)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{name}">\n{"".join(parts)}\n</svg>'


def _plain(text: str) -> str:
    """A name or figure, without what could be markup."""
    return escape(one_line(text)[:_LONGEST_NAME], quote=True)


def _scale(values: Sequence[float]) -> tuple[float, float, float]:
    """(lowest, highest, step) of an axis in round numbers around the values."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(spread / _TICKS))
    step = next(power * n for n in (1, 2, 5, 10) if spread / (power * n) <= _TICKS)
    lowest = math.floor(low / step) * step
    highest = math.ceil(high / step) * step
    return lowest, highest if highest > lowest else lowest + step, step
