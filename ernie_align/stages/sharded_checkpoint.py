"""State of sharded training (FSDP2): trained weights and optimizer state by name, in torch's distributed checkpoints.

Every checkpoint holds the model or adapter in the layout that a single process writes. With sharded weights it also has
a folder `sharded`, into which each rank writes its own shards. Any number of ranks can read it, also a single one.

torch.distributed.checkpoint.state_dict would replace `training_state` alone (five lines): reading checkpoints already
written in this layout, and optimizer state that a single process saved by number, would still take the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ernie_align.errors import ModelError

SHARDED_DIR = "sharded"


@contextmanager
def saving_unsharded(config: Any) -> Iterator[None]:
    """Within the context, `save_pretrained` writes the state dict it is given.

    For a model that owns its shards it would gather its weights from all ranks again, and write a tied weight twice.
    """
    distributed_config = getattr(config, "distributed_config", None)
    if distributed_config is None:
        yield
        return
    config.distributed_config = None
    try:
        yield
    finally:
        config.distributed_config = distributed_config


def load_adapter_state(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's adapter into the active adapter of a sharded PeftModel.

    Raises ModelError if the two differ in names or shapes.
    """
    (adapter,) = model.active_adapters
    weights = {
        name.replace(f".{adapter}.", "."): weight
        for name, weight in model.named_parameters()
        if ".lora_" in name and f".{adapter}." in name
    }
    saved = load_file(folder / "adapter_model.safetensors")
    mismatched = sorted(
        name
        for name in weights.keys() | saved.keys()
        if name not in weights or name not in saved or weights[name].shape != saved[name].shape
    )
    if mismatched:
        what = f"{len(mismatched)} tensors do not match the adapter in training, {mismatched[0]} among them"
        raise ModelError.at(str(folder), what, fix="resume with the recipe and the model that the run started with")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(shard_like(saved[name], weight))


def training_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return trained weights and their optimizer state by name: this rank's shards of sharded ones."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    moments = {name: dict(optimizer.state[weight]) for name, weight in trained.items() if weight in optimizer.state}
    return {"weights": {name: weight.detach() for name, weight in trained.items()}, "moments": moments}


def load_training_state(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Load what training_state returned into a model that may be sharded differently or not at all, in place.

    Raises what torch raises if names or shapes differ.
    """
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = training_state(model, optimizer)
    for name, weight in state["weights"].items():
        prefix = f"moments.{name}."
        for key in (key.removeprefix(prefix) for key in saved if key.startswith(prefix)):
            size = torch.Size(saved[prefix + key].size)
            empty = torch.zeros_like(weight) if size == weight.shape else torch.zeros(size)
            state["moments"].setdefault(name, {})[key] = empty
    dcp.load(state, checkpoint_id=str(folder))
    for name, weight in model.named_parameters():
        if name in state["moments"]:
            optimizer.state[weight] = state["moments"][name]


def match_param_groups(schedule: dict[str, Any], groups: int) -> dict[str, Any]:
    """Return a scheduler's state for an optimizer of another number of groups, all with the same learning rate.

    Experts that are sharded by expert parallelism form a group of their own, because their device mesh differs.
    """
    return {
        key: value[:1] * groups if isinstance(value, list) and len(value) != groups else value
        for key, value in schedule.items()
    }


def load_unsharded_state(states: dict[int, dict[str, Tensor]], weights: list[nn.Parameter], optimizer: Any) -> None:
    """Load optimizer state that a single process saved, by number, for sharded weights in the same order."""
    for number, state in states.items():
        weight = weights[number]
        optimizer.state[weight] = {
            key: shard_like(value, weight) if value.shape == weight.shape else value for key, value in state.items()
        }


def shard_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor, sharded as the weight is."""
    if not isinstance(weight, DTensor):
        return tensor
    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
