"""The stages, by name."""

from ernie_align.stages.base import Datasets, Stage
from ernie_align.stages.dpo import DPO
from ernie_align.stages.sft import LORA, SFT
from ernie_align.stages.upo.stage import UPO

STAGES: dict[str, Stage] = {"sft": SFT, "lora": LORA, "dpo": DPO, "upo": UPO}

__all__ = ["STAGES", "Datasets", "Stage"]
