"""The stages, by name."""

from ernie_align.stages.base import Batches, Stage
from ernie_align.stages.sft import LORA, SFT

STAGES: dict[str, Stage] = {"sft": SFT, "lora": LORA}

__all__ = ["STAGES", "Batches", "Stage"]
