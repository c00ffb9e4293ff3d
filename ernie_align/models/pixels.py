"""Compute how many patches and tokens an image takes from its size, and load transformers' image processor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

MAX_ASPECT_RATIO = 200  # transformers refuses to resize anything longer


@dataclass(frozen=True)
class ImageSizes:
    """Patch sizes and limits of a checkpoint's image processor. min_pixels, max_pixels: of the resized image."""

    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 6177

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageSizes:
        """Read the settings of the image processor, with transformers' class defaults."""
        size = config.get("size") or {}
        return cls(
            config.get("patch_size") or cls.patch_size,
            config.get("merge_size") or cls.merge_size,
            size.get("shortest_edge") or config.get("min_pixels") or cls.min_pixels,
            size.get("longest_edge") or config.get("max_pixels") or cls.max_pixels,
        )

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the grid of patches (1, rows, columns) into which transformers' processor splits an image.

        Sides become multiples of patch_size · merge_size; an image outside the limits is scaled to them, keeping its
        aspect ratio. Raises ValueError above an aspect ratio of 200.
        """
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            ratio = max(height, width) / min(height, width)
            raise ValueError(f"the aspect ratio {ratio:.0f} exceeds {MAX_ASPECT_RATIO}")
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
        """Return the number of placeholder tokens of an image with this grid."""
        return math.prod(grid) // self.merge_size**2


def pixel_backend() -> str:
    """Return `torchvision` if it is installed, else `pil`. Resized pixels differ by up to 0.2 between the two."""
    return "torchvision" if find_spec("torchvision") else "pil"


def load_image_processor(name: str, revision: str | None = None) -> Any:
    """Load transformers' image processor of the checkpoint, on the installed backend."""
    if pixel_backend() == "torchvision":
        from transformers.models.ernie4_5_vl_moe.image_processing_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessor

        return Ernie4_5_VLMoeImageProcessor.from_pretrained(name, revision=revision)
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

    return Ernie4_5_VLMoeImageProcessorPil.from_pretrained(name, revision=revision)
