"""Curves, rates, routing and images with captions as PNG: what a notebook shows of a run."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.report import charts
from ernie_align.report.comparison import rates_side_by_side

if TYPE_CHECKING:
    from ernie_align.evaluation import Evaluation, RoutedToken

_DPI = 80  # a picture in a stored notebook is then about 20 kB
_CELL = 1.5  # inches of an image in a gallery, wide and high
_CAPTION = 18  # characters a line
_SMALL = 200  # pixels: the dots of a smaller image are shown as they are
RIGHT, WRONG = "#12873f", "#c0392b"


@dataclass(frozen=True)
class Picture:
    """A PNG, which a notebook shows where it is the last word of a cell."""

    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: str | Path) -> None:
        """Write it to a file."""
        Path(path).write_bytes(self.png)


@contextmanager
def _canvas(
    width: float, height: float, *, rows: int = 1, columns: int = 1
) -> Iterator[tuple[Any, Any, list[Picture]]]:
    """A white figure of inches, its axes (rows, columns), and a list that holds the picture after the block."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "font.size": 9,
        "legend.frameon": False,
        "axes.prop_cycle": matplotlib.cycler(color=charts.COLORS),
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        done: list[Picture] = []
        yield figure, figure.subplots(rows, columns, squeeze=False), done
        file = io.BytesIO()
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for the letter
        figure.savefig(file, format="png", metadata={"Software": None})
        done.append(Picture(file.getvalue()))


def curves(series: Mapping[str, charts.Points], *, x: str = "step", y: str = "") -> Picture:
    """Name -> its points (x, y), as lines; `logged` reads them from a run."""
    with _canvas(6.4, 3.0) as (figure, axes, done):
        charts.draw_curves(figure, axes[0, 0], series, x=x)
        axes[0, 0].set_ylabel(y)
    return done[0]


def rates(evaluation: Evaluation) -> Picture:
    """The rates of an evaluation with their 95 % intervals: a line for each data set and kind, a dot a checkpoint."""
    rows, series = rates_side_by_side(evaluation.report)
    with _canvas(6.8, charts.height_of_whiskers(len(rows), len(series))) as (_, axes, done):
        charts.draw_whiskers(axes[0, 0], rows, series, percent=True)
    return done[0]


def expert_load(layers: Sequence[Mapping[str, Any]]) -> Picture:
    """Layer by expert, how many times an even share each expert is given. layers: of evaluation's `describe`."""
    pools, width, height = charts.shape_of_load(layers)
    with _canvas(width, height, columns=len(pools)) as (figure, axes, done):
        charts.draw_expert_load(figure, axes[0], layers)
    return done[0]


def token_map(tokens: Sequence[RoutedToken]) -> Picture:
    """Every token of one prompt, and the experts it was sent to in each layer: of the text or of the vision pool."""
    import numpy as np
    from matplotlib.colors import ListedColormap

    layers = sorted({layer for token in tokens for layer in token.experts})
    count = {pool: _experts(tokens, pool) for pool in ("text", "vision")}
    names = [token.text.replace("\n", "⏎") for token in tokens]
    with _canvas(max(6.4, 0.19 * len(tokens)), 0.6 + 1.5 * len(layers), rows=len(layers)) as (_, axes, done):
        for axis, layer in zip(axes[:, 0], layers, strict=True):
            chosen = np.zeros((count["text"] + count["vision"], len(tokens)))
            for place, token in enumerate(tokens):
                first = count["text"] if token.pool == "vision" else 0
                chosen[[first + expert for expert in token.experts[layer]], place] = 2 if token.pool == "vision" else 1
            colors = ListedColormap(["#f2f2f2", charts.COLORS[0], charts.COLORS[3]])
            axis.imshow(chosen, aspect="auto", cmap=colors, vmin=0, vmax=2, origin="lower", interpolation="nearest")
            axis.axhline(count["text"] - 0.5, color="black", linewidth=0.8)
            middles = (count["text"] / 2 - 0.5, count["text"] + count["vision"] / 2 - 0.5)
            axis.set_yticks([middle for middle, pool in zip(middles, count, strict=True) if count[pool]],
                            [f"{pool} experts" for pool in count if count[pool]])  # fmt: skip
            axis.set_ylabel(f"layer {layer}")
            axis.set_xticks([])
        axes[-1, 0].set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
    return done[0]


def _experts(tokens: Sequence[RoutedToken], pool: str) -> int:
    """How many experts of a pool are numbered by some token."""
    chosen = [max(own) for token in tokens if token.pool == pool for own in token.experts.values()]
    return 1 + max(chosen, default=-1)


def gallery(items: Sequence[tuple[Sequence[str | Path], str]], *, columns: int = 6) -> Picture:
    """Images with captions: (paths, caption) each, several paths side by side. A line `+ ...` is green, `- ...` red."""
    columns = min(columns, len(items))
    rows = -(-len(items) // columns)
    lines = [[part for line in caption.split("\n") for part in _wrapped(line)] for _, caption in items]
    below = 0.17 * max(map(len, lines))
    with _canvas(_CELL * columns, (_CELL + below) * rows, rows=rows, columns=columns) as (_, axes, done):
        for axis in axes.flat:
            axis.axis("off")
        for axis, (paths, _), caption in zip(axes.flat, items, lines, strict=False):
            if paths:
                pixels = _side_by_side(paths)
                small = "nearest" if pixels.shape[1] < _SMALL else "auto"
                axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation=small)
            axis.set_anchor("N")
            for number, line in enumerate(caption):
                color = {"+": RIGHT, "-": WRONG}.get(line[:1], "black")
                axis.annotate(line[1:].strip() if line[:1] in "+-" else line, (0.5, 0), xycoords="axes fraction",
                              xytext=(0, -11 - 11 * number), textcoords="offset points", ha="center", fontsize=8,
                              color=color, parse_math=False)  # fmt: skip
    return done[0]


def answers(evaluation: Evaluation, *, count: int = 12, changed: bool = False) -> Picture:
    """Images, the question's answer, and what each checkpoint said: green where it is right by the first measure.

    count: rows, spread evenly over those with images; changed: only rows that the last checkpoint answers unlike the
    first.
    """
    rows = [row for row in evaluation.rows if row["images"]]
    if changed:
        rows = [row for row in rows if len({tuple(said["answers"]) for said in row["results"].values()}) > 1]
    shown = [rows[place * len(rows) // min(count, len(rows))] for place in range(min(count, len(rows)))]
    return gallery([(row["images"], _said(row)) for row in shown])


def _said(row: Mapping[str, Any]) -> str:
    lines = []
    for name, said in row["results"].items():
        right = next(iter(said["scores"].values()), 0) >= 1
        text = "".join(filter(str.isprintable, (said["answers"] or [""])[0])).strip() or "(nothing)"
        named = f"{name}: {text}" if len(row["results"]) > 1 else text
        lines.append(f"{'+' if right else '-'} {named}")
    return "\n".join(lines)


def _wrapped(line: str) -> list[str]:
    """Lines of at most _CAPTION characters, each with the sign of the whole."""
    sign, text = (line[0], line[1:].strip()) if line[:1] in ("+", "-") else ("", line)
    return [sign + part for part in textwrap.wrap(text, _CAPTION, max_lines=4, placeholder="…")] or [""]


def _side_by_side(paths: Sequence[str | Path]) -> Any:
    """Images in gray, as high as the highest, with a gap between them."""
    import numpy as np
    from PIL import Image

    images = []
    for path in paths:
        with Image.open(path) as opened:
            images.append(np.asarray(opened.convert("L")))
    height = max(image.shape[0] for image in images)
    padded = [np.pad(image, ((0, height - len(image)), (0, 6)), constant_values=255) for image in images]
    return np.concatenate(padded, axis=1)[:, :-6]
