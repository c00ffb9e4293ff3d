"""How a family is cut where its weights are spread over processes: which classes make a unit of their own.

Routers and correction biases stay float32 beside bfloat16 weights, and FSDP2 takes one dtype for what is trained in a
unit: in full fine-tuning each router is a unit apart. Under ZeRO-3 a pool of experts is a leaf, fetched as one,
whichever of its experts the tokens of a process go to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ernie_align.errors import ModelError, RunError

if TYPE_CHECKING:
    from ernie_align.models.anatomy import Anatomy


class Units(NamedTuple):
    """Names of classes. layers, routers: sharded each for itself; experts: fetched as one."""

    layers: tuple[str, ...]
    routers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parallel:
    """Over how many processes matrices are cut, and over how many the experts of a pool are dealt out."""

    tensor: int = 1
    experts: int = 1

    def judge(self, anatomy: Anatomy, processes: int, *, stage: str, adapters: bool, where: str) -> None:
        """Raises RunError where the processes cannot be dealt out so, ModelError where this model cannot.

        adapters: whether they are what is trained; where: what an error about the model should point at.
        """
        pools = {tensor.shape[0] for tensor in anatomy.tensors if tensor.kind == "fused"}
        in_groups = self.experts == 1 or self.experts % self.tensor == 0
        if processes % self.tensor or processes % self.experts or not in_groups:
            what = f"{processes} processes cannot be dealt out, {self.tensor} to a matrix and {self.experts} to a pool"
            fix = "choose numbers that divide the processes, and experts in whole groups of --tensor-parallel"
            raise RunError.at("--tensor-parallel, --expert-parallel", what, fix=fix)
        if self.tensor > 1 and adapters:
            fix = "leave --tensor-parallel out: --expert-parallel works with adapters"
            raise RunError.at("--tensor-parallel", "adapters on matrices that are cut are not supported", fix=fix)
        if self.tensor > 1 and stage not in ("sft", "lora"):
            fix = "leave --tensor-parallel out, or train by stage: sft"
            raise RunError.at("--tensor-parallel", f"stage {stage} on matrices that are cut is not supported", fix=fix)
        if self.tensor > 1 and pools and self.experts == 1:
            fix = f"deal the experts out as well: --expert-parallel {self.tensor}, or a multiple of it"
            raise RunError.at("--tensor-parallel", "experts whose matrices are cut cannot be checkpointed", fix=fix)
        if self.experts > 1 and not pools:
            raise ModelError.at(where, "the model has no routed experts", fix="leave --expert-parallel out")
        odd = [experts for experts in pools if experts % self.experts]
        if odd:
            what = f"{odd[0]} experts of a pool cannot be dealt out to {self.experts} processes"
            raise ModelError.at(where, what, fix="choose a number for --expert-parallel that divides them")


UNITS: dict[str, Units] = {
    "dense": Units(("Ernie4_5DecoderLayer",)),
    "moe": Units(("Ernie4_5_MoeDecoderLayer",), ("Ernie4_5_MoeTopKRouter",), ("Ernie4_5_MoeExperts",)),
    "vl_moe": Units(
        ("Ernie4_5_VLMoeDecoderLayer", "Ernie4_5_VLMoeVisionBlock"),
        ("Ernie4_5_VLMoeMoeTopKRouter",),
        ("Ernie4_5_VLMoeMoeExperts",),
    ),
}
