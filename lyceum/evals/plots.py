"""The plots of a report as SVG elements: one drawing style, no file, no script, text as text.

What it is not: a plotting library. What a plot says is chosen where it is used.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BLUE, RED, GREY = "#3867b7", "#b3372f", "#8a93a3"
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "lyceum", "font.size": 8, "axes.spines.top": False,
         "axes.spines.right": False, "font.family": "sans-serif"}  # fmt: skip


def drawn(
    draw: Callable[[Any], None], title: str, below: str, *, size: tuple[float, float] = (3.1, 1.8), font: int = 8
) -> str:
    """One plot of `size` inches: `draw` puts lines or bars on the axes that it is given."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        draw(axes)
        axes.set_title(title, loc="left", fontsize=font)
        axes.set_xlabel(below, fontsize=font - 1)
        axes.grid(alpha=0.25)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def curve(
    points: Sequence[tuple[float, float]],
    title: str,
    below: str = "step",
    intervals: Sequence[tuple[float, float]] = (),
) -> str:
    """A line through points; with intervals, (low, high) of every point, its points are marked."""

    def draw(axes: Any) -> None:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, linewidth=1.2, color=BLUE, marker="o" if intervals else "", markersize=3)
        if intervals:
            axes.vlines(x, *zip(*intervals, strict=True), linewidth=1.0, color=BLUE, alpha=0.6)
            axes.set_xticks(x)

    return drawn(draw, title, below)


def reliability(bins: Sequence[Mapping[str, float]], title: str) -> str:
    """A calibration curve: the share that was right over the stated confidence, dots as large as their bins; grey: as stated."""

    def draw(axes: Any) -> None:
        most = max(point["pairs"] for point in bins)
        stated, right = [point["stated"] for point in bins], [point["right"] for point in bins]
        axes.plot([0.5, 1.0], [0.5, 1.0], linewidth=1.0, color=GREY)
        axes.plot(stated, right, linewidth=1.0, color=BLUE)
        axes.scatter(stated, right, s=[4 + 30 * point["pairs"] / most for point in bins], color=BLUE)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(min(0.38, *right) - 0.02, 1.02)

    return drawn(draw, title, "stated confidence")


def histogram(edges: Sequence[float], counts: Sequence[int], title: str, below: str) -> str:
    """Counts between edges; what lies below 0 is red."""

    def draw(axes: Any) -> None:
        widths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
        colours = [RED if right <= 0 else BLUE for right in edges[1:]]
        axes.bar(edges[:-1], counts, width=widths, align="edge", color=colours, edgecolor="white", linewidth=0.3)

    return drawn(draw, title, below)
