"""The prompts that an export is proved on: rows of the run's own data, or made up where those are out of reach."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ernie_align.data import media
from ernie_align.data.render import Renderer
from ernie_align.data.row import Row, RowFault
from ernie_align.data.sources import Source, iter_rows
from ernie_align.errors import AlignError
from ernie_align.recipe import Recipe

EACH = 8  # prompts of text alone, and as many with images
LONGEST = 2048  # tokens of a prompt: longer rows are passed over
_LOOKED_AT = 64  # rows of each source

_QUESTIONS = (
    "What is seven plus eight?",
    "Name three rivers and the seas they end in.",
    "Write one sentence about the weather.",
    "为什么天空是蓝色的",
    "Translate into French: the house is old.",
    "List the prime numbers below thirty.",
    "What does a compiler do?",
    "Tell me a short story about a lighthouse.",
)
_ABOUT_IMAGES = "What is shown here?"


@dataclass(frozen=True)
class Prompts:
    """Text alone first, then with images. origins: where the rows come from, with their number."""

    rows: tuple[Row, ...]
    origins: dict[str, int]
    with_images: int

    def __str__(self) -> str:
        found = ", ".join(f"{count} {origin}" for origin, count in self.origins.items())
        return f"{len(self.rows)} prompts, {self.with_images} with images ({found})"


def choose(recipe: Recipe | None, renderer: Renderer) -> Prompts:
    """EACH prompts of text and, for a model with vision, EACH with images."""
    kinds = (False, True) if renderer.vision is not None else (False,)
    chosen: dict[bool, list[Row]] = {kind: [] for kind in kinds}
    origins: dict[str, int] = {}
    for name, row in _rows_of(recipe):
        kind = bool(row.images)
        if kind in chosen and len(chosen[kind]) < EACH and _fits(row, renderer):
            chosen[kind].append(row)
            origins[f"of {name}"] = origins.get(f"of {name}", 0) + 1
    for kind in kinds:
        missing = EACH - len(chosen[kind])
        chosen[kind] += _made_up(missing, with_images=kind)
        if missing:
            origins["made up"] = origins.get("made up", 0) + missing
    rows = tuple(row for kind in kinds for row in chosen[kind])
    return Prompts(rows, origins, len(chosen.get(True, ())))


def _rows_of(recipe: Recipe | None) -> list[tuple[str, Row]]:
    """(source, row) of the first rows of held-out sources, else of training sources; none where they are not here."""
    if recipe is None:
        return []
    found: list[tuple[str, Row]] = []
    for block in recipe.data.eval or recipe.data.train:
        try:
            found += [(block.name, row) for row in iter_rows(Source(block, recipe.data, sample=_LOOKED_AT))]
        except (AlignError, OSError):
            continue
    return found


def _fits(row: Row, renderer: Renderer) -> bool:
    try:
        return len(renderer.prompt(row).input_ids) <= LONGEST
    except RowFault:  # an image that is gone since
        return False


def _made_up(count: int, *, with_images: bool) -> list[Row]:
    if not with_images:
        return [Row(messages=[{"role": "user", "content": question}]) for question in _QUESTIONS[:count]]
    content = [{"type": "image"}, {"type": "text", "text": _ABOUT_IMAGES}]
    return [Row(messages=[{"role": "user", "content": content}], images=[_image(seed)]) for seed in range(count)]


def _image(seed: int) -> dict:
    """A mosaic of 4 x 6 colours, 112 x 168 pixels, the same for the same seed."""
    from PIL import Image

    mosaic = Image.frombytes("RGB", (6, 4), random.Random(seed).randbytes(6 * 4 * 3))
    return media.image_reference(mosaic.resize((168, 112), Image.Resampling.NEAREST), None)
