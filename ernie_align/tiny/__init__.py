"""Tiny real ERNIE 4.5 checkpoints of each family, and the handwritten-digits task, made offline."""

from ernie_align.tiny.checkpoint import PRESETS, make_checkpoint
from ernie_align.tiny.digits import make_digits

__all__ = ["PRESETS", "make_checkpoint", "make_digits"]
