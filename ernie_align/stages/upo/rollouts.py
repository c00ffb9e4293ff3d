"""Rollouts between TRL's drawing of completions and TRL's policy loss: what TRL has no place for.

Prompts as the data room rendered them, rewards normalized by domain, groups that teach nothing replaced, and pairs that
stay in one batch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ernie_align import losses
from ernie_align.data import media
from ernie_align.data.collate import load_pixels
from ernie_align.models.image_cache import deduplicate_images
from ernie_align.models.routing import mm_token_type_ids, moe_mm_token_type_ids
from ernie_align.models.routing_stats import count_expert_flips, record_expert_choices
from ernie_align.rewards import Reward
from ernie_align.rewards.completion import parse_completion
from ernie_align.rewards.normalize import compute_advantages
from ernie_align.stages.upo.completion_log import CompletionTables, completion_table, rollout_metrics
from ernie_align.stages.upo.forwards import together
from ernie_align.stages.upo.groups import (
    Group,
    find_filter_reason,
    sampled_logps,
    select_pairs,
    split_into_batches,
    weighted_sum,
)
from ernie_align.stages.upo.recipe import UpoBlock
from ernie_align.stages.upo.rollout_state import OpenRolloutTrainer


class RolloutTrainer(OpenRolloutTrainer):
    """Draws completions, has them judged, and deals them to batches.

    block: the recipe's; rewards: in its order; tables: where completions are kept. Other arguments as WatchedTrainer.
    """

    def __init__(
        self,
        *args: Any,
        block: UpoBlock,
        rewards: list[Reward],
        image_processor: Any,
        tables: CompletionTables,
        **kwargs: Any,
    ):
        super().__init__(*args, reward_funcs=list(rewards), **kwargs)
        self.block = block
        self.rewards = rewards
        self.image_processor = image_processor
        self.tables = tables
        names = [reward.name for reward in rewards]
        self._verifier = names.index(block.filter.by) if block.filter.by else 0
        self._ranked_by = names.index(block.pairs_by) if block.pairs_by else None
        self._rolling = self._metrics["train"]  # of the rollout that is being made

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's place for rollouts: its batches hold each prompt G times, for every batch of the rollout again.

        Unlike TRL's, completions are not shuffled: a pair stays in one batch.
        """
        if not self.model.training:
            return self._roll_out(generation_batch, self.num_generations_eval, batches=1)[0]
        if self._step % self._batches_a_rollout == 0 or self._buffered_inputs is None:
            batches = self.args.steps_per_generation
            self._buffered_inputs = self._roll_out(generation_batch, self.num_generations, batches=batches)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _roll_out(self, examples: list[dict[str, Any]], generations: int, *, batches: int) -> list[dict[str, Any]]:
        """Draw, judge, pair and deal out completions, in eval mode: training mode may drop the cache."""
        training = self.model.training
        metrics = self._rolling = self._metrics["train" if training else "eval"]
        self.model.eval()
        try:
            with torch.no_grad():
                groups = self._judged(examples[::generations], generations, looks=training and self._is_logged_step())
                # before any is replaced: of what is left over, the mean would say little about the policy
                for name, value in rollout_metrics(groups, self.rewards, self.renderer.stop_ids).items():
                    metrics[name].append(value)
                if training:
                    groups = self._refilled(groups)
                self._set_advantages(groups)
                for group in groups:
                    select_pairs(group, by=self._ranked_by, margin=self.block.pairs_margin)
                metrics["pairs/per_rollout"].append(sum(gather_object([group.pair is not None for group in groups])))
                if training and self.accelerator.is_main_process and self.tables.wanted(self.state.global_step + 1):
                    self._keep_table(groups)
                return self._with_shared_counts(
                    [self._collate(rows) for rows in split_into_batches(groups, batches)], groups
                )
        finally:
            self.model.train(training)

    def _judged(self, examples: Sequence[dict[str, Any]], generations: int, *, looks: bool = False) -> list[Group]:
        """Groups of completions with their rewards. looks: compare the rollout with the forward of training."""
        groups = self._sample(examples, generations, looks=looks)
        self._score(groups)
        for group in groups:
            group.left_out = find_filter_reason(group, self.block.filter, self._verifier)
        return groups

    def _refilled(self, groups: list[Group]) -> list[Group]:
        """The groups that teach something, others in place of the rest, and if these run out the rest itself.

        What is left in at the end earns no advantage and no pair.
        """
        wanted, drawn = len(groups), len(groups)
        teaching = [group for group in groups if group.left_out is None]
        idle = [group for group in groups if group.left_out is not None]
        for refill in range(self.block.filter.refills):
            missing = wanted - len(teaching)
            if not max(gather_object([missing])):  # all processes draw or none does: they share the weights
                break
            more = self._judged(self._other_prompts(max(missing, 1), refill), self.num_generations)
            drawn += len(more)
            teaching += [group for group in more if group.left_out is None]
            idle += [group for group in more if group.left_out is not None]
        reasons = gather_object([group.left_out for group in idle])
        for reason in ("always_right", "always_wrong", "flat"):
            self._rolling[f"filter/{reason}"].append(reasons.count(reason))
        self._rolling["filter/drawn"].append(sum(gather_object([drawn])))
        self._rolling["filter/unfilled"].append(sum(gather_object([max(wanted - len(teaching), 0)])))
        return (teaching + idle)[:wanted]

    def _other_prompts(self, count: int, refill: int) -> list[dict[str, Any]]:
        """Prompts that follow from the seed and the step alone, so that a resumed run draws the same."""
        part = self._step % self.args.gradient_accumulation_steps
        place = (self.args.seed, self.state.global_step, part, refill, self.accelerator.process_index)
        draw = random.Random(" ".join(map(str, place)))
        rows = draw.sample(range(len(self.train_dataset)), min(count, len(self.train_dataset)))
        return [self.train_dataset[row] for row in rows]

    def _sample(self, examples: Sequence[dict[str, Any]], generations: int, *, looks: bool) -> list[Group]:
        """Completions of each prompt, drawn by TRL, with the routing of images watched."""
        pixels = [self._pixels(example) for example in examples]
        rows = [place for place in range(len(examples)) for _ in range(generations)]
        prompts = [list(examples[place]["input_ids"]) for place in rows]
        fields: dict[str, Any] = together([pixels[place] for place in rows])
        if self.modality is not None:  # `generate` places images before the backbone is called
            fields["mm_token_type_ids"] = [
                mm_token_type_ids(torch.tensor(ids), self.modality).tolist() for ids in prompts
            ]
        images = None
        if self.use_vllm and "pixel_values" in fields:  # vLLM makes pixels of its own
            shown = [self._pil(example) or None for example in examples]
            images = [shown[place] for place in rows]
        base = self.accelerator.unwrap_model(self.model)
        base = base.get_base_model() if hasattr(base, "peft_config") else base
        with (
            nullcontext() if self.use_vllm else self.monitor.check_forward(self._vision_tokens(fields)),
            deduplicate_images(base),  # the image of a group
            record_expert_choices(base) if looks else nullcontext({}) as experts,
            sampled_logps(base, self.temperature) if looks else nullcontext([]) as drawn,
        ):
            ids, sampled = self._generate_single_turn(prompts, images, fields, generations)
        groups = []
        for place, example in enumerate(examples):
            columns = json.loads(example["columns"])
            domain = columns[self.block.domain_column] if self.block.domain_column else f"source {example['rows'][0]}"
            own = slice(place * generations, (place + 1) * generations)
            said = [self._as_reward_sees(text_ids, example) for text_ids in ids[own]]
            group = Group(example, json.loads(example["prompt"]), columns, domain, pixels[place], ids[own], said)
            group.sampled = None if sampled is None else sampled[own]
            groups.append(group)
        if drawn or experts:
            self._compare_with_training(groups, drawn, experts)
        return groups

    def _pixels(self, example: dict[str, Any]) -> dict[str, Tensor]:
        found = load_pixels([example], self.image_processor, self.row_name)
        return {name: values.to(self.accelerator.device) for name, values in found.items()}

    def _decode(self, ids: list[int]) -> str:
        stops = set(self.renderer.stop_ids)
        return self.renderer.tokenizer.decode([token for token in ids if token not in stops])

    def _as_reward_sees(self, ids: list[int], example: dict[str, Any]) -> Any:
        text = self._decode(ids)
        is_conversation = example["prompt"].startswith("[")
        return [parse_completion(text, opened=example["opened"])] if is_conversation else text

    def _score(self, groups: Sequence[Group]) -> None:
        """Ask every reward about every completion of this process."""
        rows = [(group, place) for group in groups for place in range(len(group.ids))]
        names = dict.fromkeys(name for group in groups for name in group.columns)
        columns = {name: [group.columns.get(name) for group, _ in rows] for name in names}
        extra: dict[str, list[Any]] = {}
        given = {
            **columns,
            "prompts": [group.prompt for group, _ in rows],
            "completions": [group.completions[place] for group, place in rows],
            "completion_ids": [group.ids[place] for group, place in rows],
            "trainer_state": self.state,
            "log_metric": lambda name, value: self._rolling[name].append(value),
            "log_extra": lambda column, values: extra.update({column: list(values)}),
            **self._images(rows),
        }
        scores = [[float("nan") if score is None else score for score in reward(**given)] for reward in self.rewards]
        table = torch.tensor(scores, dtype=torch.float32).T
        start = 0
        for group, own in zip(groups, table.split([len(group.ids) for group in groups]), strict=True):
            group.scores = own
            group.rewards = weighted_sum(own, [reward.weight for reward in self.rewards])
            group.extra = {column: values[start : start + len(own)] for column, values in extra.items()}
            start += len(own)

    def _images(self, rows: Sequence[tuple[Group, int]]) -> dict[str, list[list[Any]]]:
        """Column `images` for rewards that look at them: PIL images, each decoded once."""
        if not any("images" in reward.columns for reward in self.rewards):
            return {}
        loaded = {group: self._pil(group.example) for group in {group for group, _ in rows}}
        return {"images": [loaded[group] for group, _ in rows]}

    def _pil(self, example: dict[str, Any]) -> list[Any]:
        return [media.load_image(image) for image in example["media"]]

    def _set_advantages(self, groups: Sequence[Group]) -> None:
        """Over the rollouts of all processes: a domain's deviation is that of the whole iteration."""
        here = [(group.rewards.tolist(), group.domain) for group in groups]
        everywhere = gather_object(here)
        before = self.accelerator.process_index * len(groups)
        rewards = torch.tensor([reward for values, _ in everywhere for reward in values])
        numbers = torch.arange(len(everywhere)).repeat_interleave(len(groups[0].ids))
        domains = [domain for values, domain in everywhere for _ in values]
        found = compute_advantages(rewards, numbers, domains, normalize=self.block.normalize_rewards).split(
            len(groups[0].ids)
        )
        for group, own in zip(groups, found[before : before + len(groups)], strict=True):
            group.advantages = own if group.left_out is None else torch.zeros_like(own)

    # -- batches ------------------------------------------------------------------------------------------------

    def _collate(self, rows: Sequence[tuple[Group, int]]) -> dict[str, Any]:
        """What the loss needs of completions: their tokens, advantages, pairs, and what others say of them."""
        inputs = self._padded(rows)
        device = self.accelerator.device
        inputs["advantages"] = torch.stack([group.advantages[place] for group, place in rows]).to(device)
        places = {row: number for number, row in enumerate(rows)}
        paired = dict.fromkeys(group for group, _ in rows if group.pair is not None)
        pairs = [[places[group, side] for side in group.pair] for group in paired if (group, group.pair[0]) in places]
        inputs["pairs"] = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2)
        inputs["rows"] = [tuple(group.example["rows"]) for group, _ in rows]
        if self.block.needs_reference:
            with self.use_reference() as model:
                inputs["ref_per_token_logps"] = self._logps(model, inputs)
        if self._outlives_its_policy():
            inputs["old_per_token_logps"] = self._logps(self.model, inputs)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            inputs["importance_sampling_ratio"] = self._mismatch(rows, inputs)
        return inputs

    def _mismatch(self, rows: Sequence[tuple[Group, int]], inputs: Mapping[str, Any]) -> Tensor:
        """How much likelier the policy finds its tokens here than in vLLM, cut off as TRL's keys say."""
        nan = float("nan")  # where vLLM could not say
        sampled = [[nan if logp is None else logp for logp in group.sampled[place]] for group, place in rows]
        here, mask = inputs["old_per_token_logps"], inputs["completion_mask"]
        there = torch.full_like(here, nan)
        for number, logps in enumerate(sampled):
            there[number, : len(logps)] = torch.tensor(logps, device=here.device)
        mode, _, cut = self.vllm_importance_sampling_mode.partition("_")
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        return losses.mismatch_ratio(here, there, mask, per=mode, cut=cut, low=low, high=high)

    def _outlives_its_policy(self) -> bool:
        """Whether completions come from another policy than the one that learns first: TRL's own condition."""
        if self.use_vllm and self.vllm_importance_sampling_correction:
            return True
        return self.args.gradient_accumulation_steps % self._batches_a_rollout != 0

    def _with_shared_counts(self, batches: list[dict[str, Any]], groups: Sequence[Group]) -> list[dict[str, Any]]:
        """What the sums of a batch are divided by: tokens and pairs of the whole rollout, on all processes."""
        tokens = sum(batch["completion_mask"].sum() for batch in batches)
        pairs = sum(group.pair is not None for group in groups)
        totals = self.accelerator.reduce(torch.stack([tokens, tokens.new_tensor(pairs)]), reduction="sum")
        for batch in batches:
            batch["num_items_in_batch"], batch["pairs_of_rollout"] = totals
        return batches

    # -- what one sees ------------------------------------------------------------------------------------------

    def _is_logged_step(self) -> bool:
        step = self.state.global_step + 1
        return step == 1 or (self.state.logging_steps > 0 and step % self.state.logging_steps == 0)

    def _compare_with_training(
        self, groups: list[Group], drawn: list[Tensor], experts: dict[str, list[Tensor]]
    ) -> None:
        """The rollout against the forward that learns from it: log-probabilities, and the experts of each token."""
        inputs = self._padded([(group, place) for group in groups for place in range(len(group.ids))])
        with record_expert_choices(self.accelerator.unwrap_model(self.model)) as again:
            logps = self._logps(self.model, inputs)
        metrics = self._rolling
        if drawn:
            sampled = torch.stack(drawn, dim=1)[:, : logps.shape[1]]
            mask = inputs["completion_mask"][:, : sampled.shape[1]]
            apart = (logps[:, : sampled.shape[1]] - sampled).abs() * mask
            metrics["rollout/logps_apart"].append(apart.max().item())
        if experts:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
            vision = torch.zeros_like(ids) if self.modality is None else moe_mm_token_type_ids(ids, self.modality)
            names = [name.removeprefix("base_model.model.") for name in again]
            trained = dict(zip(names, again.values(), strict=True))
            for pool, (flipped, total) in count_expert_flips(experts, trained, real=real, vision=vision.bool()).items():
                metrics[f"routing/flips_{pool}"].append(flipped / max(total, 1))

    def _keep_table(self, groups: Sequence[Group]) -> None:
        names = [reward.name for reward in self.rewards]
        table = completion_table(groups, names, self._decode, self.row_name)
        self.tables.keep(self.state.global_step + 1, table)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_completions"):  # a callback of ours that shows them
                callback.on_completions(self.state.global_step + 1, table)
