"""The stages, by name."""

from ernie_align.stages.base import Batches, Stage
from ernie_align.stages.dpo import DPO
from ernie_align.stages.sft import LORA, SFT

STAGES: dict[str, Stage] = {"sft": SFT, "lora": LORA, "dpo": DPO}

__all__ = ["STAGES", "Batches", "Stage"]
