"""TRL's DPOTrainer on pairs with images, with a reference that is right in every mode.

TRL's own loss code sees finished log-probabilities: the forwards of policy and reference happen here, where they are
watched, scaled by length if asked for, and compared expert by expert.
"""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from ernie_align import losses
from ernie_align.checkpoints import partial_checkpoint
from ernie_align.data.collate import model_inputs
from ernie_align.data.render import IGNORE_INDEX
from ernie_align.models import packed_attention
from ernie_align.models.adapters import REFERENCE_ADAPTER
from ernie_align.models.image_cache import ImageFeatureCache, find_backbone, is_vision_frozen
from ernie_align.models.routing import ModalityTokens, moe_mm_token_type_ids
from ernie_align.models.routing_stats import count_expert_flips, record_expert_choices
from ernie_align.stages.eval_metrics import SingleProcess, WeightedMeans, count_non_padding_rows
from ernie_align.stages.fused_head import fused_head_forward, score_positions
from ernie_align.stages.reference import ReferenceLogps
from ernie_align.stages.sharded_checkpoint import ShardedTrainer
from ernie_align.stages.trainer import TrainingMonitor


class PreferenceTrainer(ShardedTrainer, DPOTrainer):
    """DPOTrainer over encoded pairs.

    keeps_adapter: the policy goes on with an adapter, whose first state is the reference (otherwise adapters off, or
    ref_model); reference_free: no loss asks for a reference; length_normalize, sft_weight, own_losses: of the recipe,
    own_losses as (loss of (policy, reference, lengths), weight); stored: reference log-probabilities computed
    beforehand; row_name: (source, row) -> the row's name. Other arguments are TRL's.
    """

    def __init__(
        self,
        *args: Any,
        row_name: Callable[[int, int], str],
        continues_adapter: bool,
        reference_free: bool,
        length_normalize: bool,
        sft_weight: float,
        extra_losses: list[tuple[Callable[..., Tensor], float]],
        stored: ReferenceLogps | None,
        **kwargs: Any,
    ):
        self.reference_free = reference_free
        self.length_normalize = length_normalize
        self.sft_weight = sft_weight
        self.extra_losses = extra_losses
        super().__init__(*args, **kwargs)
        if REFERENCE_ADAPTER in getattr(self.model, "peft_config", {}) and not continues_adapter:
            # TRL copies any adapter it is handed. Behind a fresh one the reference is the model without adapters.
            self.model.delete_adapter(REFERENCE_ADAPTER)
        self.shard_adapters()
        self.watch = TrainingMonitor(self.model, row_name)
        self.reference_monitor = TrainingMonitor(self.ref_model, row_name) if self.ref_model is not None else self.watch
        self.modality = ModalityTokens.from_config(self.model.config)
        # judged now: to ask a reference adapter is to change which weights require gradients
        self.vision_is_frozen = is_vision_frozen(self.model)
        self._means = WeightedMeans()  # of the evaluation so far
        if stored is not None:
            size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
            self.train_dataset = stored.add_to(
                self.train_dataset, "train", self._reference_of, size, self.data_collator
            )
            if self.eval_dataset is not None:
                self.eval_dataset = stored.add_to(
                    self.eval_dataset, "eval", self._reference_of, size, self.data_collator
                )
        self.precompute_ref_logps = True  # from here on, TRL reads the reference from the batch

    def _send_telemetry(self) -> None:
        """Nothing is sent: a run reaches only the hub ids that its recipe names."""

    def _get_output_dir(self, trial: Any) -> str:
        """Checkpoints are written beside the whole ones, and named once they are whole (runs.keep)."""
        return str(partial_checkpoint(super()._get_output_dir(trial)))

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows are encoded already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Ours are kept in the run directory, and images do not hinder them."""
        return dataset

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's losses and metrics of a batch of pairs, plus our own losses."""
        vision_tokens = self.watch.take(inputs)
        pairs = self._pairs(inputs)
        evaluating = not self.model.training
        with record_expert_choices(self.model) if evaluating else nullcontext({}) as here:
            outputs = self._policy(model, pairs, vision_tokens)
        with record_expert_choices(self.ref_model or self.model) if evaluating else nullcontext({}) as there:
            reference = self._reference(pairs, vision_tokens)
        if there:
            self._count_flips(here, there, inputs)

        if evaluating:
            loss = self._evaluated(outputs, reference, pairs.for_loss)
            self.watch.end_step()
        else:
            loss = self._loss(outputs, reference, pairs.for_loss)
        self.watch.finite(loss.detach(), "loss", self.state.global_step + 1)
        return self.watch.attach_to_graph(loss, self.model)

    def _loss(self, outputs: Any, reference: tuple[Tensor, Tensor], inputs: dict[str, Any]) -> Tensor:
        """Of what both models said of a batch: TRL's losses and metrics, plus our own losses. inputs: for_loss."""
        logps = outputs.log_probs  # (2P, T - 1), or (2P, C) where the prompt is shared: 0 outside the answers
        lengths = inputs["completion_mask"][:, 1:].sum(dim=1)
        if self.length_normalize:
            scale = torch.cat(losses.length_normalized(*torch.ones_like(lengths).chunk(2), *lengths.chunk(2)))
            outputs.log_probs = logps * scale[:, None]
            reference = tuple(side * part for side, part in zip(reference, scale.chunk(2), strict=True))
        given = {**inputs, "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
        loss = super()._compute_loss(lambda **_: outputs, given, False)
        policy = outputs.log_probs.sum(dim=1).chunk(2)
        for own_loss, weight in self.extra_losses:
            loss = loss + weight * own_loss(policy, reference, lengths.chunk(2)).mean()
        if self.sft_weight:
            chosen, count = logps.chunk(2)[0], lengths.chunk(2)[0].sum()
            # of the tokens on all processes, whose gradients are averaged
            nll = -chosen.sum() / self.accelerator.reduce(count.float(), reduction="mean")
            self._metrics["train" if self.model.training else "eval"]["nll_loss"].append(nll.item())
            loss = loss + self.sft_weight * nll
        return loss

    def _evaluated(self, outputs: Any, reference: tuple[Tensor, Tensor], inputs: dict[str, Any]) -> Tensor:
        """The loss of the pairs that no process has seen yet, zero without any; it and TRL's metrics are noted."""
        fresh = count_non_padding_rows(self.accelerator, len(reference[0]))
        if not fresh:
            return reference[0].new_zeros(())
        mask = inputs["completion_mask"]

        def first(values: Tensor) -> Tensor:
            return torch.cat([side[:fresh] for side in values.chunk(2)])

        of_rows = {name: value for name, value in vars(outputs).items() if torch.is_tensor(value) and value.ndim}
        outputs = SimpleNamespace(**{name: first(value) for name, value in of_rows.items() if len(value) == len(mask)})
        # TRL's means are over the batches of all processes, repeated pairs and all: it is asked about these alone
        alone = copy.copy(self)
        alone.accelerator, alone._metrics = SingleProcess(self.accelerator), {"eval": defaultdict(list)}
        asked = {"input_ids": first(inputs["input_ids"]), "completion_mask": first(mask)}
        loss = alone._loss(outputs, tuple(side[:fresh] for side in reference), asked)
        chosen, rejected = (side[:, 1:].sum().item() for side in asked["completion_mask"].chunk(2))
        tokens = {"entropy": chosen + rejected, "logits/rejected": rejected}
        tokens |= dict.fromkeys(("logits/chosen", "mean_token_accuracy", "nll_loss"), chosen)
        self._means.add("loss", loss.item(), fresh)
        for name, (value,) in alone._metrics["eval"].items():
            self._means.add(name, value, tokens.get(name, fresh))
        return loss

    def _pairs(self, inputs: dict[str, Any]) -> PairsApart | PairsShared:
        """The batch, with its images encoded once for all forwards that may share them."""
        images = ImageFeatureCache(frozen=self.vision_is_frozen)
        if "parts" not in inputs:
            return PairsApart(inputs, images)
        return PairsShared(inputs, images, find_backbone(self._inner(self.model)))

    def _inner(self, model: Any) -> Any:
        return self.accelerator.unwrap_model(model)

    def _policy(self, model: Any, pairs: PairsApart | PairsShared, vision_tokens: int) -> Any:
        """TRL's outputs of the fused head."""
        with self.watch.forward(vision_tokens, pairs.tokens):
            return pairs.forward(model, self._inner(self.model))

    def _reference(self, pairs: PairsApart | PairsShared, vision_tokens: int) -> tuple[Tensor, Tensor]:
        """(P,) log-probabilities of both sides under the reference; zeros where no loss asks for one."""
        inputs = pairs.for_loss
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        if self.reference_free:
            nothing = torch.zeros(len(inputs["completion_mask"]) // 2, device=inputs["completion_mask"].device)
            return nothing, nothing
        model = self.ref_model or self.model
        with self.reference_monitor.forward(vision_tokens, pairs.tokens):
            # TRL chooses the adapter, autocast and what a sum over tokens is; of the forward it sees the outputs
            return self.compute_ref_log_probs(lambda **_: pairs.forward(model, self._inner(model)), inputs)

    def _reference_of(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The same for a batch as the collator makes it, before training begins."""
        was_training = self.model.training
        self.model.eval()
        inputs = self._prepare_inputs(batch)
        vision_tokens = self.watch.take(inputs)
        try:
            return self._reference(self._pairs(inputs), vision_tokens)
        finally:
            self.model.train(was_training)
            self.watch.end_step()

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that Trainer is about to log: the last moment before the optimizer would spoil the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.gradient(norm, self.state.global_step + 1, self.model)
        return norm

    def _count_flips(self, here: dict[str, Tensor], there: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        ids = inputs["input_ids"]
        vision = torch.zeros_like(ids) if self.modality is None else moe_mm_token_type_ids(ids, self.modality)
        pairs = len(inputs["completion_mask"]) // 2
        fresh = torch.arange(pairs, device=ids.device) < count_non_padding_rows(self.accelerator, pairs)
        real = inputs["attention_mask"].bool() & fresh.repeat(len(ids) // pairs)[:, None]
        for pool, (flipped, total) in count_expert_flips(here, there, real=real, vision=vision.bool()).items():
            self._means.add(f"routing/flips_{pool}", flipped / max(total, 1), total)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log. Of an evaluation, values are means over the pairs or tokens of all processes, each counted once,
        not means over batches of means."""
        if "eval_loss" in logs:
            means = self._means.mean_over_ranks()
            logs["eval_loss"] = means.pop("loss")
            self._metrics["eval"].update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As Trainer, without the reference: Trainer would resume from that folder and from nothing else."""
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE_ADAPTER, ignore_errors=True)


class PairsApart:
    """A batch of PairCollator, its images once: chosen and rejected each behind a prompt of their own.

    for_loss: what TRL's loss reads, whose completion_mask[:, 1:] is as wide as the outputs of `forward`; tokens:
    positions that a forward computes.
    """

    def __init__(self, inputs: Mapping[str, Any], images: ImageFeatureCache):
        self.inputs = inputs
        self.images = images
        self.for_loss = dict(inputs)
        self.tokens = inputs["input_ids"].numel()

    def forward(self, model: nn.Module, inner: nn.Module) -> Any:
        """TRL's outputs of the fused head: per-token log-probabilities and what its metrics are made of, chosen above
        rejected, each 0 where there is no answer.

        model: as it is called; inner: the same without what wraps it for many devices.
        """
        labels = self.inputs["input_ids"].masked_fill(self.inputs["completion_mask"] == 0, IGNORE_INDEX)
        scored = fused_head_forward(model, find_backbone(inner))
        with self.images.use(inner, times=2):
            return scored(**model_inputs(self.inputs), labels=labels, fused_lm_head=True, use_cache=False)


class PairsShared:
    """The same of a batch of SharedPromptCollator: each prompt is computed once, and the head scores answers alone.

    backbone: of the policy, which says where images place the tokens behind them.
    """

    def __init__(self, inputs: Mapping[str, Any], images: ImageFeatureCache, backbone: nn.Module):
        ids, parts, mask = inputs["input_ids"], inputs["parts"], inputs["completion_mask"]
        width = ids.shape[1]
        self.images = images
        self.tokens = ids.numel()
        places, predicted = packed_attention.answer_positions(parts, mask.shape[1] - 1)
        self.predicted_at = predicted + width * torch.arange(len(ids), device=ids.device).repeat(2)[:, None]
        answers = ids.repeat(2, 1).gather(1, places)
        self.labels = answers.masked_fill(mask[:, 1:] == 0, IGNORE_INDEX)
        self.given: dict[str, Tensor] = model_inputs(inputs) | {
            "attention_mask": packed_attention.shared_prompt_mask(
                parts, width, backbone.get_input_embeddings().weight.dtype
            ),
            "position_ids": packed_attention.shared_prompt_positions(
                backbone, ids, parts, inputs.get("image_grid_thw")
            ),
        }
        # in the width of the answers behind the last token of the prompt, which is masked and may be any
        self.for_loss = {**inputs, "input_ids": answers[:, :1].expand(-1, mask.shape[1])}

    def forward(self, model: nn.Module, inner: nn.Module) -> Any:
        """See PairsApart."""
        with self.images.use(inner):
            return score_positions(
                model, find_backbone(inner), self.predicted_at, self.labels, {**self.given, "use_cache": False}
            )
