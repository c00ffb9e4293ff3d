"""The stages, by name."""

from ernie_align.stages.base import Datasets, Stage
from ernie_align.stages.dpo import DpoStage
from ernie_align.stages.kto import KtoStage
from ernie_align.stages.sft import LoraStage, SftStage
from ernie_align.stages.upo.stage import UpoStage

STAGES: dict[str, Stage] = {
    "sft": SftStage(),
    "lora": LoraStage(),
    "dpo": DpoStage(),
    "kto": KtoStage(),
    "upo": UpoStage(),
}

__all__ = ["STAGES", "Datasets", "Stage"]
