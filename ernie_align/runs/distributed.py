"""The ranks of a run: checks of the launcher's settings, and a process group on the CPU for what the ranks agree on."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ernie_align.errors import RunError
from ernie_align.models.distributed.layout import SHARDING_UNITS, ParallelLayout
from ernie_align.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

    from ernie_align.runs.prepare import Setup

# Set by `accelerate launch` -> the distributed type that Accelerate must report.
_REQUESTED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED"}
_RANK0_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_DEFAULT_TIMEOUT = 1800  # seconds: the default of TrainingArguments
_PING_TIMEOUT = timedelta(seconds=10)


# -- the launcher -------------------------------------------------------------------------------------------------


def requested_sharding() -> str | None:
    """Return how the launcher was asked to shard weights, FSDP or DEEPSPEED; None if each rank holds all of them."""
    return next((kind for name, kind in _REQUESTED.items() if os.environ.get(name, "").lower() == "true"), None)


def rank0_loading_enabled() -> bool:
    """Return if rank 0 alone reads the weights, and Accelerate scatters the shards."""
    return requested_sharding() == "FSDP" and os.environ.get(_RANK0_LOADING, "").lower() == "true"


def init_distributed_state(recipe: Recipe) -> PartialState:
    """Create Accelerate's state with training.ddp_timeout as the timeout of its collectives.

    Must run before Trainer: the first call creates the state and sets the timeout. On a machine without an accelerator
    `cpu` must be given, or Accelerate treats each process as a run of its own.
    """
    import torch
    from accelerate import PartialState

    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(seconds=collective_timeout(recipe)))


def collective_timeout(recipe: Recipe) -> float:
    """Seconds that one rank waits for another."""
    return recipe.training.get("ddp_timeout") or _DEFAULT_TIMEOUT


def configure_launch(state: PartialState, setup: Setup, parallel: ParallelLayout | None = None) -> None:
    """Reject launcher settings that cannot work, and tell Accelerate which modules of the family to shard.

    Runs before anything is loaded. Class names given in the launcher's config are kept. Raises RunError and ModelError.
    """
    recipe, stage, units = setup.recipe, setup.stage, SHARDING_UNITS[setup.architecture.family]
    adapters = getattr(recipe, "adapter", None) is not None
    requested = requested_sharding()
    if parallel:
        if parallel.tp_size > 1 and not stage.supports_tensor_parallel:
            what = f"stage {stage.name} does not support tensor parallelism"
            raise RunError.at("--tp-size", what, fix="drop --tp-size, or train with stage sft")
        where = recipe.model.where("name")
        parallel.validate(setup.architecture, state.num_processes, adapters=adapters, where=where)
        if requested:
            what = f"the launcher also requests {requested}, and both would shard the same weights"
            raise RunError.at("--tp-size, --ep-size", what, fix="launch with profile ep, ddp_nodes or cpu")
    if requested and state.distributed_type.value in ("NO", "MULTI_CPU"):
        kind, device = state.distributed_type.value, state.device.type
        raise RunError.at(
            "launcher",
            f"requested {requested}, but Accelerate falls back to {kind} on {device}",
            why="the run would train unsharded, without a warning",
            fix="launch with profile ddp, cpu or one_gpu, or start more than one process on GPUs",
        )
    if requested == "FSDP":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            what = "FSDP version 1 is not supported"
            raise RunError.at("launcher", what, fix="set fsdp_version: 2, or launch with profile fsdp2")
        if stage.needs_unsharded_model(recipe):
            os.environ[_RANK0_LOADING] = "false"  # read by transformers when it loads, by Accelerate when it shards
        # With adapters, all trained parameters have one dtype, and PEFT puts the adapter of a router's weight outside
        # the router: there the router stays in its layer's unit.
        routers = () if adapters else units.routers
        os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(units.layers + routers))
    elif requested == "DEEPSPEED" and units.experts:
        os.environ.setdefault("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", ",".join(units.experts))


def configure_deepspeed(config: Any, setup: Setup) -> None:
    """Reject what ZeRO-3 cannot run, and let every rank load the whole model before DeepSpeed shards it.

    config: TRL's, which has set DeepSpeed up for transformers. transformers would shard the model for ZeRO-3 while it
    loads, and adapters take their shapes from whole weights. Accelerate sets it up again when the trainer is built.
    Raises RunError.
    """
    plugin = getattr(config, "deepspeed_plugin", None)
    if plugin is None:
        return
    if plugin.zero_stage == 3 and setup.architecture.has_vision:
        # Otherwise collectives mismatch in the first step, or hang, if only some ranks have images.
        why = "ranks with images and ranks without would gather weights in different orders"
        fix = "launch with profile fsdp2, ep or zero2"
        if not setup.stage.supports_zero3_with_vision:
            what = f"ZeRO-3 does not support stage {setup.stage.name} for a model with vision"
            raise RunError.at("launcher", what, why=why, fix=fix)
        if config.gradient_checkpointing:
            what = "ZeRO-3 does not support gradient_checkpointing for a model with vision"
            fix += ", or set training.gradient_checkpointing: false"
            raise RunError.at("launcher", what, why=why, fix=fix)
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def check_world(accelerator: Accelerator, model: Any) -> str:
    """Describe the ranks in one line. Raises RunError if they are not what the launcher was asked for."""
    kind, world_size = accelerator.distributed_type.value, accelerator.num_processes
    requested, requested_size = requested_sharding(), int(os.environ.get("WORLD_SIZE", 1))
    if (requested or kind) != kind or world_size != requested_size:
        what = f"requested {requested or kind} on {requested_size} processes, got {kind} on {world_size}"
        raise RunError.at("launcher", what, fix="correct the launcher's config")
    if kind == "NO":
        return f"one process on {accelerator.device}"
    kind = "FSDP2" if accelerator.is_fsdp2 else "DDP" if kind.startswith("MULTI_") else kind
    layout = getattr(model.config, "distributed_config", None)
    if layout is not None:
        sizes = {"FSDP2": layout.fsdp_size, "tensor parallel": layout.tp_size, "expert parallel": layout.ep_size}
        kind = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) + ","
    return f"{world_size} processes on {accelerator.device.type}: {kind} over {accelerator.state.backend}"


# -- batches of all ranks -----------------------------------------------------------------------------------------


def examples_per_step(config: Any, parallel: ParallelLayout | None) -> int:
    """Examples in one optimizer step, over all ranks."""
    accumulated = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return accumulated * _data_parallel_size(config, parallel)


def repeated_examples(config: Any, parallel: ParallelLayout | None, examples: Any) -> int:
    """Examples that are seen twice in an epoch, so that all ranks have equally many batches of full size."""
    ranks = _data_parallel_size(config, parallel)
    if ranks == 1 or config.dataloader_drop_last or not hasattr(examples, "__len__"):
        return 0
    return -len(examples) % (config.per_device_train_batch_size * ranks)


def _data_parallel_size(config: Any, parallel: ParallelLayout | None) -> int:
    """Number of ranks with batches of their own; the ranks of a tensor-parallel group share one."""
    return config.world_size // (parallel.tp_size if parallel else 1)


# -- agreement between ranks --------------------------------------------------------------------------------------


class RankGroup:
    """All ranks of a run, with gloo process groups apart from the collectives of training: messages wait for no device,
    and still get through when a collective of training has failed.

    timeout: seconds that one rank waits for another. With one process, every method returns at once.
    """

    def __init__(self, timeout: float):
        import torch.distributed as dist

        self.world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world_size > 1 else 0
        self.is_main = self.rank == 0  # rank 0 writes files and reports
        self._group = self._pings = None
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._pings = dist.new_group(backend="gloo", timeout=_PING_TIMEOUT)

    def any(self, flag: bool) -> bool:
        """Return if the flag is set on any rank. A collective: all ranks must call it."""
        if self._group is None:
            return flag
        import torch
        import torch.distributed as dist

        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flags.item())

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank. A collective; the value of other ranks is ignored."""
        if self._group is None:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks get here."""
        self.any(False)

    def is_communication_error(self, error: BaseException) -> bool:
        """Return if an error means that another rank could not be reached."""
        if self._group is None or not isinstance(error, RuntimeError):
            return False
        import torch.distributed as dist

        return isinstance(error, dist.DistError) or "gloo" in str(error)

    def find_missing_ranks(self) -> str:
        """Ping all other ranks after a timeout, ten seconds each at most, and say which of them do not answer.

        A rank that still waits for the lost one may be named as well.
        """
        import torch
        import torch.distributed as dist

        others = [rank for rank in range(self.world_size) if rank != self.rank]
        missing, sent = [], []
        for rank in others:
            with suppress(RuntimeError):  # the connection is gone: receiving from it fails too
                sent.append(dist.isend(torch.ones(1), rank, group=self._pings))
        for rank in others:
            try:
                dist.recv(torch.empty(1), rank, group=self._pings)
            except RuntimeError:
                missing.append(str(rank))
        if not missing:
            return "all ranks answer now"
        return f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} did not answer"
