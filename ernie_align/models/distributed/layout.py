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
    from ernie_align.models.architecture import Architecture


class ShardingUnits(NamedTuple):
    """Names of classes. layers, routers: sharded each for itself; experts: fetched as one."""

    layers: tuple[str, ...]
    routers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParallelLayout:
    """Over how many processes matrices are cut, and over how many the experts of a pool are dealt out: as in
    transformers' DistributedConfig. What is left of the model is spread by FSDP2."""

    tp_size: int = 1
    ep_size: int = 1

    def validate(self, architecture: Architecture, processes: int, *, adapters: bool, where: str) -> None:
        """Raises RunError where the processes cannot be dealt out so, ModelError where this model cannot.

        adapters: whether they are what is trained; where: what an error about the model should point at.
        """
        pools = {tensor.shape[0] for tensor in architecture.tensors if tensor.kind == "fused"}
        in_groups = self.ep_size == 1 or self.ep_size % self.tp_size == 0
        if processes % self.tp_size or processes % self.ep_size or not in_groups:
            what = f"{processes} processes cannot be dealt out, {self.tp_size} to a matrix and {self.ep_size} to a pool"
            fix = "choose numbers that divide the processes, and experts in whole groups of --tp-size"
            raise RunError.at("--tp-size, --ep-size", what, fix=fix)
        if self.tp_size > 1 and adapters:
            fix = "leave --tp-size out: --ep-size works with adapters"
            raise RunError.at("--tp-size", "adapters on matrices that are cut are not supported", fix=fix)
        if self.tp_size > 1 and pools and self.ep_size == 1:
            fix = f"deal the experts out as well: --ep-size {self.tp_size}, or a multiple of it"
            raise RunError.at("--tp-size", "experts whose matrices are cut cannot be checkpointed", fix=fix)
        if self.ep_size > 1 and not pools:
            raise ModelError.at(where, "the model has no routed experts", fix="leave --ep-size out")
        odd = [experts for experts in pools if experts % self.ep_size]
        if odd:
            what = f"{odd[0]} experts of a pool cannot be dealt out to {self.ep_size} processes"
            raise ModelError.at(where, what, fix="choose a number for --ep-size that divides them")


SHARDING_UNITS: dict[str, ShardingUnits] = {
    "dense": ShardingUnits(("Ernie4_5DecoderLayer",)),
    "moe": ShardingUnits(("Ernie4_5_MoeDecoderLayer",), ("Ernie4_5_MoeTopKRouter",), ("Ernie4_5_MoeExperts",)),
    "vl_moe": ShardingUnits(
        ("Ernie4_5_VLMoeDecoderLayer", "Ernie4_5_VLMoeVisionBlock"),
        ("Ernie4_5_VLMoeMoeTopKRouter",),
        ("Ernie4_5_VLMoeMoeExperts",),
    ),
}
