"""TRL's DPOTrainer on pairs with images, with a reference that is right in every mode.

TRL's own loss code sees finished log-probabilities: the forwards of policy and reference happen here, where they are
watched, scaled by length if asked for, and compared expert by expert.
"""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from ernie_align import losses
from ernie_align.models.adapters import REFERENCE_ADAPTER
from ernie_align.models.modality import ModalityTokens, moe_mm_token_type_ids
from ernie_align.models.routing import expert_flips, record_experts
from ernie_align.models.seal import beside
from ernie_align.models.vision_once import ImagesOnce, backbone_of, vision_is_frozen
from ernie_align.stages.dpo_forward import PairsApart, PairsShared
from ernie_align.stages.evaluated import Means, OneProcess, fresh_rows
from ernie_align.stages.reference import ReferenceLogps
from ernie_align.stages.sharded import ShardedTrainer
from ernie_align.stages.watch import Watch


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
        keeps_adapter: bool,
        reference_free: bool,
        length_normalize: bool,
        sft_weight: float,
        own_losses: list[tuple[Callable[..., Tensor], float]],
        stored: ReferenceLogps | None,
        **kwargs: Any,
    ):
        self.reference_free = reference_free
        self.length_normalize = length_normalize
        self.sft_weight = sft_weight
        self.own_losses = own_losses
        super().__init__(*args, **kwargs)
        if REFERENCE_ADAPTER in getattr(self.model, "peft_config", {}) and not keeps_adapter:
            # TRL copies any adapter it is handed. Behind a fresh one the reference is the model without adapters.
            self.model.delete_adapter(REFERENCE_ADAPTER)
        self.spread_adapters()
        self.watch = Watch(self.model, row_name)
        self.reference_watch = Watch(self.ref_model, row_name) if self.ref_model is not None else self.watch
        self.modality = ModalityTokens.from_config(self.model.config)
        # judged now: to ask a reference adapter is to change which weights require gradients
        self.vision_is_frozen = vision_is_frozen(self.model)
        self._means = Means()  # of the evaluation so far
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
        return str(beside(super()._get_output_dir(trial)))

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
        with record_experts(self.model) if evaluating else nullcontext({}) as here:
            outputs = self._policy(model, pairs, vision_tokens)
        with record_experts(self.ref_model or self.model) if evaluating else nullcontext({}) as there:
            reference = self._reference(pairs, vision_tokens)
        if there:
            self._count_flips(here, there, inputs)

        if evaluating:
            loss = self._evaluated(outputs, reference, pairs.for_loss)
            self.watch.step_done()
        else:
            loss = self._loss(outputs, reference, pairs.for_loss)
        self.watch.finite(loss.detach(), "loss", self.state.global_step + 1)
        return self.watch.anchored(loss, self.model)

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
        for own_loss, weight in self.own_losses:
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
        fresh = fresh_rows(self.accelerator, len(reference[0]))
        if not fresh:
            return reference[0].new_zeros(())
        mask = inputs["completion_mask"]

        def first(values: Tensor) -> Tensor:
            return torch.cat([side[:fresh] for side in values.chunk(2)])

        of_rows = {name: value for name, value in vars(outputs).items() if torch.is_tensor(value) and value.ndim}
        outputs = SimpleNamespace(**{name: first(value) for name, value in of_rows.items() if len(value) == len(mask)})
        # TRL's means are over the batches of all processes, repeated pairs and all: it is asked about these alone
        alone = copy.copy(self)
        alone.accelerator, alone._metrics = OneProcess(self.accelerator), {"eval": defaultdict(list)}
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
        images = ImagesOnce(frozen=self.vision_is_frozen)
        if "parts" not in inputs:
            return PairsApart(inputs, images)
        return PairsShared(inputs, images, backbone_of(self._inner(self.model)))

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
        with self.reference_watch.forward(vision_tokens, pairs.tokens):
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
            self.watch.step_done()

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that Trainer is about to log: the last moment before the optimizer would spoil the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.gradient(norm, self.state.global_step + 1, self.model)
        return norm

    def _count_flips(self, here: dict[str, Tensor], there: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        ids = inputs["input_ids"]
        vision = torch.zeros_like(ids) if self.modality is None else moe_mm_token_type_ids(ids, self.modality)
        pairs = len(inputs["completion_mask"]) // 2
        fresh = torch.arange(pairs, device=ids.device) < fresh_rows(self.accelerator, pairs)
        real = inputs["attention_mask"].bool() & fresh.repeat(len(ids) // pairs)[:, None]
        for pool, (flipped, total) in expert_flips(here, there, real=real, vision=vision.bool()).items():
            self._means.add(f"routing/flips_{pool}", flipped / max(total, 1), total)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log. Of an evaluation, values are means over the pairs or tokens of all processes, each counted once,
        not means over batches of means."""
        if "eval_loss" in logs:
            means = self._means.over_processes()
            logs["eval_loss"] = means.pop("loss")
            self._metrics["eval"].update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As Trainer, without the reference: Trainer would resume from that folder and from nothing else."""
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE_ADAPTER, ignore_errors=True)
