"""The UPO trainer: TRL's GRPOTrainer with our rollouts, and a preference loss added to its policy loss and KL."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

import ernie_align.losses as losses
from ernie_align.data.collate import model_inputs
from ernie_align.data.render import IGNORE_INDEX, Renderer
from ernie_align.models.image_cache import ImageFeatureCache, find_backbone
from ernie_align.rewards import Reward
from ernie_align.stages.fused_head import fused_head_forward
from ernie_align.stages.trainer import AlignmentTrainer, mean_over_ranks
from ernie_align.stages.upo.completion_log import CompletionLog, completion_table
from ernie_align.stages.upo.groups import Group
from ernie_align.stages.upo.recipe import UpoBlock
from ernie_align.stages.upo.rollouts import Generated, Metrics, RolloutSampler, RolloutState

if TYPE_CHECKING:
    from ernie_align.stages.upo.offline_pairs import OfflinePairs

_log = logging.getLogger(__name__)


class UPOTrainer(AlignmentTrainer, GRPOTrainer):
    """Minimizes policy_weight · L_policy + preference_weight · L_DPO + kl_weight · KL.

    block: the recipe's `upo`; rewards: in the recipe's order; renderer: of the prompts; reference_model: the reference
    of full fine-tuning; pairs: `pairs` to train on and `pairs_eval` to evaluate. Other arguments as AlignmentTrainer.
    """

    def __init__(
        self,
        *args: Any,
        block: UpoBlock,
        rewards: list[Reward],
        renderer: Renderer,
        image_processor: Any,
        reference_model: nn.Module | None,
        pairs: Mapping[str, OfflinePairs],
        completion_log: CompletionLog,
        **kwargs: Any,
    ):
        super().__init__(*args, reward_funcs=list(rewards), **kwargs)
        self.block = block
        self.beta = block.kl_weight  # TRL's name for the weight of the KL term
        self.renderer = renderer
        self.pairs = pairs
        self.completion_log = completion_log
        if reference_model is not None:
            self.ref_model = self.accelerator.prepare_model(reference_model, evaluation_mode=True)
            cast = self.args.cast_lm_head_to_fp32
            add_fused_lm_head(self.ref_model, temperature=self.temperature, cast_lm_head_to_fp32=cast)
        self.rollouts = RolloutSampler(
            block=block,
            config=self.args,
            prompts=self.train_dataset,
            rewards=rewards,
            renderer=renderer,
            image_processor=image_processor,
            row_name=self.row_name,
            pad_token_id=self._tokenizer.pad_token_id,
            accelerator=self.accelerator,
            model=lambda: self.accelerator.unwrap_model(self.model),
            generate=self._generate_monitored,
            logps=self._completion_logps,
        )
        self._restrict_generation()
        self._policy_logps: Tensor | None = None  # (B, C), from the latest forward of completions
        self._first_length: float | None = None
        for dataset in pairs.values():
            dataset.add_reference_logps(self._reference_pair_logps, self.args.per_device_train_batch_size)

    def _restrict_generation(self) -> None:
        """Stop completions where the chat template ends a turn, and suppress image and video tokens."""
        self.eos_token_ids = self.renderer.stop_ids
        modality = sorted(self.rollouts.modality.ids) if self.rollouts.modality else []
        if self.use_vllm:
            options = {"stop_token_ids": self.eos_token_ids, "logit_bias": dict.fromkeys(modality, -100.0)}
            self.vllm_generation.generation_kwargs |= {name: value for name, value in options.items() if value}
            return
        suppressed = sorted({*(self.generation_kwargs.get("suppress_tokens") or []), *modality}) or None
        for name, value in (("suppress_tokens", suppressed), ("eos_token_id", self.eos_token_ids)):
            setattr(self.generation_config, name, value)
            self.generation_kwargs[name] = value

    # -- rollouts -----------------------------------------------------------------------------------------------

    @property
    def _batches_per_rollout(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the next batch, sampling a rollout when the last one is used up.

        generation_batch holds each prompt G times. Completions are not shuffled as TRL does: a pair stays in one batch.
        """
        if not self.model.training:
            return self._sample_batches(generation_batch, self.num_generations_eval, count=1)[0]
        per_generation = self.args.steps_per_generation
        if self._step % self._batches_per_rollout == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._sample_batches(generation_batch, self.num_generations, count=per_generation)
        return self._buffered_inputs[self._step % per_generation]

    def _sample_batches(self, examples: list[dict[str, Any]], generations: int, *, count: int) -> list[dict[str, Any]]:
        training = self.model.training
        with self._evaluation_mode():
            groups = self.rollouts.draw(
                examples[::generations],
                generations,
                state=self.state,
                metrics=self._metrics["train" if training else "eval"],
                micro_step=self._step % self.args.gradient_accumulation_steps if training else None,
            )
            step = self.state.global_step + 1
            if training and self.accelerator.is_main_process and self.completion_log.is_due(step):
                self._log_completions(groups, step)
            return self.rollouts.make_batches(groups, count)

    def _log_completions(self, groups: list[Group], step: int) -> None:
        sampler = self.rollouts
        table = completion_table(groups, sampler.rewards, sampler.decode, sampler.row_name)
        self.completion_log.write(step, table)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_completions"):  # report.progress shows some of them
                callback.on_completions(step, table)

    def _generate_monitored(
        self, prompts: list[list[int]], images: list | None, fields: dict[str, Any], generations: int
    ) -> Generated:
        """Sample completions with TRL, and check the routing of the images (vLLM routes them by itself)."""
        with nullcontext() if self.use_vllm else self.monitor.check_forward(self._count_vision_tokens(fields)):
            return self._generate_single_turn(prompts, images, fields, generations)

    # -- forward passes -----------------------------------------------------------------------------------------

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Switch the policy to eval mode without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def _count_vision_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Count from the images what the routing check expects: placeholders, and a start and an end token each."""
        grids = inputs.get("image_grid_thw")
        counts = Counter(() if grids is None else map(tuple, grids.tolist()))
        return sum(count * (self.renderer.vision.tokens(grid) + 2) for grid, count in counts.items())

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        """Run TRL's forward of policy or reference with the routing monitored and each distinct image encoded once."""
        monitor = self.reference_monitor if model is self.ref_model else self.monitor
        inner = self.accelerator.unwrap_model(model)
        images = ImageFeatureCache(frozen=self.vision_is_frozen).use(inner)
        scored = fused_head_forward(model, find_backbone(inner))
        with monitor.check_forward(self._count_vision_tokens(kwargs), input_ids.numel()), images:
            result = super()._get_per_token_logps_and_entropies(scored, input_ids, *args, **kwargs)
        self._policy_logps = result[0]
        return result

    def _completion_logps(self, inputs: Mapping[str, Any], *, reference: bool = False) -> Tensor:
        """Return (B, C) log-probs of the completions by the policy or the reference, computed as in the loss."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "num_images") if name in inputs}
        length = inputs["completion_ids"].shape[1]
        with self.use_reference() if reference else nullcontext(self.model) as model:
            return self._get_per_token_logps_and_entropies(model, ids, mask, length, **images)[0]

    def _pair_logps(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (P,) log-probs of the chosen and the rejected sides of a PairCollator batch."""
        monitor = self.reference_monitor if model is self.ref_model else self.monitor
        batch = {name: values.to(self.accelerator.device) for name, values in batch.items()}
        vision_tokens = monitor.pop_metadata(batch)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
        images = ImageFeatureCache(frozen=self.vision_is_frozen).use(self.accelerator.unwrap_model(model), times=2)
        with monitor.check_forward(vision_tokens, labels.numel()), self.accelerator.autocast(), images:
            outputs = model(**model_inputs(batch), labels=labels, fused_lm_head=True, use_cache=False)
        return outputs.log_probs.sum(dim=1).chunk(2)

    def _reference_pair_logps(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with self._evaluation_mode(), self.use_reference() as model:
            logps = self._pair_logps(model, batch)
        self.reference_monitor.end_step()
        return logps

    # -- loss ---------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        """Add the preference loss to TRL's policy loss and KL, scaled for gradient accumulation as TRL's loss is."""
        training = self.model.training
        metrics = self._metrics["train" if training else "eval"]
        self.monitor.rows += inputs["rows"]
        # each of TRL's policy losses is linear in the advantages
        weighted = self.block.policy_weight * inputs["advantages"]
        loss = super()._compute_loss(model, {**inputs, "advantages": weighted})
        logps, mask = self._policy_logps, inputs["completion_mask"]
        old = inputs.get("old_per_token_logps", logps).detach()
        low, high = self.block.clip
        policy = losses.clipped_policy(logps.detach(), old, inputs["advantages"], mask, low=low, high=high)
        metrics["policy_loss"].append(policy.item())
        if self.block.pairs == "rollouts" and self.block.needs_reference and len(inputs["pairs"]):
            ratios = ((logps - inputs["ref_per_token_logps"]) * mask).sum(dim=1)
            pair_losses = self._pair_losses(*ratios[inputs["pairs"]].unbind(dim=1), metrics)
            pairs_per_step = inputs["pairs_of_rollout"] / self.accelerator.num_processes
            if training:
                accumulation = self.current_gradient_accumulation_steps
                pairs_per_step = pairs_per_step * accumulation / self.args.steps_per_generation
            loss = loss + self.block.preference_weight * pair_losses.sum() / pairs_per_step
        if self.block.pairs == "dataset" and training:
            pair_losses = self._pair_losses(*self._pair_log_ratios(model, self._next_offline_batch()), metrics)
            weight = self.block.preference_weight / self.current_gradient_accumulation_steps
            loss = loss + weight * pair_losses.mean()
        return self.finish_loss(loss)

    def _pair_losses(self, chosen: Tensor, rejected: Tensor, metrics: Metrics) -> Tensor:
        """(P,) log-ratios of both sides -> (P,) losses."""
        pair_losses = losses.dpo_sigmoid(chosen, rejected, beta=self.block.beta)
        metrics["preference_loss"].append(pair_losses.detach().mean().item())
        self._log_margins("pairs", chosen.detach(), rejected.detach(), metrics)
        return pair_losses

    def _log_margins(self, name: str, chosen: Tensor, rejected: Tensor, metrics: Metrics) -> None:
        margins = self.block.beta * (chosen - rejected)
        metrics[f"{name}/margin"].append(margins.mean().item())
        metrics[f"{name}/accuracy"].append((margins > 0).float().mean().item())

    def _next_offline_batch(self) -> dict[str, Tensor]:
        """Return this rank's batch of offline pairs for the current micro-step."""
        accumulation = self.args.gradient_accumulation_steps
        number = self.state.global_step * accumulation + self._step % accumulation
        number = number * self.accelerator.num_processes + self.accelerator.process_index
        return self.pairs["pairs"].batch(number, self.block.pairs_batch_size)

    def _pair_log_ratios(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (P,) log-ratios of policy to reference for both sides of a PairCollator batch."""
        reference = (batch[f"ref_{side}_logps"].to(self.accelerator.device) for side in ("chosen", "rejected"))
        chosen, rejected = self._pair_logps(model, batch)
        return chosen - next(reference), rejected - next(reference)

    # -- evaluation and logs ------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Run TRL's evaluation on rollouts, after measuring the margin of the held-out pairs."""
        if "pairs_eval" in self.pairs:
            self._evaluate_held_out_pairs()
        return super().evaluate(*args, **kwargs)

    def _evaluate_held_out_pairs(self) -> None:
        """Pairs from the policy's own rollouts would be biased: the policy samples the answers that it overrates."""
        batches = self.pairs["pairs_eval"].in_order(self.args.per_device_eval_batch_size)
        with self._evaluation_mode():
            sides = [self._pair_log_ratios(self.model, batch) for batch in batches]
        self.monitor.end_step()
        chosen, rejected = (torch.cat(side) for side in zip(*sides, strict=True))
        self._log_margins("held_out", chosen, rejected, self._metrics["eval"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean over all ranks, and warn when completion length or KL grows out of bounds."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].update(mean_over_ranks(self._metrics[mode]))
        if self.model.training:
            self._warn_of_drift(
                {name: sum(values) / len(values) for name, values in self._metrics[mode].items() if values}
            )
        super().log(logs, start_time)

    def _warn_of_drift(self, metrics: Mapping[str, float]) -> None:
        step, length, kl = self.state.global_step, metrics.get("completions/mean_length"), metrics.get("kl")
        if length is not None:
            self._first_length = self._first_length or length
            if length > self.block.warn_length * self._first_length:
                grown = f"completions have {length:.0f} tokens on average, {self._first_length:.0f} at the first step"
                _log.warning(f"step {step}: {grown}; check whether a reward pays for length")
        if kl is not None and kl > self.block.warn_kl:
            drift = f"KL to the reference is {kl:.3g} per token (upo.warn_kl is {self.block.warn_kl:g})"
            _log.warning(f"step {step}: {drift}; lower learning_rate or raise upo.kl_weight")

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state, and the rollout if the checkpoint falls between two of its steps."""
        super()._save_rng_state(output_dir)
        batches = self._buffered_inputs if self._step % self._batches_per_rollout else None
        state = RolloutState(self._step, batches, self.accelerator.num_processes)
        state.save(self._rollout_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state and the rollout. The rollout of another number of ranks is sampled again."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = self._rollout_file(checkpoint)
        state = RolloutState.load(path, self.accelerator.device) if path.exists() else None
        if state is not None and state.world_size == self.accelerator.num_processes:
            self._step, self._buffered_inputs = state.step, state.batches
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if self._step % self._batches_per_rollout:
            reason = "the checkpoint was saved within a rollout, by another number of processes"
            _log.warning(f"{reason}; completions are sampled again")

    def _rollout_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"rollout_{self.accelerator.process_index}.pt"
