"""Checkpoints of sharded models, which any number of ranks can load.

A checkpoint contains the model or adapter in the layout of a single process. With sharded weights (FSDP2, expert
parallelism) it also has a folder `sharded`: trained weights and optimizer states by name, where each rank writes its
own shards and none holds all of them. Any number of ranks loads it, including one.
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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from ernie_align.errors import ModelError
from ernie_align.models.distributed.dummy_vision import find_dummy_vision_backbone, run_dummy_vision_last
from ernie_align.models.distributed.rank0_loading import give_distinct_addresses
from ernie_align.models.distributed.sharding import apply_fsdp
from ernie_align.stages.deepspeed import split_vision_groups, validate_checkpoint, validate_deepspeed

SHARDED_DIR = "sharded"


class ShardedTrainer(Trainer):
    """What Trainer's own classes leave undone where processes share the weights. To be named before one of them."""

    def __init__(self, *args: Any, **kwargs: Any):
        config = kwargs["args"]
        wanted = config.save_only_model
        # Trainer refuses to checkpoint a model that owns its shards, for want of what is written here
        config.save_only_model = wanted or getattr(kwargs["model"], "is_distributed_loading_by_transformers", False)
        super().__init__(*args, **kwargs)
        self.args.save_only_model = wanted
        # FSDP2 trains float32 copies of bfloat16 weights: what is saved is of the model's own dtype
        self._dtypes = {name: weight.dtype for name, weight in self.model.named_parameters()}
        if self.is_deepspeed_enabled:
            validate_deepspeed(self)

    @property
    def _owns_its_shards(self) -> bool:
        """Whether the model was shared out before the trainer got it (models.parallel)."""
        return self.is_distributed_loading_by_transformers

    def shard_adapters(self) -> None:
        """Once all adapters are on the model, those of its reference too, and before it is asked anything: FSDP2 of a
        model whose experts were dealt out for them. Nothing is done to any other."""
        if self._owns_its_shards and hasattr(self.model, "peft_config"):
            apply_fsdp(self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's. Accelerate puts the sharded weights in the optimizer by where the whole ones lay in memory: on
        meta (models.first), all would lie at one place."""
        if self.is_fsdp_enabled:
            give_distinct_addresses(self.model, in_float32=self.accelerator.mixed_precision != "no")
        super().create_optimizer(model)
        if self.is_deepspeed_enabled:
            split_vision_groups(self)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's. The model has been wrapped when it is called."""
        backbone = find_dummy_vision_backbone(self.model) if self.is_deepspeed_enabled else None
        if backbone is not None:
            run_dummy_vision_last(backbone)
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Trainer's. An adapter is loaded before it is sharded; a model was built from its checkpoint (runs.train)."""
        if resume_from_checkpoint:
            validate_checkpoint(self, Path(resume_from_checkpoint))
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # What a forward before training has gathered outside the layers stays so: the optimizer would take
                # those weights for the model's own, and train what nobody keeps.
                module.reshard()
        if self.is_fsdp_enabled and resume_from_checkpoint and hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, self.model)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's. Sharded weights are gathered, tensor by tensor, and written by the first process."""
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage < 3:
            if self.args.should_save:  # weights are whole; a copy of them, which Accelerate makes, parts tied ones
                self._save(output_dir)
            return
        if not (self.is_fsdp_enabled or self._owns_its_shards):
            super().save_model(output_dir, _internal_call)
            return
        adapter = hasattr(self.model, "peft_config")
        names = {name for name, _ in self.model.named_parameters()}  # a tied weight once
        names |= {name for name, _ in self.model.named_buffers()}
        state: dict[str, Tensor] = {}
        for name, value in self.model.state_dict().items():
            if name not in names or (adapter and ".lora_" not in name):
                continue
            whole = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
            if self.args.should_save:
                state[name] = whole.to("cpu", self._dtypes.get(name, whole.dtype))
        if self.args.should_save:
            with saving_unsharded(self.model.config):
                self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not (self.is_fsdp_enabled or self._owns_its_shards):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        dcp.save(training_state(self.model, self.optimizer), checkpoint_id=str(Path(output_dir) / SHARDED_DIR))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._owns_its_shards and hasattr(self.model, "peft_config"):
            load_adapter_state(self.model, Path(resume_from_checkpoint))
        elif not (self.is_fsdp_enabled or self._owns_its_shards):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        sharded = checkpoint is not None and (Path(checkpoint) / SHARDED_DIR).is_dir()
        if checkpoint is None or not (sharded or self.is_fsdp_enabled or self._owns_its_shards):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if sharded:
            load_training_state(self.model, self.optimizer, Path(checkpoint) / SHARDED_DIR)
        else:
            states = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)["state"]
            load_unsharded_state(states, self._numbered(), self.optimizer)
        schedule = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(match_param_groups(schedule, len(self.optimizer.param_groups)))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _numbered(self) -> list[nn.Parameter]:
        """Trained weights in the order in which an optimizer of one process has them."""
        trained = [pair for pair in self.model.named_parameters() if pair[1].requires_grad]
        decayed = set(self.get_decay_parameter_names(self.model))
        return [weight for wanted in (True, False) for name, weight in trained if (name in decayed) is wanted]


@contextmanager
def saving_unsharded(config: Any) -> Iterator[None]:
    """Within the context, `save_pretrained` writes the state dict it is given, of a model sharded by transformers.

    Otherwise it would gather the weights again, and write a tied weight twice.
    """
    distributed = getattr(config, "distributed_config", None)
    if distributed is None:
        yield
        return
    config.distributed_config = None
    try:
        yield
    finally:
        config.distributed_config = distributed


def load_adapter_state(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's adapter into the active, sharded adapter of a PeftModel.

    Raises ModelError if names or shapes differ.
    """
    (adapter,) = model.active_adapters
    weights = {
        name.replace(f".{adapter}.", "."): weight
        for name, weight in model.named_parameters()
        if ".lora_" in name and f".{adapter}." in name
    }
    saved = load_file(folder / "adapter_model.safetensors")
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (weights, saved)]
    differing = sorted(name for name in weights.keys() | saved.keys() if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        what = f"{len(differing)} tensors differ from the adapter in training, for example {differing[0]}"
        raise ModelError.at(str(folder), what, fix="resume with the recipe and model that this run started with")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(shard_like(saved[name], weight))


def training_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return trained weights and their optimizer states by name, sharded like the model.

    torch's get_state_dict and set_state_dict are not used: they assume that every trained weight has optimizer states,
    and create them (step 1, zero moments) for weights that no gradient has reached, such as vision weights on text.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    moments = {name: dict(optimizer.state[weight]) for name, weight in trained.items() if weight in optimizer.state}
    return {"weights": {name: weight.detach() for name, weight in trained.items()}, "moments": moments}


def load_training_state(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Load a `training_state` into a model that is sharded differently or not at all, in place.

    Raises torch's errors if names or shapes differ.
    """
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = training_state(model, optimizer)
    for name, weight in state["weights"].items():
        prefix = f"moments.{name}."
        for key in (key.removeprefix(prefix) for key in saved if key.startswith(prefix)):
            size = torch.Size(saved[prefix + key].size)
            value = torch.zeros_like(weight) if size == weight.shape else torch.zeros(size)
            state["moments"].setdefault(name, {})[key] = value
    dcp.load(state, checkpoint_id=str(folder))
    for name, weight in model.named_parameters():
        if name in state["moments"]:
            optimizer.state[weight] = state["moments"][name]


def match_param_groups(schedule: dict[str, Any], groups: int) -> dict[str, Any]:
    """Adapt a scheduler's state to an optimizer with this number of parameter groups.

    Weights on another mesh, such as distributed experts, are a group of their own; all groups have one learning rate.
    """
    return {
        key: value[:1] * groups if isinstance(value, list) and len(value) != groups else value
        for key, value in schedule.items()
    }


def load_unsharded_state(states: dict[int, dict[str, Tensor]], weights: list[nn.Parameter], optimizer: Any) -> None:
    """Load full optimizer states, numbered as a single process saves them; weights: sharded, in the same order."""
    for number, state in states.items():
        weight = weights[number]
        optimizer.state[weight] = {
            key: shard_like(value, weight) if value.shape == weight.shape else value for key, value in state.items()
        }


def shard_like(full: Tensor, weight: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor, placed as the weight is; the tensor itself if that is not sharded."""
    if not isinstance(weight, DTensor):
        return full
    return distribute_tensor(full.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
