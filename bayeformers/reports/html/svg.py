"""Small pictures as inline SVG: one panel with axes, and the marks that reports need.

Marks take their colours from CSS classes, so that one picture serves light and dark screens; a picture is as wide as
a narrow screen, and its letters stay readable there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Panel", "grid", "ticks"]

WIDTH, HEIGHT = 340, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 48


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers within [low, high], about ``count`` of them: multiples of 1, 2, 2.5 or 5 times 10^k.

    Args:
        low: end of the range.
        high: its other end, > low.
        count: how many to aim at.

    >>> ticks(0.0, 1.0), ticks(0.62, 1.0)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.7, 0.8, 0.9, 1.0])
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(step * index, 12) for index in range(first, last + 1)]


@dataclass
class Panel:
    """One picture with two axes, drawn mark by mark and returned by `render`.

    Attributes:
        name: an id that no other picture of the page has.
        title: what it shows, for readers who do not see it.
        description: what can be seen in it, for the same readers.
        x: ends of the horizontal axis.
        y: ends of the vertical axis.
        labels: of the two axes.
        percent: which axes are shares that are shown in percent.
        height: of the picture, in pixels.
    """

    name: str
    title: str
    description: str
    x: tuple[float, float]
    y: tuple[float, float]
    labels: tuple[str, str]
    percent: tuple[bool, bool] = (False, False)
    height: int = HEIGHT
    marks: list[str] = field(default_factory=list)

    def line(self, x: ArrayLike, y: ArrayLike, kind: str) -> None:
        """Join points (K,) by a line of the CSS class ``kind``; points without a value break it."""
        values = zip(np.atleast_1d(x).tolist(), np.atleast_1d(y).tolist(), strict=True)
        path, drawing = [], False
        for a, b in values:
            if not (math.isfinite(a) and math.isfinite(b)):
                drawing = False
                continue
            path.append(f"{'L' if drawing else 'M'}{self._at(a, b)}")
            drawing = True
        if path:
            self.marks.append(f'<path class="l {kind}" d="{"".join(path)}"/>')

    def band(self, x: ArrayLike, low: ArrayLike, high: ArrayLike, kind: str) -> None:
        """Fill between two curves.

        Args:
            x: (K,).
            low: the lower curve, (K,).
            high: the upper curve, (K,).
            kind: the CSS class.
        """
        forth = list(zip(np.atleast_1d(x).tolist(), np.atleast_1d(high).tolist(), strict=True))
        back = list(zip(np.atleast_1d(x).tolist(), np.atleast_1d(low).tolist(), strict=True))[::-1]
        path = "L".join(self._at(a, b) for a, b in [*forth, *back])
        self.marks.append(f'<path class="b {kind}" d="M{path}Z"/>')

    def dots(self, x: ArrayLike, y: ArrayLike, kind: str) -> None:
        """Points (K,) as discs: one path of strokes without length, 12 bytes a point."""
        points = zip(np.atleast_1d(x).tolist(), np.atleast_1d(y).tolist(), strict=True)
        self._path("".join(f"M{self._at(a, b)}h0" for a, b in points), f"d {kind}")

    def crosses(self, x: ArrayLike, y: ArrayLike, kind: str, size: int = 3) -> None:
        """Points (K,) as crosses, so that their colour is not all that tells them.

        Args:
            x: (K,).
            y: (K,).
            kind: the CSS class.
            size: half of a cross, in pixels.
        """
        points = zip(np.atleast_1d(x).tolist(), np.atleast_1d(y).tolist(), strict=True)
        stroke = f"m-{size}-{size}l{2 * size} {2 * size}m0-{2 * size}l-{2 * size} {2 * size}"
        self._path("".join(f"M{self._at(a, b)}{stroke}" for a, b in points), f"x {kind}")

    def whiskers(self, x: ArrayLike, low: ArrayLike, high: ArrayLike, kind: str) -> None:
        """Upright bars from ``low`` to ``high``, with ends.

        Args:
            x: (K,).
            low: (K,).
            high: (K,).
            kind: the CSS class.
        """
        rows = zip(*(np.atleast_1d(values).tolist() for values in (x, low, high)), strict=True)
        path = [f"M{self._at(a, b)}V{self._y(c):.1f}m-3 0h6M{self._at(a, b)}m-3 0h6" for a, b, c in rows]
        self._path("".join(path), f"w {kind}")

    def steps(self, edges: ArrayLike, heights: ArrayLike, kind: str) -> None:
        """A histogram as a filled outline.

        Args:
            edges: of the bins, (K + 1,).
            heights: (K,).
            kind: the CSS class.
        """
        sides, tops = np.asarray(edges).tolist(), np.asarray(heights).tolist()
        path = f"M{self._at(sides[0], self.y[0])}"
        for left, right, top in zip(sides[:-1], sides[1:], tops, strict=True):
            path += f"L{self._at(left, top)}L{self._at(right, top)}"
        self.marks.append(f'<path class="h {kind}" d="{path}L{self._at(sides[-1], self.y[0])}Z"/>')

    def render(self) -> str:
        """The picture as one SVG element."""
        frame = "".join(self._axis(which) for which in (0, 1))
        clip = f'<clipPath id="{self.name}-c"><rect x="{LEFT - 4}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 8}" '
        clip += f'height="{self.height - TOP - BOTTOM + 8}"/></clipPath>'
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-labelledby="{self.name}-t {self.name}-d">'
            f'<title id="{self.name}-t">{escape(self.title)}</title>'
            f'<desc id="{self.name}-d">{escape(self.description)}</desc>{clip}{frame}'
            f'<g clip-path="url(#{self.name}-c)">{"".join(self.marks)}</g></svg>'
        )

    # -- places -------------------------------------------------------------------------------------------------------

    def _axis(self, which: int) -> str:
        ends, label, floor = (self.x, self.y)[which], escape(self.labels[which]), self.height - BOTTOM
        parts = []
        for value in ticks(*ends):
            text = f"{round(100 * value, 1):g}" if self.percent[which] else f"{value:g}"
            if which == 0:
                x = self._x(value)
                parts.append(f'<path class="g" d="M{x:.1f} {TOP}V{floor}"/>')
                parts.append(f'<text x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{text}</text>')
            else:
                y = self._y(value)
                parts.append(f'<path class="g" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
                parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        if which == 0:
            middle = (LEFT + WIDTH - RIGHT) / 2
            parts.append(f'<path class="a" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text class="t" x="{middle:g}" y="{self.height - 8}" text-anchor="middle">{label}</text>')
        else:
            middle = (TOP + floor) / 2
            turned = f'transform="rotate(-90 11 {middle:g})" text-anchor="middle"'
            parts.append(f'<text class="t" x="11" y="{middle:g}" {turned}>{label}</text>')
        return "".join(parts)

    def _path(self, path: str, kind: str) -> None:
        if path:
            self.marks.append(f'<path class="{kind}" d="{path}"/>')

    def _at(self, x: float, y: float) -> str:
        return f"{self._x(x):.1f} {self._y(y):.1f}"

    def _x(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        floor = self.height - BOTTOM
        return floor - (value - self.y[0]) / (self.y[1] - self.y[0]) * (floor - TOP)


def grid(panels: Sequence[tuple[str, str]]) -> str:
    """Return pictures side by side where there is room.

    Args:
        panels: a caption (HTML) and a picture each.
    """
    figures = (f"<figure><figcaption>{caption}</figcaption>{picture}</figure>" for caption, picture in panels)
    columns = 2 if len(panels) in (2, 4) else 3
    return f'<div class="grid of-{columns}">{"".join(figures)}</div>'
