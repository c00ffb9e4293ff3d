"""Curves, whiskers and heat maps, on axes; and as SVG that stands inside a page and takes its text color from there."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Points = Sequence[tuple[float, float]]

# Middle tones: they can be told from a white page as from a black one, and from each other without seeing color well.
COLORS = ("#2f81f7", "#e8710a", "#12a150", "#c026d3", "#b08800", "#7a869a")
_MARKERS = "osD^vP"
_TEXT = "#010203"  # stands for the page's own text color, which is known only where the page is shown
UNUSED = "#d1495b"


@contextmanager
def _figure(width: float, height: float, *, label: str, rows: int = 1, columns: int = 1):
    """A figure of inches and its axes; its SVG is in the list that comes third once the block is left."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",  # text stays text: it can be searched, and scales with the page
        "svg.hashsalt": label,  # the same chart is the same file
        "text.color": _TEXT,
        "axes.edgecolor": _TEXT,
        "axes.labelcolor": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "font.size": 9,
        "legend.frameon": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        done: list[str] = []
        yield figure, axes, done
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        done.append(_inline(file.getvalue(), label))


def _inline(svg: str, label: str) -> str:
    """Without what only a file of its own needs; ids made unlike those of the page's other charts."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    mark = re.sub(r"\W+", "-", label)
    svg = re.sub(r'\bid="', f'id="{mark}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}-", svg)
    return svg.replace(_TEXT, "currentColor").strip()


def curves(series: Mapping[str, Points], *, label: str, x: str = "step") -> str:
    """Name -> its points (x, y), as lines. label: unique on the page."""
    with _figure(5.2, 2.7, label=label) as (figure, axes, done):
        draw_curves(figure, axes[0][0], series, x=x)
    return done[0]


def draw_curves(figure: Any, axis: Any, series: Mapping[str, Points], *, x: str = "step") -> None:
    """The lines of `curves` on axes of matplotlib."""
    for name, points in series.items():
        xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, label=name, linewidth=1.5, marker="o" if len(xs) < 12 else None, markersize=3)
    axis.set_xlabel(x)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)


def whiskers(rows: Sequence[str], series: Mapping[str, Sequence[Any]], *, label: str, percent: bool) -> str:
    """Row by row, one dot with its interval for each checkpoint; None where it was not measured.

    series: checkpoint -> of each row (value, low, high).
    """
    with _figure(6.4, height_of_whiskers(len(rows), len(series)), label=label) as (_, axes, done):
        draw_whiskers(axes[0][0], rows, series, percent=percent)
    return done[0]


def height_of_whiskers(rows: int, series: int) -> float:
    """Inches that so many dots need."""
    return 0.8 + 0.32 * rows * max(1, series / 2)


def draw_whiskers(axis: Any, rows: Sequence[str], series: Mapping[str, Sequence[Any]], *, percent: bool) -> None:
    """The dots of `whiskers` on an axis of matplotlib."""
    scale = 100 if percent else 1
    for place, (name, figures) in enumerate(series.items()):
        known = [(row, figure) for row, figure in enumerate(figures) if figure is not None]
        offset = (place - (len(series) - 1) / 2) * 0.7 / max(1, len(series))
        values = [scale * value for _, (value, _, _) in known]
        errors = [
            [scale * max(0, value - low) for _, (value, low, _) in known],
            [scale * max(0, high - value) for _, (value, _, high) in known],
        ]
        heights = [row + offset for row, _ in known]
        marker = _MARKERS[place % len(_MARKERS)]
        axis.errorbar(values, heights, xerr=errors, fmt=marker, markersize=5, capsize=3, label=name)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.25)
    axis.set_xlabel("%" if percent else "")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(series)), fontsize=8)


def histogram(bins: Mapping[float, int], *, label: str, line: float | None = None) -> str:
    """Counts by the lower edge of their bin, gathered into at most fifty bars; line: a value to mark."""
    edges = sorted(bins)
    low, high = edges[0], max(edges[-1], line or 0)
    wide = low > 0 and high / low > 50  # such a spread is seen on a scale of factors
    with _figure(5.2, 2.4, label=label) as (_, axes, done):
        import numpy as np

        axis = axes[0][0]
        if high == low:
            borders: Any = [low - 0.5, low + 0.5]
        elif wide:
            borders = np.geomspace(low, high * 1.02, 50)
        else:
            borders = np.linspace(low, high + max(1e-9, (high - low) / 49), min(50, len(edges) + 1))
        axis.hist(edges, bins=borders, weights=[bins[edge] for edge in edges])
        if wide:
            axis.set_xscale("log")
        if line is not None:
            axis.axvline(line, color=UNUSED, linewidth=1.2)
        axis.grid(axis="y", alpha=0.25)
    return done[0]


def bars(counts: Mapping[str, int], *, label: str) -> str:
    """Name -> count, the largest first."""
    most = sorted(counts.items(), key=lambda pair: -pair[1])[:12]
    with _figure(5.2, 0.7 + 0.28 * len(most), label=label) as (_, axes, done):
        axis = axes[0][0]
        axis.barh([name for name, _ in most][::-1], [number for _, number in most][::-1])
        axis.grid(axis="x", alpha=0.25)
    return done[0]


def expert_load(layers: Sequence[Mapping[str, Any]], *, label: str) -> str:
    """Heat maps of one checkpoint, one for each pool: layer by expert, how many times an even share it is given."""
    pools, width, height = shape_of_load(layers)
    with _figure(width, height, label=label, columns=len(pools)) as (figure, axes, done):
        draw_expert_load(figure, axes[0], layers)
    return done[0]


def shape_of_load(layers: Sequence[Mapping[str, Any]]) -> tuple[list[str], float, float]:
    """The pools, and the inches that their heat maps need side by side."""
    pools = list(dict.fromkeys(layer["pool"] for layer in layers))
    height = 0.9 + 0.24 * max(sum(layer["pool"] == pool for layer in layers) for pool in pools)
    return pools, 3.4 * len(pools), max(1.7, height)


def draw_expert_load(figure: Any, axes: Sequence[Any], layers: Sequence[Mapping[str, Any]]) -> None:
    """The heat maps of `expert_load`, one axis of matplotlib for each pool."""
    import matplotlib
    import numpy as np

    pools, _, _ = shape_of_load(layers)
    colors = matplotlib.colormaps["viridis"].with_extremes(bad=UNUSED)
    for axis, pool in zip(axes, pools, strict=True):
        own = [layer for layer in layers if layer["pool"] == pool]
        load = np.array([layer["load"] for layer in own]) * len(own[0]["load"])
        shown = axis.imshow(np.ma.masked_equal(load, 0), aspect="auto", cmap=colors, vmin=0, vmax=3)
        axis.set_yticks(range(len(own)), [str(layer["layer"]) for layer in own])
        axis.set_title(f"{pool} pool")
        axis.set_xlabel("expert")
        axis.set_ylabel("layer")
    bar = figure.colorbar(shown, ax=list(axes), extend="max")
    bar.set_label("times an even share")


def finite(points: Points) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(y)]
