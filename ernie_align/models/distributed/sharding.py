"""Tensor and expert parallelism: a model shared out over processes by transformers' DistributedConfig.

FSDP2 fetches all experts of a layer for whichever tokens a process has. With expert parallelism each process keeps its
own experts of both pools for good, and tokens travel to them instead. What is left of the model is spread by FSDP2, or,
with tensor parallelism, cut within each matrix over neighbours that share a batch.

Adapters are put on once the experts are dealt out, and FSDP2 comes last: so it spreads them too, layer by layer, as it
does all that is no expert. Each process applies its own experts' share of what it has gathered.
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

_LOW_RANK = "ernie_align_low_rank"  # in transformers' registry of ways to bring experts their tokens


class LoraExpertParallel(AutoEP):
    """transformers' exchange of tokens. What the experts of this process then compute has their adapters in it.

    own: which of all experts are here; updates: theirs, of `gate_up_proj` and `down_proj`; set while a wrapper's
    forward lasts.
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.frozen, self.experts, self.updates = self.experts_forward, experts, {}
        first = ep_mesh.get_local_rank() * self.num_local_experts
        self.own = slice(first, first + self.num_local_experts)
        # the other way there is, of neighbours that share a batch, never meets adapters
        self.all_to_all.experts_forward = self._compute
        experts.low_rank = self  # where a wrapper finds it

    def _compute(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Rows that came, with numbers of experts among those here."""
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
    def adapted(self, updates: dict[str, LoraFactors]) -> Iterator[None]:
        """While it lasts, a forward of the experts adds these."""
        self.updates = updates
        try:
            yield
        finally:
            self.updates = {}


class _ExpertsFirst(DistributedConfig):
    """What transformers is told while adapters are still to come: it spreads nothing over batches of their own."""

    @property
    def dp_size(self) -> int:
        return 1


def shard_model(model: PreTrainedModel, parallel: ParallelLayout, *, adapters: bool, where: str) -> None:
    """Cut a model that the first process has read (models.first), and give each process its own part of the weights.

    parallel: as judged by models.sharding; adapters: they are put on next, and FSDP2 waits for them (`spread`).
    Raises ModelError where attention cannot be cut so.
    """
    heads = model.config.get_text_config().num_key_value_heads
    if heads % parallel.tp_size:
        what = f"{heads} heads of keys and values cannot be cut over {parallel.tp_size} processes"
        raise ModelError.at(where, what, fix="choose a number for --tp-size that divides them")
    EPImplementationInterface.register(_LOW_RANK, LoraExpertParallel)
    processes = torch.distributed.get_world_size()
    config = DistributedConfig(
        tp_size=parallel.tp_size,
        fsdp_size=processes // parallel.tp_size,
        ep_size=parallel.ep_size,
        ep_implementation=_LOW_RANK,
    )
    config, _, meshes = model.prepare_distribute_model(config)
    # Embeddings and head are one weight, which plans of their own would part: they stay whole on neighbours, and FSDP2
    # spreads them with what is outside the layers.
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    apart = {name for name, module in model.named_modules() if module in both}
    model.tp_plan = {name: style for name, style in model.tp_plan.items() if name not in apart}
    device = meshes.get_mesh("tp").device_type
    # Not while it is loaded: cut by FSDP2, a hub checkpoint's joined routers are split wrongly (transformers 5.23).
    weights = pop_weights(model)
    if adapters:
        model.maybe_distribute_model(model, _ExpertsFirst.from_dict(config.to_dict()), meshes)
        model.config.distributed_config = config
        scatter_weights(model, weights, device)
        return
    model.fsdp_plan = _units(model)
    model.maybe_distribute_model(model, config, meshes)
    scatter_weights(model, weights, device)
    if config.dp_size > 1:
        register_fsdp_forward_method(model, "generate")  # which encodes images before it calls the model
    else:
        model.to(device)  # its buffers: FSDP2 does so itself


def apply_fsdp(model: PeftModel) -> None:
    """FSDP2 over a model whose experts were dealt out for adapters, with all its adapters on. Parameters become others
    of the same names; dealt-out experts stay where they are.

    Routers are no units apart: adapters are of one dtype, and PEFT adds one to a router's weight outside the router.
    """
    base = model.get_base_model()
    pools = {name for units in SHARDING_UNITS.values() for name in units.experts}
    experts = [name for name, module in base.named_modules() if type(module).__name__ in pools]
    plan = dict.fromkeys(experts, "ep_dispatch_experts")
    apply_fully_sharded_data_parallelism(base, base._mesh_manager, _units(base), plan)
    register_fsdp_forward_method(base, "generate")  # which encodes images before it calls the model


def _units(model: nn.Module) -> dict[str, str]:
    """transformers' plan for FSDP2: decoder layers and vision blocks, each fetched for itself."""
    layers = {name for units in SHARDING_UNITS.values() for name in units.layers}
    names = (name for name, module in model.named_modules() if type(module).__name__ in layers)
    return dict.fromkeys(sorted(names), "free_full_weight")
