"""Tensor and expert parallelism through transformers' DistributedConfig.

FSDP2 gathers all experts of a layer on every rank. With expert parallelism each rank keeps its own experts of both
pools, and tokens are sent to them instead. FSDP2 shards the rest of the model; with tensor parallelism its matrices are
split over neighboring ranks that share a batch.

Adapters are attached after the experts are distributed, and FSDP2 is applied last, so that it shards the adapters layer
by layer like everything that is not an expert. Each rank applies its own experts' slice of the gathered adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import AutoEP, EPImplementationInterface
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism

from ernie_align.errors import ModelError
from ernie_align.models.distributed.layout import SHARDING_UNITS, ParallelLayout
from ernie_align.models.distributed.rank0_loading import pop_weights, scatter_weights
from ernie_align.models.grouped_gemm import LoraFactors, lora_experts_forward

if TYPE_CHECKING:
    from peft import PeftModel

_LORA_EP = "ernie_align_lora_ep"  # in transformers' registry of expert-parallel implementations


class LoraExpertParallel(AutoEP):
    """transformers' all-to-all exchange of tokens, with LoRA in the forward of this rank's experts.

    local_experts: the slice of all experts on this rank; updates: LoRA factors of `gate_up_proj` and `down_proj` of
    these experts, set during a wrapper's forward.
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.frozen, self.experts, self.updates = self.experts_forward, experts, {}
        first = ep_mesh.get_local_rank() * self.num_local_experts
        self.local_experts = slice(first, first + self.num_local_experts)
        # the other path, for tensor-parallel ranks that share a batch, never has adapters
        self.all_to_all.experts_forward = self._compute
        experts.lora_ep = self  # read by expert_lora.ParamWrapper

    def _compute(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the received tokens, with expert indices among the local experts."""
        if not self.updates:
            return self.frozen(hidden, top_k_index, top_k_weights)
        return lora_experts_forward(
            self.experts,
            hidden,
            top_k_index,
            top_k_weights,
            gate_up=self.updates.get("gate_up_proj"),
            down=self.updates.get("down_proj"),
        )

    @contextmanager
    def apply_updates(self, updates: dict[str, LoraFactors]) -> Iterator[None]:
        """Add these updates in a forward of the experts within the context."""
        self.updates = updates
        try:
            yield
        finally:
            self.updates = {}


class _ExpertsOnly(DistributedConfig):
    """A config for the step before adapters are attached: data parallel size 1, so that FSDP2 is not applied yet."""

    @property
    def dp_size(self) -> int:
        return 1


def shard_model(model: PreTrainedModel, parallel: ParallelLayout, *, adapters: bool, where: str) -> None:
    """Shard a model that rank 0 has loaded (rank0_loading), and scatter its weights.

    parallel: validated (layout); adapters: they are attached next, and FSDP2 is applied after them (`apply_fsdp`).
    Raises ModelError if --tp-size does not fit the attention heads.
    """
    heads = model.config.get_text_config().num_key_value_heads
    if heads % parallel.tp_size:
        what = f"--tp-size {parallel.tp_size} does not divide the {heads} key and value heads"
        raise ModelError.at(where, what, fix=f"choose a divisor of {heads}")
    EPImplementationInterface.register(_LORA_EP, LoraExpertParallel)
    config = DistributedConfig(
        tp_size=parallel.tp_size,
        fsdp_size=torch.distributed.get_world_size() // parallel.tp_size,
        ep_size=parallel.ep_size,
        ep_implementation=_LORA_EP,
    )
    config, _, meshes = model.prepare_distribute_model(config)
    # Embeddings and head share one weight, which separate TP plans would untie: they stay whole under TP, and FSDP2
    # shards them with the modules outside the layers.
    tied = (model.get_input_embeddings(), model.get_output_embeddings())
    tied_names = {name for name, module in model.named_modules() if module in tied}
    model.tp_plan = {name: style for name, style in model.tp_plan.items() if name not in tied_names}
    device = meshes.get_mesh("tp").device_type
    # Not during loading: with FSDP2, the joined routers of a hub checkpoint are split wrongly (transformers 5.23).
    weights = pop_weights(model)
    if adapters:
        model.maybe_distribute_model(model, _ExpertsOnly.from_dict(config.to_dict()), meshes)
        model.config.distributed_config = config
        scatter_weights(model, weights, device)
        return
    model.fsdp_plan = _units(model)
    model.maybe_distribute_model(model, config, meshes)
    scatter_weights(model, weights, device)
    if config.dp_size > 1:
        register_fsdp_forward_method(model, "generate")  # it encodes images before it calls the model
    else:
        model.to(device)  # moves buffers, as FSDP2 does


def apply_fsdp(model: PeftModel) -> None:
    """Apply FSDP2 to a model with distributed experts, once all its adapters are attached.

    Parameters are replaced by DTensors of the same names; the experts stay as they are. Routers are not separate units
    here: adapters have one dtype, and PEFT adds an adapter to a router's weight outside the router.
    """
    base = model.get_base_model()
    experts = _names_of_classes(base, {name for units in SHARDING_UNITS.values() for name in units.experts})
    plan = dict.fromkeys(experts, "ep_dispatch_experts")
    apply_fully_sharded_data_parallelism(base, base._mesh_manager, _units(base), plan)
    register_fsdp_forward_method(base, "generate")  # it encodes images before it calls the model


def _units(model: nn.Module) -> dict[str, str]:
    """Return transformers' FSDP2 plan: each decoder layer and each vision block is a unit."""
    layers = {name for units in SHARDING_UNITS.values() for name in units.layers}
    return dict.fromkeys(sorted(_names_of_classes(model, layers)), "free_full_weight")


def _names_of_classes(model: nn.Module, classes: set[str]) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ in classes]
