"""DeepSpeed's step. It is taken within the backward pass, on weights that are laid end to end: what Trainer's hooks do
to gradients before a step elsewhere is done here on the way into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ernie_align.errors import RunError
from ernie_align.models.distributed.dummy_vision import any_rank_saw_images, find_dummy_vision_backbone, vision_modules

_OF_IMAGES = "of_images"  # in a group of the optimizer: whether only images pass through its weights


def validate_deepspeed(trainer: Trainer) -> None:
    """Raises RunError where DeepSpeed was asked to make the optimizer, or to keep it elsewhere, for a model that sees
    images: the hook on the step is for torch's own optimizers."""
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    away = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    if find_dummy_vision_backbone(trainer.model) is None or ("optimizer" not in config and away == "none"):
        return
    what = "an optimizer of DeepSpeed's" if "optimizer" in config else f"an optimizer kept on {away}"
    why = "it would move vision parts by momentum and weight decay in steps without an image"
    raise RunError.at("launcher", what, why=why, fix="take it out of DeepSpeed's config, or launch with fsdp2")


def validate_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Raises RunError where the optimizer of a checkpoint is DeepSpeed's and this run is not, the other way round, or
    on another number of processes: its moments would be left out, or could not be read."""
    parts = len(list(checkpoint.glob("global_step*/*optim_states.pt")))
    here = trainer.accelerator.num_processes if trainer.is_deepspeed_enabled else 0
    if parts == here:
        return
    began = f"{parts} processes under DeepSpeed" if parts else "processes without DeepSpeed"
    goes_on = f"{here} under it" if here else "without it"
    fix = "go on as it began, or begin anew in another run.dir"
    raise RunError.at(str(checkpoint), f"written by {began}, and this run is {goes_on}", fix=fix)


def split_vision_groups(trainer: Trainer) -> None:
    """Vision parts in groups of their own, which stay as they are in a step in which no process saw an image.

    What `models.touch` drops are gradients of single weights, and DeepSpeed has none left when it steps. The trainer's
    optimizer is torch's own still.
    """
    backbone, optimizer = find_dummy_vision_backbone(trainer.model), trainer.optimizer
    if backbone is None or _OF_IMAGES in optimizer.param_groups[0]:
        return
    of_images = {id(weight) for part in vision_modules(backbone) for weight in part.parameters()}
    groups = []
    for group in optimizer.param_groups:
        for wanted in (False, True):
            own = [weight for weight in group["params"] if (id(weight) in of_images) is wanted]
            if own:
                groups.append({**group, "params": own, _OF_IMAGES: wanted})
    optimizer.param_groups[:] = groups
    asked, seen = -1, True

    def leave_idle_parts(stepping: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal asked, seen
        if asked != trainer.state.global_step:  # DeepSpeed steps group by group
            asked, seen = trainer.state.global_step, any_rank_saw_images(backbone)
        for group in stepping.param_groups:
            if group[_OF_IMAGES] and not seen:
                for weight in group["params"]:
                    weight.grad = None

    optimizer.register_step_pre_hook(leave_idle_parts)
