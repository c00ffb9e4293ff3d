"""What the launcher was asked for, and the proof that the processes are that."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ernie_align.errors import RunError
from ernie_align.models.anatomy import Anatomy
from ernie_align.models.sharding import UNITS, Parallel

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

# What `accelerate launch` sets -> the distributed type that must come of it.
_ASKED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED"}
_FIRST_READS = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def asked_for() -> str | None:
    """The way of sharing weights that the launcher was asked for; None where each process has them all."""
    return next((kind for name, kind in _ASKED.items() if os.environ.get(name, "").lower() == "true"), None)


def first_reads() -> bool:
    """Whether the first process alone reads the weights, and Accelerate hands the shards out."""
    return asked_for() == "FSDP" and os.environ.get(_FIRST_READS, "").lower() == "true"


def prepare_processes(
    state: PartialState,
    anatomy: Anatomy,
    *,
    stage: str,
    adapters: bool,
    where: str,
    parallel: Parallel | None = None,
    beforehand: str = "",
) -> None:
    """Before anything is loaded: refuse what cannot be or what Accelerate would take for something else, and say how
    the family is cut.

    adapters: whether they are what is trained; where: what an error about the model should point at; beforehand: why
    each process needs the whole model before it is sharded, if it does.
    Raises RunError and ModelError. Class names that the launcher's config gives are left as they are.
    """
    asked, units = asked_for(), UNITS[anatomy.family]
    if parallel:
        parallel.judge(anatomy, state.num_processes, stage=stage, adapters=adapters, where=where)
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


def prepare_zero(config: Any, anatomy: Anatomy, stage: str) -> None:
    """Under DeepSpeed, between the trainer's arguments and the weights: refuse what it cannot do, and have the whole
    model loaded by every process, as it is everywhere else. DeepSpeed cuts it when it gets it with its adapters on.

    transformers would cut it for ZeRO-3 while it loads, and take from weights the shapes by which adapters are made.
    Accelerate asks it for ZeRO-3 again when the trainer is built. Raises RunError.
    """
    plugin = getattr(config, "deepspeed_plugin", None)
    if plugin is None:
        return
    if plugin.zero_stage == 3 and anatomy.has_vision:
        # a collective mismatch in the first step, or a wait for ever, on processes of which one alone sees images
        what = f"stage {stage}" if stage in ("dpo", "upo") else "gradient_checkpointing"
        if stage in ("dpo", "upo") or config.gradient_checkpointing:
            why = "processes that see images and processes that see text would fetch weights in different orders"
            fix = "launch with fsdp2, ep or zero2"
            fix += "" if stage in ("dpo", "upo") else ", or set training.gradient_checkpointing: false"
            raise RunError.at("launcher", f"ZeRO-3 with {what}, for a model that sees images", why=why, fix=fix)
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def prove_processes(accelerator: Accelerator, model: Any) -> str:
    """One line about what the processes are. Raises RunError where that is not what was asked for."""
    found, count = accelerator.distributed_type.value, accelerator.num_processes
    asked, wanted = asked_for(), int(os.environ.get("WORLD_SIZE", 1))
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
