"""The base of all trainers here: checks on each batch, checkpoints of sharded weights, means over an evaluation."""

from __future__ import annotations

import copy
import functools
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer
from trl.trainer.utils import use_adapter

from ernie_align.checkpoints import partial_checkpoint
from ernie_align.errors import RunError
from ernie_align.models.adapters import REFERENCE_ADAPTER, add_reference_adapter
from ernie_align.models.distributed.dummy_vision import (
    clear_unused_vision_gradients,
    find_dummy_vision_backbone,
    run_dummy_vision_last,
)
from ernie_align.models.distributed.rank0_loading import give_distinct_addresses
from ernie_align.models.distributed.sharding import apply_fsdp
from ernie_align.models.image_cache import is_vision_frozen
from ernie_align.models.routing_stats import check_routing, count_routed_tokens, find_expert_pools
from ernie_align.stages.deepspeed import split_vision_groups, validate_checkpoint, validate_deepspeed
from ernie_align.stages.sharded_checkpoint import (
    SHARDED_DIR,
    load_adapter_state,
    load_training_state,
    load_unsharded_state,
    match_param_groups,
    saving_unsharded,
    training_state,
)

_MAX_NAMED_ROWS = 16


class TrainingMonitor:
    """Checks that images reach the vision experts and that numbers stay finite. One per model: a reference that is a
    model of its own has its own monitor.

    row_name: (source, row) -> the row's name, for errors.
    """

    def __init__(self, model: nn.Module, row_name: Callable[[int, int], str]):
        self.pools = find_expert_pools(model)
        self.backbone = find_dummy_vision_backbone(model)  # None in a single process
        self.row_name = row_name
        self.has_gradient = False  # a loss since the last optimizer step depends on a trained weight
        self.rows: list[tuple[int, int]] = []  # (source, row) of each example since the last optimizer step

    def pop_metadata(self, inputs: dict[str, Any]) -> int:
        """Remove the row names and the vision token count from a batch, note the former and return the latter."""
        rows, vision_tokens = inputs.pop("rows", None), inputs.pop("vision_tokens", None)
        if rows is not None:
            self.rows += [tuple(row) for row in rows.tolist()]
        return 0 if vision_tokens is None else int(vision_tokens)

    @contextmanager
    def check_forward(self, vision_tokens: int, tokens: int | None = None) -> Iterator[None]:
        """Check the forward pass made in this context: every vision token of the data reaches the vision experts.

        tokens: positions of the batch, or None for a generation. The check costs one hook call per layer and pool,
        which reads a shape, so that every batch is checked and not only the first. Raises ModelError.
        """
        with count_routed_tokens(self.pools) as seen:
            yield
        check_routing(seen, vision_tokens=vision_tokens, tokens=tokens)

    def check_finite(self, value: Tensor | float, name: str, step: int) -> None:
        """Raise RunError naming the step and its rows if the loss or gradient norm is not finite."""
        number = float(value)
        if math.isfinite(number):
            return
        names = [self.row_name(*row) for row in self.rows[:_MAX_NAMED_ROWS]]
        more = len(self.rows) - len(names)
        rows = "\n    ".join(names + ([f"and {more} more rows"] if more > 0 else []))
        raise RunError.at(
            f"step {step}",
            f"the {name} is {number}",
            why=f"the rows of this step:\n    {rows}",
            fix="correct the rows, then --resume; or start again in another run.dir with a lower learning_rate",
        )

    def attach_to_graph(self, loss: Tensor, model: nn.Module) -> Tensor:
        """Return a loss that has a gradient, zero if no trained weight took part in it.

        A batch of text has no gradient where only vision parts are trained, and must not stop the run.
        """
        if not model.training:
            return loss
        self.has_gradient |= loss.requires_grad
        if loss.requires_grad:
            return loss
        return loss + 0 * sum(weight.sum() for weight in model.parameters() if weight.requires_grad)

    def before_optimizer_step(self, norm: Tensor | float, step: int, model: nn.Module) -> None:
        """Check the gradient norm and remove gradients that no data contributed to.

        An optimizer given a gradient of zeros still applies momentum and weight decay; given None it does nothing.
        """
        self.check_finite(norm, "gradient", step)
        if self.backbone is not None:
            clear_unused_vision_gradients(self.backbone)
        elif not self.has_gradient:
            model.zero_grad(set_to_none=True)
        self.has_gradient = False
        self.end_step()

    def end_step(self) -> None:
        """Forget the rows of the step."""
        self.rows.clear()


class AlignmentTrainer(Trainer):
    """Base of the trainers here. List it before TRL's trainer: `class X(AlignmentTrainer, trl.XTrainer)`.

    row_name: (source, row) -> the row's name, for errors; continues_adapter: the policy continues from an existing
    adapter, whose first state is the reference (otherwise adapters off, or `ref_model`). Other arguments are TRL's.
    """

    ref_model: nn.Module | None = None  # set by TRL's trainers that have one

    def __init__(self, *args: Any, row_name: Callable[[int, int], str], continues_adapter: bool = False, **kwargs: Any):
        config = kwargs["args"]
        save_only_model = config.save_only_model
        # Trainer refuses to checkpoint the optimizer of a model that owns its shards; it is saved here instead
        config.save_only_model |= getattr(kwargs["model"], "is_distributed_loading_by_transformers", False)
        super().__init__(*args, **kwargs)
        self.args.save_only_model = save_only_model
        # FSDP2 trains float32 copies of bfloat16 weights: they are saved in the model's own dtype
        self._saved_dtypes = {name: weight.dtype for name, weight in self.model.named_parameters()}
        if self.is_deepspeed_enabled:
            validate_deepspeed(self)
        has_reference = REFERENCE_ADAPTER in getattr(self.model, "peft_config", {})
        if has_reference and not continues_adapter:
            # TRL copies any adapter it is given; the reference of a fresh one is the model without adapters
            self.model.delete_adapter(REFERENCE_ADAPTER)
        elif continues_adapter and not has_reference:
            add_reference_adapter(self.model)
        if self._owns_its_shards and hasattr(self.model, "peft_config"):
            apply_fsdp(self.model)  # only now that all adapters are attached
        self.row_name = row_name
        self.monitor = TrainingMonitor(self.model, row_name)
        # read now: switching to a reference adapter changes which weights require gradients
        self.vision_is_frozen = is_vision_frozen(self.model)
        self.eval_means = WeightedMeans()  # of the evaluation in progress

    @functools.cached_property
    def reference_monitor(self) -> TrainingMonitor:
        """The monitor of the reference model: the policy's own where both share one model."""
        return self.monitor if self.ref_model is None else TrainingMonitor(self.ref_model, self.row_name)

    @contextmanager
    def use_reference(self) -> Iterator[nn.Module]:
        """Yield the reference model: `ref_model`, or the policy with its frozen adapter active or with adapters off."""
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None:
            yield self.ref_model
        elif not hasattr(policy, "peft_config"):  # full fine-tuning whose reference is computed before the first step
            yield self.model
        else:
            with use_adapter(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
                yield self.model

    @property
    def _owns_its_shards(self) -> bool:
        """The model was sharded before the trainer received it (models.distributed.sharding)."""
        return self.is_distributed_loading_by_transformers

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self._owns_its_shards

    def finish_loss(self, loss: Tensor) -> Tensor:
        """Return the loss of a batch, checked and attached to the graph; an evaluation step ends here."""
        self.monitor.check_finite(loss.detach(), "loss", self.state.global_step + 1)
        if not self.model.training:
            self.monitor.end_step()
        return self.monitor.attach_to_graph(loss, self.model)

    def count_non_padding_rows(self, rows: int) -> int:
        """Return how many rows of this rank's batch in an evaluation, the first ones, belong to the data set.

        The last batches are padded with rows from the beginning, so that all ranks take as many steps.
        """
        state, layout = self.accelerator.gradient_state, self.accelerator.parallelism_config
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        group_size = layout.tp_size if layout else 1  # ranks of one tensor-parallel group share a batch
        return min(max(state.remainder - self.accelerator.process_index // group_size * rows, 0), rows)

    def without_gathering(self) -> Self:
        """Return a shallow copy whose TRL loss averages metrics over this rank alone, into `_metrics` of its own."""
        local = copy.copy(self)
        local.accelerator, local._metrics = SingleProcess(self.accelerator), {"eval": defaultdict(list)}
        return local

    def _send_telemetry(self) -> None:
        """Send nothing: a run contacts only the hub ids that its recipe names."""

    def _get_output_dir(self, trial: Any) -> str:
        """Write a checkpoint to a partial folder, which is renamed once complete (runs.callbacks.checkpointer)."""
        return str(partial_checkpoint(super()._get_output_dir(trial)))

    def _get_grad_norm(self, model, grad_norm=None):
        """Check the norm that Trainer logs, the last point before the optimizer step."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.monitor.before_optimizer_step(norm, self.state.global_step + 1, self.model)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, where the values of an evaluation are means over tokens or pairs, not means of batch means."""
        if "eval_loss" in logs:
            means = self.pop_eval_means()
            logs["eval_loss"] = means.pop("loss", logs["eval_loss"])
            self._metrics["eval"].update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)

    def pop_eval_means(self) -> dict[str, float]:
        """Return the means of the evaluation that ends, over all ranks."""
        return self.eval_means.over_ranks()

    # -- sharded weights ----------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's. Accelerate finds the optimizer's weights again, once sharded, by the addresses they had before;
        on the meta device (models.distributed.rank0_loading) all addresses would be the same."""
        if self.is_fsdp_enabled:
            give_distinct_addresses(self.model, in_float32=self.accelerator.mixed_precision != "no")
        super().create_optimizer(model)
        if self.is_deepspeed_enabled:
            split_vision_groups(self)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's. It is called once the model has been wrapped."""
        backbone = find_dummy_vision_backbone(self.model) if self.is_deepspeed_enabled else None
        if backbone is not None:
            run_dummy_vision_last(backbone)
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Trainer's. An adapter is loaded before it is sharded; a full model was built from its checkpoint."""
        if resume_from_checkpoint:
            validate_checkpoint(self, Path(resume_from_checkpoint))
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # A forward pass before training leaves weights outside the layers gathered: the optimizer would take
                # these for the model's own, and train copies that are then discarded.
                module.reshard()
        if self.is_fsdp_enabled and resume_from_checkpoint and hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, self.model)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's. Sharded weights are gathered tensor by tensor and written by rank 0."""
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage < 3:
            if self.args.should_save:  # weights are not sharded, and the copy that Accelerate makes unties tied ones
                self._save(output_dir)
            return
        if not self._is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        adapter = hasattr(self.model, "peft_config")
        names = {name for name, _ in self.model.named_parameters()}  # lists a tied weight once
        names |= {name for name, _ in self.model.named_buffers()}
        state: dict[str, Tensor] = {}
        for name, value in self.model.state_dict().items():
            if name not in names or (adapter and ".lora_" not in name):
                continue
            gathered = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
            if self.args.should_save:
                state[name] = gathered.to("cpu", self._saved_dtypes.get(name, gathered.dtype))
        if self.args.should_save:
            with saving_unsharded(self.model.config):
                self._save(output_dir, state_dict=state)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's, without the reference adapter: Trainer would resume from its folder and from nothing else."""
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE_ADAPTER, ignore_errors=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        dcp.save(training_state(self.model, self.optimizer), checkpoint_id=str(Path(output_dir) / SHARDED_DIR))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._owns_its_shards and hasattr(self.model, "peft_config"):
            load_adapter_state(self.model, Path(resume_from_checkpoint))
        elif not self._is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        has_shards = checkpoint is not None and (Path(checkpoint) / SHARDED_DIR).is_dir()
        if checkpoint is None or not (has_shards or self._is_sharded):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if has_shards:
            load_training_state(self.model, self.optimizer, Path(checkpoint) / SHARDED_DIR)
        else:
            states = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)["state"]
            load_unsharded_state(states, self._optimizer_order(), self.optimizer)
        schedule = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(match_param_groups(schedule, len(self.optimizer.param_groups)))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _optimizer_order(self) -> list[nn.Parameter]:
        """Return the trained weights in the order of a single process's optimizer."""
        trained = [pair for pair in self.model.named_parameters() if pair[1].requires_grad]
        decayed = set(self.get_decay_parameter_names(self.model))
        return [weight for decay in (True, False) for name, weight in trained if (name in decayed) is decay]


class WeightedMeans:
    """Weighted means, by name, over everything that all ranks see in an evaluation."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: float, weight: float) -> None:
        """Add a mean over `weight` pairs or tokens of this rank."""
        total, before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value * weight, before + weight)

    def over_ranks(self) -> dict[str, float]:
        """Return the mean of each name that any rank has added (0 if its weight is 0), and reset."""
        sums = _sum_over_ranks(self._sums)
        self._sums = {}
        return {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}


class SingleProcess:
    """Stands in for the accelerator in a loss that must not gather from other ranks."""

    def __init__(self, accelerator: Accelerator):
        self.device = accelerator.device

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of this rank."""
        return values

    gather_for_metrics = gather

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        """Return the sum or mean over this rank."""
        return values


def mean_over_ranks(metrics: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Return the mean of each metric over the values of all ranks, as lists of one value."""
    sums = _sum_over_ranks({name: (sum(values), len(values)) for name, values in metrics.items()})
    return {name: [total / count] for name, (total, count) in sums.items() if count}


def _sum_over_ranks(local: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    sums: dict[str, tuple[float, float]] = {}
    for sums_of_rank in gather_object([local]):
        for name, (total, weight) in sums_of_rank.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + weight)
    return sums
