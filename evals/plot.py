"""The learning curve as a picture, from the rows of a report; and variants of one night side by side.

Owns the PNGs only; it reads nothing but `evals.report` rows and counts of successes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from evals.report import Row, overall
from evals.stats import wilson
from memory.errors import ConfigError, boundary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, MUTED, GRID = "#1f2933", "#0b6e99", "#8a939d", "#e4e7eb"


def learning_curve(rows: Sequence[Row], path: Path, title: str = "Held-out success by generation") -> Path:
    """Draw success (0-100%) over the rows, in their order, as a PNG at `path`.

    Bold: all held-out tasks with 95% intervals. Thin: single workloads. Dashed: control suites.
    Raises: ConfigError when there are no rows or the file cannot be written.
    """
    if not rows:
        raise ConfigError("there is nothing to plot: the report has no rows")
    with _drawn(path, 4.8, title) as axes:
        places = list(range(len(rows)))
        _thin_lines(axes, rows, places)
        _bold_line(axes, rows, places)
        axes.set_xticks(places, [row["name"] for row in rows])
        axes.set_xlim(-0.3, len(rows) - 0.7)
        axes.set_ylim(-3, 106)
        axes.set_yticks(range(0, 101, 20), [f"{p}%" for p in range(0, 101, 20)])
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        handles, labels = axes.get_legend_handles_labels()
        handles, labels = [handles[-1], *handles[:-1]], [labels[-1], *labels[:-1]]
        axes.legend(
            handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5, labelcolor=INK
        )
    return path


def variants(counts: Mapping[str, tuple[int, int]], path: Path, title: str) -> Path:
    """Draw success with its 95% interval, a line for each variant from the top, as a PNG at `path`.

    `counts`: name -> successes, tasks. Raises: ConfigError when there are none or the file cannot be written.
    """
    if not counts:
        raise ConfigError("there is nothing to plot: no variant was measured")
    with _drawn(path, 1.2 + 0.34 * len(counts), title) as axes:
        for place, (hits, n) in enumerate(counts.values()):
            rate, (low, high) = 100 * hits / n, wilson(hits, n)
            sides = [[rate - 100 * low], [100 * high - rate]]
            axes.errorbar([rate], [place], xerr=sides, color=ACCENT, linewidth=2, marker="o", markersize=6, capsize=3)
            axes.annotate(f"{rate:.0f}%", (102, place), va="center", color=INK, fontsize=9, annotation_clip=False)
        axes.set_yticks(range(len(counts)), list(counts))
        axes.set_ylim(len(counts) - 0.5, -0.5)
        axes.set_xlim(0, 101)
        axes.set_xticks(range(0, 101, 20), [f"{p}%" for p in range(0, 101, 20)])
        axes.grid(axis="x", color=GRID, linewidth=0.8)
    return path


@contextmanager
def _drawn(path: Path, height: float, title: str) -> Iterator[Axes]:
    """Axes to draw on; written to `path` afterwards, whole or not at all."""
    with boundary(ConfigError, f"cannot draw {path}"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.4, height), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        yield axes
        axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft")
        figure.savefig(draft, format="png")
        draft.replace(path)


def _bold_line(axes: Axes, rows: Sequence[Row], places: list[int]) -> None:
    rates = [overall(row["workloads"]) for row in rows]
    shown = [(x, r) for x, r in zip(places, rates, strict=True) if r["success"] is not None]
    xs = [x for x, _ in shown]
    ys = [100 * (r["success"] or 0.0) for _, r in shown]
    below = [y - 100 * r["low"] for y, (_, r) in zip(ys, shown, strict=True)]
    above = [100 * r["high"] - y for y, (_, r) in zip(ys, shown, strict=True)]
    label = f"all held-out tasks (n = {max((r['n'] for _, r in shown), default=0)}), 95% interval"
    axes.errorbar(
        xs,
        ys,
        yerr=[below, above],
        color=ACCENT,
        linewidth=2.6,
        marker="o",
        markersize=7,
        capsize=4,
        zorder=5,
        label=label,
    )
    for x, y in zip(xs, ys, strict=True):
        axes.annotate(
            f"{y:.0f}%", (x, y), xytext=(9, -4), textcoords="offset points", color=ACCENT, fontweight="bold", zorder=6
        )


def _thin_lines(axes: Axes, rows: Sequence[Row], places: list[int]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab10"]
    for kind, style in (("workloads", "-"), ("controls", "--")):
        names = dict.fromkeys(name for row in rows for name in row[kind])
        for number, name in enumerate(names):
            found = [(x, row[kind].get(name)) for x, row in zip(places, rows, strict=True)]
            points = [(x, 100 * r["success"]) for x, r in found if r is not None and r["success"] is not None]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                style,
                color=colours(number % 10) if kind == "workloads" else (MUTED, INK, "#b08900", "#9b2c5e")[number % 4],
                linewidth=1.0 if kind == "workloads" else 1.5,
                alpha=0.75,
                marker=".",
                markersize=4,
                label=name if kind == "workloads" else f"control: {name}",
            )
