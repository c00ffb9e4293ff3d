"""Report the versions and hardware of a run."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def environment() -> dict[str, Any]:
    """Return versions and hardware that affect results."""
    import torch

    from ernie_align.models.pixels import pixel_backend

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "ernie_align": version("ernie-align"),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "pixels_by": pixel_backend(),
    }
