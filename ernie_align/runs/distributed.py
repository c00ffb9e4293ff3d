"""What the launcher was asked for, and the proof that the processes are that."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ernie_align.errors import RunError
from ernie_align.models.architecture import Architecture
from ernie_align.models.distributed.layout import SHARDING_UNITS, ParallelLayout
from ernie_align.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

    from ernie_align.stages import Stage


# What `accelerate launch` sets -> the distributed type that must come of it.
_ASKED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED"}
_FIRST_READS = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def requested_sharding() -> str | None:
    """The way of sharing weights that the launcher was asked for; None where each process has them all."""
    return next((kind for name, kind in _ASKED.items() if os.environ.get(name, "").lower() == "true"), None)


def rank0_loading_enabled() -> bool:
    """Whether the first process alone reads the weights, and Accelerate hands the shards out."""
    return requested_sharding() == "FSDP" and os.environ.get(_FIRST_READS, "").lower() == "true"


def configure_launch(
    state: PartialState,
    architecture: Architecture,
    *,
    stage: Stage,
    adapters: bool,
    where: str,
    parallel: ParallelLayout | None = None,
    beforehand: str = "",
) -> None:
    """Before anything is loaded: refuse what cannot be or what Accelerate would take for something else, and say how
    the family is cut.

    adapters: whether they are what is trained; where: what an error about the model should point at; beforehand: why
    each process needs the whole model before it is sharded, if it does.
    Raises RunError and ModelError. Class names that the launcher's config gives are left as they are.
    """
    asked, units = requested_sharding(), SHARDING_UNITS[architecture.family]
    if parallel:
        parallel.validate(architecture, state.num_processes, adapters=adapters, where=where)
        if parallel.tp_size > 1 and not stage.supports_tensor_parallel:
            fix = "leave --tp-size out, or train by stage: sft"
            raise RunError.at("--tp-size", f"stage {stage.name} on matrices that are cut is not supported", fix=fix)
        if asked:
            what = f"{asked} was asked for beside it, and both would share out the same weights"
            raise RunError.at("--tp-size, --ep-size", what, fix="launch with ep, ddp_nodes or cpu")
    # adapters are of one dtype, and PEFT adds one to a router's weight outside the router: it must be whole there
    apart = () if adapters else units.routers
    if asked and state.distributed_type.value in ("NO", "MULTI_CPU"):
        raise RunError.at(
            "launcher",
            f"{asked} was asked for, and Accelerate makes {state.distributed_type.value} of it on {state.device.type}",
            why="it would train unsharded and say nothing",
            fix="launch with ddp, cpu or one_gpu, or start more than one process on GPUs",
        )
    if asked == "FSDP":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise RunError.at("launcher", "FSDP of version 1", fix="set fsdp_version: 2, or launch with fsdp2")
        if beforehand:
            os.environ[_FIRST_READS] = "false"  # read by transformers when it loads, and by Accelerate when it shards
        os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(units.layers + apart))
    elif asked == "DEEPSPEED" and units.experts:
        os.environ.setdefault("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", ",".join(units.experts))


def configure_deepspeed(config: Any, architecture: Architecture, stage: Stage) -> None:
    """Under DeepSpeed, between the trainer's arguments and the weights: refuse what it cannot do, and have the whole
    model loaded by every process, as it is everywhere else. DeepSpeed cuts it when it gets it with its adapters on.

    transformers would cut it for ZeRO-3 while it loads, and take from weights the shapes by which adapters are made.
    Accelerate asks it for ZeRO-3 again when the trainer is built. Raises RunError.
    """
    plugin = getattr(config, "deepspeed_plugin", None)
    if plugin is None:
        return
    if plugin.zero_stage == 3 and architecture.has_vision:
        # a collective mismatch in the first step, or a wait for ever, on processes of which one alone sees images
        supported = stage.supports_zero3_with_vision
        what = "gradient_checkpointing" if supported else f"stage {stage.name}"
        if not supported or config.gradient_checkpointing:
            why = "processes that see images and processes that see text would fetch weights in different orders"
            fix = "launch with fsdp2, ep or zero2"
            fix += ", or set training.gradient_checkpointing: false" if supported else ""
            raise RunError.at("launcher", f"ZeRO-3 with {what}, for a model that sees images", why=why, fix=fix)
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def check_world(accelerator: Accelerator, model: Any) -> str:
    """One line about what the processes are. Raises RunError where that is not what was asked for."""
    found, count = accelerator.distributed_type.value, accelerator.num_processes
    asked, wanted = requested_sharding(), int(os.environ.get("WORLD_SIZE", 1))
    if (asked or found) != found or count != wanted:
        what = f"{asked or 'processes'} of {wanted} were asked for, and these are {found} of {count}"
        raise RunError.at("launcher", what, fix="mend the launcher's config")
    if found == "NO":
        return f"one process on {accelerator.device}"
    kind = "FSDP2" if accelerator.is_fsdp2 else "DDP" if found.startswith("MULTI_") else found
    shared_out = getattr(model.config, "distributed_config", None)
    if shared_out is not None:
        sizes = {
            "FSDP2 of": shared_out.fsdp_size,
            "matrices cut in": shared_out.tp_size,
            "experts dealt to": shared_out.ep_size,
        }
        kind = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) + ","
    return f"{count} processes on {accelerator.device.type}: {kind} over {accelerator.state.backend}"


_TIMEOUT = 1800  # seconds: TrainingArguments' own default
_ROLL_CALL = timedelta(seconds=10)


def init_distributed_state(recipe: Recipe) -> PartialState:
    """accelerate's state, whose collectives wait as long as training.ddp_timeout says.

    The first to ask for that state sets the timeout, before Trainer reads the key: so nothing else asks first. It is
    told that there is no accelerator where there is none: it would take each process for the only one.
    """
    import torch
    from accelerate import PartialState

    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    cpu = told or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(seconds=collective_timeout(recipe)))


def collective_timeout(recipe: Recipe) -> float:
    """Seconds that one process waits for another."""
    return recipe.training.get("ddp_timeout") or _TIMEOUT


class RankGroup:
    """All processes of the run. What they tell each other goes over the CPU, beside the collectives of training: it
    waits for no device, and it still works where one of those has failed.

    timeout: seconds that one process waits for another. With one process, nothing is asked of anybody.
    """

    def __init__(self, timeout: float):
        import torch.distributed as dist

        self.count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.count > 1 else 0
        self._group = self._calls = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._calls = dist.new_group(backend="gloo", timeout=_ROLL_CALL)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process. All must ask at the same point."""
        if self._group is None:
            return flag
        import torch
        import torch.distributed as dist

        up = torch.tensor([int(flag)])
        dist.all_reduce(up, op=dist.ReduceOp.MAX, group=self._group)
        return bool(up.item())

    def of_first(self, value: Any) -> Any:
        """What the first process found, in all of them. The others' own value is not looked at."""
        if self._group is None:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def wait(self) -> None:
        """Go on when all are here."""
        self.any(False)

    def failed_together(self, error: BaseException) -> bool:
        """Whether an error says that another process could not be reached."""
        if self._group is None or not isinstance(error, RuntimeError):
            return False
        import torch.distributed as dist

        return isinstance(error, dist.DistError) or "gloo" in str(error)

    def find_missing_ranks(self) -> str:
        """Who does not answer, asked by whoever waited in vain: ten seconds for each at most.

        One that still waits for the lost one may be named beside it.
        """
        import torch
        import torch.distributed as dist

        others = [rank for rank in range(self.count) if rank != self.rank]
        missing, sent = [], []
        for rank in others:
            with suppress(RuntimeError):  # gone: it will not be heard either
                sent.append(dist.isend(torch.ones(1), rank, group=self._calls))
        for rank in others:
            try:
                dist.recv(torch.empty(1), rank, group=self._calls)
            except RuntimeError:
                missing.append(str(rank))
        if not missing:
            return "all processes answer now"
        return f"process{'es' * (len(missing) > 1)} {', '.join(missing)} did not answer"
