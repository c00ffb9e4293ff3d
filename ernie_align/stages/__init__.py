"""The stages, by name."""

from ernie_align.stages.base import Datasets, Stage
from ernie_align.stages.dpo import DpoStage
from ernie_align.stages.sft import LoraStage, SftStage
from ernie_align.stages.upo.stage import UpoStage

STAGES: dict[str, Stage] = {"sft": SftStage(), "lora": LoraStage(), "dpo": DpoStage(), "upo": UpoStage()}

__all__ = ["STAGES", "Datasets", "Stage"]
