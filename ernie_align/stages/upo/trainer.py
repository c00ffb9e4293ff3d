"""The UPO objective on rollouts: TRL's policy loss and KL, and a preference loss on pairs beside them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ernie_align import losses
from ernie_align.data.collate import model_inputs
from ernie_align.data.render import IGNORE_INDEX
from ernie_align.models.image_cache import ImageFeatureCache
from ernie_align.stages.eval_metrics import mean_over_ranks
from ernie_align.stages.upo.offline_pairs import OfflinePairs
from ernie_align.stages.upo.rollouts import RolloutTrainer

_log = logging.getLogger(__name__)


class UPOTrainer(RolloutTrainer):
    """Learns by policy_weight · L_policy + preference_weight · L_DPO + kl_weight · KL.

    pairs: by name, `pairs` to train on beside the rollouts and `pairs_eval` to measure.
    """

    def __init__(self, *args: Any, pairs: Mapping[str, OfflinePairs], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.beta = self.block.kl_weight  # TRL's name for the weight of the KL term
        self.pairs = pairs
        self._first_length: float | None = None
        for found in pairs.values():
            found.ask_reference(self._reference_of_pairs, self.args.per_device_train_batch_size)

    def _compute_loss(self, model, inputs):
        """TRL's policy loss and KL, and the preference loss, scaled for gradient accumulation as TRL's are."""
        training = self.model.training
        metrics = self._metrics["train" if training else "eval"]
        self.monitor.rows += inputs["rows"]
        # each of TRL's policy losses is linear in the advantages
        weighted = self.block.policy_weight * inputs["advantages"]
        loss = super()._compute_loss(model, {**inputs, "advantages": weighted})
        logps = self._latest_logps
        mask = inputs["completion_mask"]
        old = inputs.get("old_per_token_logps", logps).detach()
        low, high = self.block.clip
        policy = losses.clipped_policy(logps.detach(), old, inputs["advantages"], mask, low=low, high=high)
        metrics["policy_loss"].append(policy.item())
        if self.block.pairs == "rollouts" and self.block.needs_reference and len(inputs["pairs"]):
            ratios = ((logps - inputs["ref_per_token_logps"]) * mask).sum(dim=1)
            pair_losses = self._pair_losses(*ratios[inputs["pairs"]].unbind(dim=1), metrics)
            of_step = inputs["pairs_of_rollout"] / self.accelerator.num_processes
            if training:
                of_step = of_step * self.current_gradient_accumulation_steps / self.args.steps_per_generation
            loss = loss + self.block.preference_weight * pair_losses.sum() / of_step
        if self.block.pairs == "dataset" and training:
            pair_losses = self._pair_losses(*self._offline_ratios(model), metrics)
            share = self.block.preference_weight / self.current_gradient_accumulation_steps
            loss = loss + share * pair_losses.mean()
        return self.finish_loss(loss)

    def _pair_losses(self, chosen: Tensor, rejected: Tensor, metrics: Mapping[str, list[float]]) -> Tensor:
        """(P,) log-ratios of both sides -> (P,)."""
        found = losses.dpo_sigmoid(chosen, rejected, beta=self.block.beta)
        margins = self.block.beta * (chosen - rejected).detach()
        metrics["preference_loss"].append(found.detach().mean().item())
        metrics["pairs/margin"].append(margins.mean().item())
        metrics["pairs/accuracy"].append((margins > 0).float().mean().item())
        return found

    def _offline_ratios(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """(P,) log-ratios of the step's own batch of pairs."""
        accumulation = self.args.gradient_accumulation_steps
        number = self.state.global_step * accumulation + self._step % accumulation
        number = number * self.accelerator.num_processes + self.accelerator.process_index
        return self._ratios_of_pairs(model, self.pairs["pairs"].batch(number, self.block.pairs_batch_size))

    def _ratios_of_pairs(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        batch = {name: values.to(self.accelerator.device) for name, values in batch.items()}
        chosen, rejected = self._logps_of_pairs(model, batch)
        return chosen - batch["ref_chosen_logps"], rejected - batch["ref_rejected_logps"]

    def _logps_of_pairs(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(P,) log-probabilities of both sides of PairCollator's batch."""
        watch = self.reference_monitor if model is self.ref_model else self.monitor
        vision_tokens = watch.pop_metadata(batch)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
        images = ImageFeatureCache(frozen=self.vision_is_frozen).use(self.accelerator.unwrap_model(model), times=2)
        with watch.check_forward(vision_tokens, labels.numel()), self.accelerator.autocast(), images:
            outputs = model(**model_inputs(batch), labels=labels, fused_lm_head=True, use_cache=False)
        return outputs.log_probs.sum(dim=1).chunk(2)

    def _reference_of_pairs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.use_reference() as model:
                batch = {name: values.to(self.accelerator.device) for name, values in batch.items()}
                return self._logps_of_pairs(model, batch)
        finally:
            self.model.train(training)
            self.monitor.end_step()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation on rollouts, and the margin of the held-out pairs."""
        if "pairs_eval" in self.pairs:
            self._measure_held_out()
        return super().evaluate(*args, **kwargs)

    def _measure_held_out(self) -> None:
        """Pairs of the policy's own rollouts flatter and punish it at once: what it over-rates is what it samples."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                size = self.args.per_device_eval_batch_size
                sides = [self._ratios_of_pairs(self.model, b) for b in self.pairs["pairs_eval"].in_order(size)]
        finally:
            self.model.train(training)
            self.monitor.end_step()
        chosen, rejected = (torch.cat(side) for side in zip(*sides, strict=True))
        margins = self.block.beta * (chosen - rejected)
        self._metrics["eval"]["held_out/margin"].append(margins.mean().item())
        self._metrics["eval"]["held_out/accuracy"].append((margins > 0).float().mean().item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, and a warning where the policy runs away."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].update(mean_over_ranks(self._metrics[mode]))
        values = {name: sum(found) / len(found) for name, found in self._metrics["train"].items() if found}
        length, kl = values.get("completions/mean_length"), values.get("kl")
        if self.model.training and length is not None:
            self._first_length = self._first_length or length
            if length > self.block.warn_length * self._first_length:
                what = f"completions of {length:.0f} tokens, {self._first_length:.0f} at first"
                _log.warning(f"step {self.state.global_step}: {what}: is a reward paying for length?")
        if self.model.training and kl is not None and kl > self.block.warn_kl:
            what = f"KL {kl:.3g} a token: the policy has left its reference"
            _log.warning(f"step {self.state.global_step}: {what}; lower learning_rate or raise upo.kl_weight")
        super().log(logs, start_time)
