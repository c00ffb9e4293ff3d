"""How an image becomes patches and tokens: sizes without loading it, pixels through transformers' own processor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

MAX_ASPECT_RATIO = 200  # transformers refuses to resize anything longer


@dataclass(frozen=True)
class ImageSizes:
    """The limits that a checkpoint's image settings set. min_pixels, max_pixels: of the resized image."""

    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 6177

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageSizes:
        """From the settings of the image processor; the class defaults where they are silent."""
        size = config.get("size") or {}
        return cls(
            config.get("patch_size") or cls.patch_size,
            config.get("merge_size") or cls.merge_size,
            size.get("shortest_edge") or config.get("min_pixels") or cls.min_pixels,
            size.get("longest_edge") or config.get("max_pixels") or cls.max_pixels,
        )

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Pixels of an image -> its patches (1, rows, columns), as transformers' processor will cut it.

        Sides become multiples of patch_size · merge_size; an image outside the limits is scaled by the square root of
        what it is off by, keeping its aspect. Raises ValueError beyond an aspect ratio of 200.
        """
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"an aspect ratio of {max(height, width) / min(height, width):.0f} is over {MAX_ASPECT_RATIO}"
            )
        side = self.patch_size * self.merge_size
        rows, columns = round(height / side), round(width / side)
        area = rows * columns * side * side
        if area > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / shrink / side))
            columns = max(1, math.floor(width / shrink / side))
        elif area < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * grow / side), math.ceil(width * grow / side)
        return 1, rows * self.merge_size, columns * self.merge_size

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Placeholder tokens that an image of this grid takes."""
        return math.prod(grid) // self.merge_size**2


def pixel_backend() -> str:
    """`torchvision` where it is installed, else `pil`. Their resizing differs by up to 0.2 in pixel values."""
    return "torchvision" if find_spec("torchvision") else "pil"


def load_image_processor(name: str, revision: str | None = None) -> Any:
    """transformers' image processor of the checkpoint, on whichever backend is installed."""
    if pixel_backend() == "torchvision":
        from transformers.models.ernie4_5_vl_moe.image_processing_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessor

        return Ernie4_5_VLMoeImageProcessor.from_pretrained(name, revision=revision)
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

    return Ernie4_5_VLMoeImageProcessorPil.from_pretrained(name, revision=revision)
