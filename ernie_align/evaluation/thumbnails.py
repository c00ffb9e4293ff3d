"""Small copies of the images that a report shows, kept beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ernie_align.data import media

LONGEST_SIDE = 224  # pixels
SMALLEST = 96  # pixels of the longer side that a tiny image is enlarged to, in whole steps, so that it can be seen


def keep(image: dict[str, Any], folder: Path) -> str:
    """Write a small PNG of an image into the folder; its name there. Equal images are kept once."""
    from PIL import Image

    picture = media.load(image)
    if max(picture.size) > LONGEST_SIDE:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    elif times := SMALLEST // max(picture.size):
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    name = f"{hashlib.sha256(picture.tobytes() + repr(picture.size).encode()).hexdigest()[:16]}.png"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():
        partial = folder / f".{name}.partial"
        picture.save(partial, format="PNG")
        partial.replace(folder / name)
    return name
