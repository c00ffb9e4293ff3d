"""TRL's DPOTrainer on pairs with images, with a reference that is exact in every mode.

TRL's loss code receives finished log-probabilities: the forward passes of policy and reference are made here, where
routing is checked, lengths are normalized and expert choices are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

import ernie_align.losses as losses
from ernie_align.data.collate import model_inputs
from ernie_align.data.render import IGNORE_INDEX
from ernie_align.models import packed_attention
from ernie_align.models.image_cache import ImageFeatureCache, find_backbone
from ernie_align.models.routing import ModalityTokens, moe_mm_token_type_ids
from ernie_align.models.token_dispatch import count_expert_flips, record_expert_choices
from ernie_align.stages.fused_head import fused_head_forward, score_positions
from ernie_align.stages.reference import ReferenceLogps
from ernie_align.stages.trainer import AlignmentTrainer


class PreferenceTrainer(AlignmentTrainer, DPOTrainer):
    """DPOTrainer over encoded pairs.

    reference_free: no loss uses a reference; length_normalize, sft_weight: as in the recipe; extra_losses: losses that
    TRL lacks, as (function of (policy, reference, lengths), weight); stored: reference log-probabilities computed in
    advance. Other arguments are those of AlignmentTrainer and of TRL.
    """

    def __init__(
        self,
        *args: Any,
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
        self.modality = ModalityTokens.from_config(self.model.config)
        if stored is not None:
            size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size

            def with_reference(rows: Any, name: str) -> Any:
                return stored.add_to(rows, name, self._reference_before_training, size, self.data_collator)

            self.train_dataset = with_reference(self.train_dataset, "train")
            if self.eval_dataset is not None:
                self.eval_dataset = with_reference(self.eval_dataset, "eval")
        self.precompute_ref_logps = True  # from here on, TRL reads the reference from the batch

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the rows, which are already encoded."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the rows: `stored` replaces TRL's own files, which do not support images."""
        return dataset

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return TRL's losses of a batch of pairs plus the extra losses, and record TRL's metrics."""
        vision_tokens = self.monitor.pop_metadata(inputs)
        pairs = self._batch_of(inputs)
        evaluating = not self.model.training
        with record_expert_choices(self.model) if evaluating else nullcontext({}) as policy_experts:
            outputs = self._policy_outputs(model, pairs, vision_tokens)
        with record_expert_choices(self.ref_model or self.model) if evaluating else nullcontext({}) as ref_experts:
            reference = self._reference_logps(pairs, vision_tokens)
        if ref_experts:
            self._count_expert_flips(policy_experts, ref_experts, inputs)
        loss_of = self._eval_loss if evaluating else self._pair_loss
        return self.finish_loss(loss_of(outputs, reference, pairs.loss_inputs))

    def _pair_loss(self, outputs: Any, reference: tuple[Tensor, Tensor], inputs: dict[str, Any]) -> Tensor:
        """Return TRL's losses plus the extra losses, from the outputs of both models. inputs: loss_inputs."""
        logps = outputs.log_probs  # (2P, T - 1), or (2P, C) with a shared prompt: 0 outside the answers
        lengths = inputs["completion_mask"][:, 1:].sum(dim=1)
        if self.length_normalize:
            scale = torch.cat(losses.length_normalized(*torch.ones_like(lengths).chunk(2), *lengths.chunk(2)))
            outputs.log_probs = logps * scale[:, None]
            reference = tuple(side * part for side, part in zip(reference, scale.chunk(2), strict=True))
        inputs = {**inputs, "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
        loss = super()._compute_loss(lambda **_: outputs, inputs, False)
        policy = outputs.log_probs.sum(dim=1).chunk(2)
        for extra_loss, weight in self.extra_losses:
            loss = loss + weight * extra_loss(policy, reference, lengths.chunk(2)).mean()
        if self.sft_weight:
            chosen, count = logps.chunk(2)[0], lengths.chunk(2)[0].sum()
            # divides by the tokens of all ranks, whose gradients are averaged
            nll = -chosen.sum() / self.accelerator.reduce(count.float(), reduction="mean")
            self._metrics["train" if self.model.training else "eval"]["nll_loss"].append(nll.item())
            loss = loss + self.sft_weight * nll
        return loss

    def _eval_loss(self, outputs: Any, reference: tuple[Tensor, Tensor], inputs: dict[str, Any]) -> Tensor:
        """Return the loss of the non-padding pairs, or zero if there are none; add it and TRL's metrics to the means.

        TRL averages its metrics over the batches of all ranks, padding included, so it is given this rank's non-padding
        pairs alone.
        """
        count = self.count_non_padding_rows(len(reference[0]))
        if not count:
            return reference[0].new_zeros(())
        mask = inputs["completion_mask"]

        def without_padding(values: Tensor) -> Tensor:
            return torch.cat([side[:count] for side in values.chunk(2)])

        by_row = {name: value for name, value in vars(outputs).items() if torch.is_tensor(value) and value.ndim}
        by_row = {name: without_padding(value) for name, value in by_row.items() if len(value) == len(mask)}
        inputs = {"input_ids": without_padding(inputs["input_ids"]), "completion_mask": without_padding(mask)}
        local = self.without_gathering()
        loss = local._pair_loss(SimpleNamespace(**by_row), tuple(side[:count] for side in reference), inputs)
        chosen, rejected = (side[:, 1:].sum().item() for side in inputs["completion_mask"].chunk(2))
        weights = {"entropy": chosen + rejected, "logits/rejected": rejected}  # means over tokens, others over pairs
        weights |= dict.fromkeys(("logits/chosen", "mean_token_accuracy", "nll_loss"), chosen)
        self.eval_means.add("loss", loss.item(), count)
        for name, (value,) in local._metrics["eval"].items():
            self.eval_means.add(name, value, weights.get(name, count))
        return loss

    def _batch_of(self, inputs: dict[str, Any]) -> PairBatch | SharedPromptBatch:
        images = ImageFeatureCache(frozen=self.vision_is_frozen)
        if "parts" not in inputs:
            return PairBatch(inputs, images)
        return SharedPromptBatch(inputs, images, find_backbone(self.accelerator.unwrap_model(self.model)))

    def _policy_outputs(self, model: Any, pairs: PairBatch | SharedPromptBatch, vision_tokens: int) -> Any:
        with self.monitor.check_forward(vision_tokens, pairs.positions):
            return pairs.forward(model, self.accelerator.unwrap_model(self.model))

    def _reference_logps(self, pairs: PairBatch | SharedPromptBatch, vision_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the reference's (P,) log-probabilities of both sides, zeros if no loss uses them."""
        inputs = pairs.loss_inputs
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        if self.reference_free:
            zeros = torch.zeros(len(inputs["completion_mask"]) // 2, device=inputs["completion_mask"].device)
            return zeros, zeros
        model = self.ref_model or self.model
        unwrapped = self.accelerator.unwrap_model(model)
        with self.reference_monitor.check_forward(vision_tokens, pairs.positions):
            # TRL switches the adapter and autocast, and sums over tokens (ld_alpha); it receives finished outputs
            return self.compute_ref_log_probs(lambda **_: pairs.forward(model, unwrapped), inputs)

    def _reference_before_training(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the reference's (P,) log-probabilities of both sides of a collated batch."""
        was_training = self.model.training
        self.model.eval()
        inputs = self._prepare_inputs(batch)
        vision_tokens = self.monitor.pop_metadata(inputs)
        try:
            return self._reference_logps(self._batch_of(inputs), vision_tokens)
        finally:
            self.model.train(was_training)
            self.monitor.end_step()

    def _count_expert_flips(
        self, policy: dict[str, Tensor], reference: dict[str, Tensor], inputs: dict[str, Any]
    ) -> None:
        """Add to the means the share of tokens whose experts differ between policy and reference, per pool."""
        ids = inputs["input_ids"]
        vision = torch.zeros_like(ids) if self.modality is None else moe_mm_token_type_ids(ids, self.modality)
        pairs = len(inputs["completion_mask"]) // 2
        non_padding = torch.arange(pairs, device=ids.device) < self.count_non_padding_rows(pairs)
        real = inputs["attention_mask"].bool() & non_padding.repeat(len(ids) // pairs)[:, None]
        for pool, (flipped, total) in count_expert_flips(policy, reference, real=real, vision=vision.bool()).items():
            self.eval_means.add(f"routing/flips_{pool}", flipped / max(total, 1), total)


class PairBatch:
    """A batch of PairCollator: chosen and rejected rows, each with its own prompt. Its images are encoded once.

    loss_inputs: what TRL's loss reads; completion_mask[:, 1:] is as wide as the outputs of `forward`; positions: number
    of positions in a forward pass.
    """

    def __init__(self, inputs: Mapping[str, Any], images: ImageFeatureCache):
        self.inputs = inputs
        self.images = images
        self.loss_inputs = dict(inputs)
        self.positions = inputs["input_ids"].numel()

    def forward(self, model: nn.Module, unwrapped: nn.Module) -> Any:
        """Return the outputs of TRL's fused head, chosen rows before rejected ones, 0 outside the answers.

        model: called for the forward pass; unwrapped: the same model without its distributed wrapper.
        """
        labels = self.inputs["input_ids"].masked_fill(self.inputs["completion_mask"] == 0, IGNORE_INDEX)
        forward = fused_head_forward(model, find_backbone(unwrapped))
        with self.images.use(unwrapped, times=2):
            return forward(**model_inputs(self.inputs), labels=labels, fused_lm_head=True, use_cache=False)


class SharedPromptBatch:
    """A batch of SharedPromptCollator, with the interface of PairBatch: each prompt is computed once, and the head
    scores answers only.

    backbone: the policy's, which computes positions behind images.
    """

    def __init__(self, inputs: Mapping[str, Any], images: ImageFeatureCache, backbone: nn.Module):
        ids, parts, mask = inputs["input_ids"], inputs["parts"], inputs["completion_mask"]
        width = ids.shape[1]
        self.images = images
        self.positions = ids.numel()
        answer_positions, predicted_at = packed_attention.answer_positions(parts, mask.shape[1] - 1)
        self.predicted_at = predicted_at + width * torch.arange(len(ids), device=ids.device).repeat(2)[:, None]
        answers = ids.repeat(2, 1).gather(1, answer_positions)
        self.labels = answers.masked_fill(mask[:, 1:] == 0, IGNORE_INDEX)
        dtype = backbone.get_input_embeddings().weight.dtype
        self.model_inputs: dict[str, Any] = model_inputs(inputs) | {
            "attention_mask": packed_attention.shared_prompt_mask(parts, width, dtype),
            "position_ids": packed_attention.shared_prompt_positions(
                backbone, ids, parts, inputs.get("image_grid_thw")
            ),
            "use_cache": False,
        }
        # TRL reads only the width of these ids: the answers and one masked position before them
        self.loss_inputs = {**inputs, "input_ids": answers[:, :1].expand(-1, mask.shape[1])}

    def forward(self, model: nn.Module, unwrapped: nn.Module) -> Any:
        """Return the outputs of TRL's fused head, as PairBatch.forward does."""
        with self.images.use(unwrapped):
            return score_positions(model, find_backbone(unwrapped), self.predicted_at, self.labels, self.model_inputs)
