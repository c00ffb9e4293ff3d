"""Sizes of tensor and expert parallelism, and the classes of each family that are sharded as units.

Routers and correction biases stay float32 in models with bfloat16 weights, and FSDP2 requires one dtype for the trained
weights of a unit: in full fine-tuning each router is its own unit. Under ZeRO-3 a pool of experts is a leaf module,
gathered as a whole, whichever of its experts the tokens of a rank go to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ernie_align.errors import ModelError, RunError

if TYPE_CHECKING:
    from ernie_align.models.architecture import Architecture


class ShardingUnits(NamedTuple):
    """Names of classes. layers, routers: each instance is an FSDP unit; experts: gathered as a whole under ZeRO-3."""

    layers: tuple[str, ...]
    routers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParallelLayout:
    """Number of ranks over which matrices are split (TP) and the experts of a pool are distributed (EP).

    As in transformers' DistributedConfig. FSDP2 shards the rest of the model.
    """

    tp_size: int = 1
    ep_size: int = 1

    def validate(self, architecture: Architecture, world_size: int, *, adapters: bool, where: str) -> None:
        """Raise RunError if the sizes do not fit the world size, and ModelError if they do not fit the model.

        adapters: True if adapters are trained; where: what an error about the model points at.
        """
        for option, size in (("--tp-size", self.tp_size), ("--ep-size", self.ep_size)):
            if world_size % size:
                fix = f"choose a divisor of {world_size}, or start another number of processes"
                raise RunError.at(option, f"{option} {size} does not divide {world_size} processes", fix=fix)
        if self.ep_size > 1 and self.ep_size % self.tp_size:
            what = f"--ep-size {self.ep_size} is not a multiple of --tp-size {self.tp_size}"
            raise RunError.at("--ep-size", what, fix=f"choose {self.tp_size} or a multiple of it")
        if self.tp_size > 1 and adapters:
            fix = "leave --tp-size out: --ep-size works with adapters"
            raise RunError.at("--tp-size", "adapters are not supported with tensor parallelism", fix=fix)
        pools = {tensor.shape[0] for tensor in architecture.tensors if tensor.kind == "fused"}
        if self.tp_size > 1 and pools and self.ep_size == 1:
            fix = f"add --ep-size {self.tp_size}, or a multiple of it"
            raise RunError.at("--tp-size", "experts cannot be checkpointed with --tp-size alone", fix=fix)
        if self.ep_size > 1 and not pools:
            raise ModelError.at(where, "the model has no routed experts", fix="leave --ep-size out")
        for experts in sorted(pools):
            if experts % self.ep_size:
                what = f"--ep-size {self.ep_size} does not divide the {experts} experts of a pool"
                raise ModelError.at(where, what, fix=f"choose a divisor of {experts}")


SHARDING_UNITS: dict[str, ShardingUnits] = {
    "dense": ShardingUnits(("Ernie4_5DecoderLayer",)),
    "moe": ShardingUnits(("Ernie4_5_MoeDecoderLayer",), ("Ernie4_5_MoeTopKRouter",), ("Ernie4_5_MoeExperts",)),
    "vl_moe": ShardingUnits(
        ("Ernie4_5_VLMoeDecoderLayer", "Ernie4_5_VLMoeVisionBlock"),
        ("Ernie4_5_VLMoeMoeTopKRouter",),
        ("Ernie4_5_VLMoeMoeExperts",),
    ),
}
