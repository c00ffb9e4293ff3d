"""PNG pictures for notebooks: curves, percentages, routing, and images with captions."""

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
from ernie_align.report.comparison import percentage_series
from ernie_align.report.console import visible

if TYPE_CHECKING:
    from ernie_align.evaluation import Evaluation, RoutedToken

_DPI = 80  # about 20 kB per picture in a saved notebook
_CELL = 1.5  # width and height in inches of an image in a gallery
_CAPTION = 18  # characters per line
_SMALL = 200  # pixels: smaller images are enlarged without interpolation
RIGHT, WRONG = "#12873f", "#c0392b"


@dataclass(frozen=True)
class Picture:
    """A PNG image. A notebook displays it if it is the last value of a cell."""

    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: str | Path) -> None:
        """Write the PNG to a file."""
        Path(path).write_bytes(self.png)


@contextmanager
def _canvas(
    width: float, height: float, *, rows: int = 1, columns: int = 1
) -> Iterator[tuple[Any, Any, list[Picture]]]:
    """Yield a figure, its size in inches, its axes (rows, columns), and a list with the picture after the block."""
    with (
        charts.styled_figure(width, height, rows=rows, columns=columns, dpi=_DPI) as (figure, axes),
        warnings.catch_warnings(),
    ):
        picture: list[Picture] = []
        yield figure, axes, picture
        file = io.BytesIO()
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # matplotlib draws a box instead
        figure.savefig(file, format="png", metadata={"Software": None})
        picture.append(Picture(file.getvalue()))


def curves(series: Mapping[str, charts.Points], *, x: str = "step", y: str = "") -> Picture:
    """Draw a line chart of name -> points (x, y). `read_metric` reads such points from a run."""
    with _canvas(6.4, 3.0) as (figure, axes, done):
        charts.draw_curves(figure, axes[0, 0], series, x=x)
        axes[0, 0].set_ylabel(y)
    return done[0]


def rates(evaluation: Evaluation) -> Picture:
    """Draw an evaluation's percentages with 95 % intervals: a row per data set and kind, a dot per checkpoint."""
    rows, series = percentage_series(evaluation.report)
    with _canvas(6.8, charts.intervals_height(len(rows), len(series))) as (_, axes, done):
        charts.draw_intervals(axes[0, 0], rows, series, percent=True)
    return done[0]


def expert_load(layers: Sequence[Mapping[str, Any]]) -> Picture:
    """Draw the load of each expert relative to an even load. layers: from `ernie_align.evaluation.describe`."""
    pools, width, height = charts.expert_load_layout(layers)
    with _canvas(width, height, columns=len(pools)) as (figure, axes, done):
        charts.draw_expert_load(figure, axes[0], layers)
    return done[0]


def token_map(tokens: Sequence[RoutedToken]) -> Picture:
    """Draw every token of one prompt and the text or vision experts that it is routed to in each layer."""
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
    """Return one more than the highest expert number of a pool among these tokens."""
    chosen = [max(own) for token in tokens if token.pool == pool for own in token.experts.values()]
    return 1 + max(chosen, default=-1)


def gallery(items: Sequence[tuple[Sequence[str | Path], str]], *, columns: int = 6) -> Picture:
    """Draw images with captions. items: (paths, caption), several paths side by side.

    A caption line `+ ...` is green, `- ...` is red.
    """
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
    """Draw images with the answer of each checkpoint: green if it is correct by the first metric, red otherwise.

    count: number of rows, evenly spaced over those with images; changed: only rows on which the checkpoints differ.
    """
    rows = [row for row in evaluation.rows if row["images"]]
    if changed:
        rows = [row for row in rows if len({tuple(result["answers"]) for result in row["results"].values()}) > 1]
    shown = [rows[place * len(rows) // min(count, len(rows))] for place in range(min(count, len(rows)))]
    return gallery([(row["images"], _caption(row)) for row in shown])


def _caption(row: Mapping[str, Any]) -> str:
    lines = []
    for name, result in row["results"].items():
        correct = next(iter(result["scores"].values()), 0) >= 1
        text = visible((result["answers"] or [""])[0].replace("\n", " ")).strip() or "(empty)"
        lines.append(f"{'+' if correct else '-'} {f'{name}: {text}' if len(row['results']) > 1 else text}")
    return "\n".join(lines)


def _wrapped(line: str) -> list[str]:
    """Wrap a caption line at _CAPTION characters, and repeat its sign on each part."""
    sign, text = (line[0], line[1:].strip()) if line[:1] in ("+", "-") else ("", line)
    return [sign + part for part in textwrap.wrap(text, _CAPTION, max_lines=4, placeholder="…")] or [""]


def _side_by_side(paths: Sequence[str | Path]) -> Any:
    """Place grayscale images side by side with a gap, padded to the same height."""
    import numpy as np
    from PIL import Image

    images = []
    for path in paths:
        with Image.open(path) as opened:
            images.append(np.asarray(opened.convert("L")))
    height = max(image.shape[0] for image in images)
    padded = [np.pad(image, ((0, height - len(image)), (0, 6)), constant_values=255) for image in images]
    return np.concatenate(padded, axis=1)[:, :-6]
