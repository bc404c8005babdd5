"""Small line plots as SVG text, for pages that load nothing. Every label is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0b6e99", "#b08900", "#9b2c5e", "#2f855a", "#6b46c1", "#c05621", "#4a5568", "#2b6cb0")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 260, 48, 12, 12, 30
LABELS = 12
"""Names that fit below the plot."""


@dataclass(frozen=True)
class Line:
    """One line: a value for each place, None where nothing is known; `spread` are the ends of its intervals."""

    name: str
    values: Sequence[float | None]
    spread: Sequence[tuple[float, float] | None] = ()
    dashed: bool = False


def plot(lines: Sequence[Line], places: Sequence[str], *, top: float, unit: str = "", title: str) -> str:
    """An `<svg>` with a legend below it; values from 0 to `top`."""
    shapes = [_grid(top, unit), _names(places)]
    for number, line in enumerate(lines):
        shapes.append(_line(line, len(places), top, COLOURS[number % len(COLOURS)]))
    legend = "".join(_legend(line.name, COLOURS[n % len(COLOURS)]) for n, line in enumerate(lines))
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(shapes)}</svg>'
    return f"<figure>{drawn}<figcaption>{legend}</figcaption></figure>"


def _x(place: int, count: int) -> float:
    inner = WIDTH - LEFT - RIGHT
    return LEFT + (inner / 2 if count == 1 else inner * place / (count - 1))


def _y(value: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(value / top, 0.0), 1.0))


def _grid(top: float, unit: str) -> str:
    drawn = []
    for quarter in range(5):
        value = top * quarter / 4
        y = _y(value, top)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}{escape(unit)}</text>')
    return "".join(drawn)


def _names(places: Sequence[str]) -> str:
    every = max(1, -(-len(places) // LABELS))
    last = len(places) - 1
    drawn = []
    for i, name in enumerate(places):
        if i % every == 0:
            anchor = "end" if i == last > 0 else "middle"
            drawn.append(f'<text x="{_x(i, len(places)):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">')
            drawn.append(f"{escape(name)}</text>")
    return "".join(drawn)


def _line(line: Line, count: int, top: float, colour: str) -> str:
    at = [(_x(i, count), _y(v, top)) for i, v in enumerate(line.values) if v is not None]
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    drawn = f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
    if len(at) <= LABELS:
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in at)
    for place, ends in enumerate(line.spread):
        if ends is not None:
            x, low, high = _x(place, count), _y(ends[0], top), _y(ends[1], top)
            drawn += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>'
    return drawn


def _legend(name: str, colour: str) -> str:
    return f'<svg viewBox="0 0 10 10" class="key"><rect width="10" height="10" fill="{colour}"/></svg>{escape(name)} '
