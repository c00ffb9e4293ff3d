"""Adjustments to DeepSpeed's optimizer step.

DeepSpeed steps within the backward pass, on flattened weights, so gradients can't be removed by Trainer's hooks before
the step, as elsewhere (TrainingMonitor). A hook of the optimizer does it here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ernie_align.errors import RunError
from ernie_align.models.distributed.dummy_vision import any_rank_saw_images, find_dummy_vision_backbone, vision_modules

_VISION_ONLY = "of_images"  # key of an optimizer group (saved in checkpoints): only images pass through its weights


def validate_deepspeed(trainer: Trainer) -> None:
    """Raise RunError if DeepSpeed builds or offloads the optimizer of a model with vision: the hook needs torch's."""
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    device = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    if find_dummy_vision_backbone(trainer.model) is None or ("optimizer" not in config and device == "none"):
        return
    what = "DeepSpeed's own optimizer" if "optimizer" in config else f"an optimizer offloaded to {device}"
    why = "momentum and weight decay would move vision parts in steps without an image"
    raise RunError.at("launcher", what, why=why, fix="remove it from DeepSpeed's config, or launch with fsdp2")


def validate_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Raise RunError if a checkpoint's optimizer was written with DeepSpeed and this run is without, the reverse, or on
    another number of processes: its state would be ignored or unreadable."""
    saved = len(list(checkpoint.glob("global_step*/*optim_states.pt")))
    current = trainer.accelerator.num_processes if trainer.is_deepspeed_enabled else 0
    if saved == current:
        return
    before, now = (
        f"with DeepSpeed on {count} processes" if count else "without DeepSpeed" for count in (saved, current)
    )
    fix = "resume with the launcher settings it was written with, or start again in another run.dir"
    raise RunError.at(str(checkpoint), f"written {before}, but this run is {now}", fix=fix)


def split_vision_groups(trainer: Trainer) -> None:
    """Move vision parts to optimizer groups of their own, which do not step unless a rank saw an image.

    models.distributed.dummy_vision clears the gradients of single weights, which DeepSpeed no longer has when it steps.
    Called while the trainer's optimizer is still torch's.
    """
    backbone, optimizer = find_dummy_vision_backbone(trainer.model), trainer.optimizer
    if backbone is None or _VISION_ONLY in optimizer.param_groups[0]:
        return
    vision_ids = {id(weight) for part in vision_modules(backbone) for weight in part.parameters()}
    groups = []
    for group in optimizer.param_groups:
        for vision_only in (False, True):
            weights = [weight for weight in group["params"] if (id(weight) in vision_ids) is vision_only]
            if weights:
                groups.append({**group, "params": weights, _VISION_ONLY: vision_only})
    optimizer.param_groups[:] = groups
    last_step, saw_images = -1, True

    def clear_vision_gradients(stepping: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal last_step, saw_images
        if last_step != trainer.state.global_step:  # DeepSpeed steps group by group
            last_step, saw_images = trainer.state.global_step, any_rank_saw_images(backbone)
        for group in stepping.param_groups:
            if group[_VISION_ONLY] and not saw_images:
                for weight in group["params"]:
                    weight.grad = None

    optimizer.register_step_pre_hook(clear_vision_gradients)
