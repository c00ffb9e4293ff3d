"""Checkpoints of several processes: whole on disk for whoever loads them, with what each process holds beside them.

A checkpoint has the model or the adapter in the layout that one process writes. Where weights are spread over processes
(FSDP2) it has a folder `sharded` too: trained weights and moments of the optimizer under their names, each process
writing its own part, none holding all of them. Any number of processes reads it, one too.
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
    """While it lasts, `save_pretrained` writes the weights it is handed. It would ask all processes for its own once
    more where the model owns its shards, and write a tied weight twice."""
    shared_out = getattr(config, "distributed_config", None)
    if shared_out is None:
        yield
        return
    config.distributed_config = None
    try:
        yield
    finally:
        config.distributed_config = shared_out


def load_adapter_state(model: nn.Module, folder: Path) -> None:
    """A checkpoint's adapter into the active one of a PeftModel, spread over the processes.

    Raises ModelError where the two have not the same weights.
    """
    (adapter,) = model.active_adapters
    own = {
        name.replace(f".{adapter}.", "."): weight
        for name, weight in model.named_parameters()
        if ".lora_" in name and f".{adapter}." in name
    }
    kept = load_file(folder / "adapter_model.safetensors")
    odd = sorted(
        name
        for name in own.keys() | kept.keys()
        if name not in own or name not in kept or own[name].shape != kept[name].shape
    )
    if odd:
        what = f"{len(odd)} tensors are not those of the adapter in training, {odd[0]} among them"
        raise ModelError.at(str(folder), what, fix="resume with the recipe and the model that it began with")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(shard_like(kept[name], weight))


def training_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Trained weights, and what the optimizer keeps of each, by name: of this process's shards where it has such."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    moments = {name: dict(optimizer.state[weight]) for name, weight in trained.items() if weight in optimizer.state}
    return {"weights": {name: weight.detach() for name, weight in trained.items()}, "moments": moments}


def load_training_state(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """The inverse, into a model that is sharded in another way or not at all. Weights are overwritten where they are.

    Raises what torch raises where names or shapes differ.
    """
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = training_state(model, optimizer)
    for name, weight in state["weights"].items():
        prefix = f"moments.{name}."
        for key in (key.removeprefix(prefix) for key in saved if key.startswith(prefix)):
            size = saved[prefix + key].size
            of_weight = torch.Size(size) == weight.shape
            state["moments"].setdefault(name, {})[key] = torch.zeros_like(weight) if of_weight else torch.zeros(size)
    dcp.load(state, checkpoint_id=str(folder))
    for name, weight in model.named_parameters():
        if name in state["moments"]:
            optimizer.state[weight] = state["moments"][name]


def match_param_groups(schedule: dict[str, Any], groups: int) -> dict[str, Any]:
    """The state of a scheduler, for an optimizer of so many groups. Dealt-out experts are a group of their own, as
    another mesh has them: all groups have the same learning rate."""
    return {
        key: value[:1] * groups if isinstance(value, list) and len(value) != groups else value
        for key, value in schedule.items()
    }


def load_unsharded_state(states: dict[int, dict[str, Tensor]], weights: list[nn.Parameter], optimizer: Any) -> None:
    """Whole moments, numbered as one process saves them, to an optimizer of sharded weights in the same order."""
    for number, whole in states.items():
        weight = weights[number]
        optimizer.state[weight] = {
            key: shard_like(value, weight) if value.shape == weight.shape else value for key, value in whole.items()
        }


def shard_like(whole: Tensor, weight: Tensor) -> Tensor:
    """This process's part of a whole tensor, shared out as the weight is."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
