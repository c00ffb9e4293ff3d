"""What a step is: how many examples, of how many processes."""

from __future__ import annotations

from typing import Any

from ernie_align.models.distributed.layout import ParallelLayout


def batches(config: Any, parallel: ParallelLayout | None) -> int:
    """Processes that have batches of their own: neighbours between which matrices are cut share one."""
    return config.world_size // (parallel.tp_size if parallel else 1)


def examples_per_step(config: Any, parallel: ParallelLayout | None) -> int:
    """Of all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * batches(config, parallel)


def training_summary(config: Any, of_a_step: str) -> str:
    """What the steps are, most of it often TRL's defaults. of_a_step: how many examples, and what they are called."""
    length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    checkpointing = "on" if config.gradient_checkpointing else "off"
    rate = f"learning rate {config.learning_rate:g}, {config.lr_scheduler_type.value!s}"
    return f"{length} of {of_a_step}, {rate}, gradient checkpointing {checkpointing}"


def repeated_examples(config: Any, parallel: ParallelLayout | None, examples: Any) -> int:
    """Examples that fill the last batches of an epoch, of several processes, to one size."""
    count = batches(config, parallel)
    if count == 1 or config.dataloader_drop_last or not hasattr(examples, "__len__"):
        return 0
    return -len(examples) % (config.per_device_train_batch_size * count)
