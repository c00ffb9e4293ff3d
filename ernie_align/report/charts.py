"""Line charts, interval charts and heat maps: drawn on matplotlib axes, and as SVG for the HTML page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ernie_align.report.console import visible

Points = Sequence[tuple[float, float]]

# Medium tones: readable on white and on black, and distinguishable with color-vision deficiency.
COLORS = ("#2f81f7", "#e8710a", "#12a150", "#c026d3", "#b08800", "#7a869a")
_MARKERS = "osD^vP"
_TEXT = "#010203"  # placeholder that becomes the page's text color
UNUSED = "#d1495b"


@contextmanager
def styled_figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1, dpi: int = 100, style: Mapping[str, Any] = {}
) -> Iterator[tuple[Any, Any]]:
    """Yield a matplotlib figure, its size in inches, and its axes (rows, columns). style: further rc parameters."""
    import matplotlib
    from matplotlib.figure import Figure

    shared = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "font.size": 9,
        "legend.frameon": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    }
    with matplotlib.rc_context({**shared, **style}):
        figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)


@contextmanager
def _svg(width: float, height: float, *, label: str, columns: int = 1) -> Iterator[tuple[Any, Any, list[str]]]:
    """Yield a figure, its axes, and a list that contains the SVG after the block. label: unique on the page."""
    style = {
        "svg.fonttype": "none",  # text stays text: searchable, and it scales with the page
        "svg.hashsalt": label,  # the same chart gives the same SVG
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
    }
    with styled_figure(width, height, columns=columns, style=style) as (figure, axes):
        svg: list[str] = []
        yield figure, axes[0], svg
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg.append(_inline(visible(file.getvalue()), label))


def _inline(svg: str, label: str) -> str:
    """Remove the header that only a separate file needs, and make ids unique on the page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", label)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace(_TEXT, "currentColor").strip()


def curves(series: Mapping[str, Points], *, label: str, x: str = "step") -> str:
    """Return a line chart of name -> points (x, y)."""
    with _svg(5.2, 2.7, label=label) as (figure, axes, svg):
        draw_curves(figure, axes[0], series, x=x)
    return svg[0]


def draw_curves(figure: Any, axis: Any, series: Mapping[str, Points], *, x: str = "step") -> None:
    """Draw the lines of `curves`."""
    for name, points in series.items():
        xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, label=name, linewidth=1.5, marker="o" if len(xs) < 12 else None, markersize=3)
    axis.set_xlabel(x)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)


def intervals(rows: Sequence[str], series: Mapping[str, Sequence[Any]], *, label: str, percent: bool) -> str:
    """Return a chart with one dot and its interval per row and checkpoint.

    series: checkpoint -> (value, low, high) of each row, or None.
    """
    with _svg(6.4, intervals_height(len(rows), len(series)), label=label) as (_, axes, svg):
        draw_intervals(axes[0], rows, series, percent=percent)
    return svg[0]


def intervals_height(rows: int, series: int) -> float:
    """Return the height in inches of an intervals chart."""
    return 0.8 + 0.32 * rows * max(1, series / 2)


def draw_intervals(axis: Any, rows: Sequence[str], series: Mapping[str, Sequence[Any]], *, percent: bool) -> None:
    """Draw the dots of `intervals`."""
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
    """Return a histogram with at most fifty bars. bins: lower edge -> count; line: a value to mark."""
    import numpy as np

    edges = sorted(bins)
    low, high = edges[0], max(edges[-1], line or 0)
    log_scale = low > 0 and high / low > 50
    if high == low:
        borders: Any = [low - 0.5, low + 0.5]
    elif log_scale:
        borders = np.geomspace(low, high * 1.02, 50)
    else:
        borders = np.linspace(low, high + max(1e-9, (high - low) / 49), min(50, len(edges) + 1))
    with _svg(5.2, 2.4, label=label) as (_, (axis,), svg):
        axis.hist(edges, bins=borders, weights=[bins[edge] for edge in edges])
        if log_scale:
            axis.set_xscale("log")
        if line is not None:
            axis.axvline(line, color=UNUSED, linewidth=1.2)
        axis.grid(axis="y", alpha=0.25)
    return svg[0]


def bars(counts: Mapping[str, int], *, label: str) -> str:
    """Return a bar chart of the twelve largest counts by name."""
    largest = sorted(counts.items(), key=lambda pair: -pair[1])[:12]
    with _svg(5.2, 0.7 + 0.28 * len(largest), label=label) as (_, (axis,), svg):
        axis.barh([name for name, _ in largest][::-1], [number for _, number in largest][::-1])
        axis.grid(axis="x", alpha=0.25)
    return svg[0]


def expert_load(layers: Sequence[Mapping[str, Any]], *, label: str) -> str:
    """Return one heat map per pool, layer by expert, of each expert's load relative to an even load."""
    pools, width, height = expert_load_layout(layers)
    with _svg(width, height, label=label, columns=len(pools)) as (figure, axes, svg):
        draw_expert_load(figure, axes, layers)
    return svg[0]


def expert_load_layout(layers: Sequence[Mapping[str, Any]]) -> tuple[list[str], float, float]:
    """Return the pools, and the width and height in inches of their heat maps side by side."""
    pools = list(dict.fromkeys(layer["pool"] for layer in layers))
    height = 0.9 + 0.24 * max(sum(layer["pool"] == pool for layer in layers) for pool in pools)
    return pools, 3.4 * len(pools), max(1.7, height)


def draw_expert_load(figure: Any, axes: Sequence[Any], layers: Sequence[Mapping[str, Any]]) -> None:
    """Draw the heat maps of `expert_load`, one axis per pool."""
    import matplotlib
    import numpy as np

    pools, _, _ = expert_load_layout(layers)
    colors = matplotlib.colormaps["viridis"].with_extremes(bad=UNUSED)
    for axis, pool in zip(axes, pools, strict=True):
        of_pool = [layer for layer in layers if layer["pool"] == pool]
        load = np.array([layer["load"] for layer in of_pool]) * len(of_pool[0]["load"])
        image = axis.imshow(np.ma.masked_equal(load, 0), aspect="auto", cmap=colors, vmin=0, vmax=3)
        axis.set_yticks(range(len(of_pool)), [str(layer["layer"]) for layer in of_pool])
        axis.set_title(f"{pool} pool")
        axis.set_xlabel("expert")
        axis.set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), extend="max").set_label("load / even load")


def finite(points: Points) -> list[tuple[float, float]]:
    """Return the points with a finite value."""
    return [(x, y) for x, y in points if math.isfinite(y)]
