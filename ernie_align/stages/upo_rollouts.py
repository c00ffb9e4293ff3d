"""TRL's GRPOTrainer with rollouts that know images, routing, domains and which groups teach nothing.

TRL draws the completions and learns from them. What lies between is done here: prompts as the data room rendered them,
rewards normalized by domain, groups that teach nothing replaced, pairs kept in one batch, and the reference.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, use_adapter

from ernie_align.data import media
from ernie_align.data.collate import pad, pixels_of
from ernie_align.data.render import Renderer
from ernie_align.models.adapters import REFERENCE_ADAPTER, keep_reference
from ernie_align.models.modality import ModalityTokens, mm_token_type_ids, moe_mm_token_type_ids
from ernie_align.models.routing import expert_flips, record_experts
from ernie_align.rewards import Reward
from ernie_align.rewards.completion import message
from ernie_align.rewards.normalize import advantages
from ernie_align.stages.upo import UpoBlock
from ernie_align.stages.upo_groups import Group, deal, pair_up, sampled_logps, weighted_sum, why_left_out
from ernie_align.stages.upo_tables import CompletionTables, table_of
from ernie_align.stages.watch import Watch


class RolloutTrainer(GRPOTrainer):
    """GRPOTrainer over encoded prompts.

    block: the recipe's; rewards: in its order; renderer: of the prompts; row_name: (source, row) -> the row's name;
    keeps_adapter: the policy goes on with an adapter, whose first state is the reference; frozen: the reference of full
    fine-tuning. Other arguments are TRL's.
    """

    def __init__(
        self,
        *args: Any,
        block: UpoBlock,
        rewards: list[Reward],
        renderer: Renderer,
        image_processor: Any,
        rewards_see_images: bool,
        row_name: Callable[[int, int], str],
        keeps_adapter: bool,
        frozen: nn.Module | None,
        tables: CompletionTables,
        **kwargs: Any,
    ):
        super().__init__(*args, reward_funcs=list(rewards), **kwargs)
        self.block = block
        self.rewards = rewards
        self.renderer = renderer
        self.image_processor = image_processor
        self.rewards_see_images = rewards_see_images
        self.row_name = row_name
        self.tables = tables
        self.modality = ModalityTokens.from_config(self.model.config)
        if keeps_adapter:
            keep_reference(self.model)
        if frozen is not None:
            self.ref_model = self.accelerator.prepare_model(frozen, evaluation_mode=True)
            cast = self.args.cast_lm_head_to_fp32
            add_fused_lm_head(self.ref_model, temperature=self.temperature, cast_lm_head_to_fp32=cast)
        names = [reward.name for reward in rewards]
        self._verifier = names.index(block.filter.by) if block.filter.by else 0
        self._ranked_by = names.index(block.pairs_by) if block.pairs_by else None
        self._forbid_modality_tokens()
        self.watch = Watch(self.model, row_name)
        self.reference_watch = Watch(self.ref_model, row_name) if self.ref_model is not None else self.watch
        self._policy_logps: Tensor | None = None  # of the forward that was last done

    def _send_telemetry(self) -> None:
        """Nothing is sent: a run reaches only the hub ids that its recipe names."""

    def _forbid_modality_tokens(self) -> None:
        """An answer ends where the template ends one, and holds no token that would ask for an image."""
        self.eos_token_ids = self.renderer.stop_ids
        if self.use_vllm:
            return  # TRL hands vLLM the same list through training.generation_kwargs
        given = self.generation_kwargs.get("suppress_tokens") or []
        forbidden = sorted({*given, *(self.modality.ids if self.modality else ())}) or None
        for name, value in (("suppress_tokens", forbidden), ("eos_token_id", self.eos_token_ids)):
            setattr(self.generation_config, name, value)
            self.generation_kwargs[name] = value

    # -- rollouts -----------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's place for rollouts: its batches hold each prompt G times, for every batch of the rollout again.

        Unlike TRL's, completions are not shuffled: a pair stays in one batch.
        """
        if not self.model.training:
            return self._roll_out(generation_batch, self.num_generations_eval, batches=1)[0]
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or self._buffered_inputs is None:
            batches = self.args.steps_per_generation
            self._buffered_inputs = self._roll_out(generation_batch, self.num_generations, batches=batches)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _roll_out(self, examples: list[dict[str, Any]], generations: int, *, batches: int) -> list[dict[str, Any]]:
        """Draw, judge, pair and deal out completions, in eval mode: training mode may drop the cache."""
        training = self.model.training
        metrics = self._metrics["train" if training else "eval"]
        self.model.eval()
        try:
            with torch.no_grad():
                groups = self._judged(examples[::generations], generations)
                self._log_drawn(groups, metrics)  # before any is replaced: what is left after that flatters no one
                if training:
                    groups = self._refilled(groups)
                self._set_advantages(groups)
                for group in groups:
                    pair_up(group, by=self._ranked_by, margin=self.block.pairs_margin)
                metrics["pairs/per_rollout"].append(sum(gather_object([group.pair is not None for group in groups])))
                if training and self.accelerator.is_main_process and self.tables.wanted(self.state.global_step + 1):
                    self._keep_table(groups)
                return self._with_shared_counts([self._collate(rows) for rows in deal(groups, batches)], groups)
        finally:
            self.model.train(training)

    def _judged(self, examples: Sequence[dict[str, Any]], generations: int) -> list[Group]:
        groups = self._sample(examples, generations)
        self._score(groups)
        for group in groups:
            group.left_out = why_left_out(group, self.block.filter, self._verifier)
        return groups

    def _refilled(self, groups: list[Group]) -> list[Group]:
        """The groups that teach something, others in place of the rest, and if these run out the rest itself.

        What is left in at the end earns no advantage and no pair.
        """
        wanted, drawn = len(groups), len(groups)
        teaching = [group for group in groups if group.left_out is None]
        idle = [group for group in groups if group.left_out is not None]
        for refill in range(self.block.filter.refills):
            missing = max(
                gather_object([wanted - len(teaching)])
            )  # every process draws, or none: drawing is shared work
            if not missing:
                break
            more = self._judged(self._other_prompts(max(wanted - len(teaching), 1), refill), self.num_generations)
            drawn += len(more)
            teaching += [group for group in more if group.left_out is None]
            idle += [group for group in more if group.left_out is not None]
        metrics = self._metrics["train"]
        for reason in ("always_right", "always_wrong", "flat"):
            metrics[f"filter/{reason}"].append(sum(group.left_out == reason for group in idle))
        metrics["filter/drawn"].append(drawn)
        metrics["filter/unfilled"].append(max(wanted - len(teaching), 0))
        return (teaching + idle)[:wanted]

    def _other_prompts(self, count: int, refill: int) -> list[dict[str, Any]]:
        """Prompts that follow from the seed and the step alone, so that a resumed run draws the same."""
        part = self._step % self.args.gradient_accumulation_steps
        place = (self.args.seed, self.state.global_step, part, refill, self.accelerator.process_index)
        draw = random.Random(" ".join(map(str, place)))
        rows = draw.sample(range(len(self.train_dataset)), min(count, len(self.train_dataset)))
        return [self.train_dataset[row] for row in rows]

    def _sample(self, examples: Sequence[dict[str, Any]], generations: int) -> list[Group]:
        """Completions of each prompt, drawn by TRL, with the routing of images watched."""
        pixels = [self._pixels(example) for example in examples]
        rows = [place for place in range(len(examples)) for _ in range(generations)]
        prompts = [list(examples[place]["input_ids"]) for place in rows]
        fields: dict[str, Any] = _together([pixels[place] for place in rows])
        if self.modality is not None:  # `generate` places images before the backbone is called
            fields["mm_token_type_ids"] = [
                mm_token_type_ids(torch.tensor(ids), self.modality).tolist() for ids in prompts
            ]
        vision_tokens = self._vision_tokens(fields)
        looks = self.model.training is False and self._is_logged_step()
        base = self.accelerator.unwrap_model(self.model)
        base = base.get_base_model() if hasattr(base, "peft_config") else base
        with (
            self.watch.forward(vision_tokens),
            record_experts(base) if looks else nullcontext({}) as experts,
            sampled_logps(base, self.temperature) if looks else nullcontext([]) as drawn,
        ):
            ids, _ = self._generate_single_turn(prompts, None, fields, generations)
        groups = []
        for place, example in enumerate(examples):
            columns = json.loads(example["columns"])
            domain = columns[self.block.domain_column] if self.block.domain_column else f"source {example['rows'][0]}"
            own = ids[place * generations : (place + 1) * generations]
            said = [self._as_reward_sees(text_ids, example) for text_ids in own]
            groups.append(Group(example, json.loads(example["prompt"]), columns, domain, pixels[place], own, said))
        if drawn or experts:
            self._compare_with_training(groups, drawn, experts)
        return groups

    def _pixels(self, example: dict[str, Any]) -> dict[str, Tensor]:
        found = pixels_of([example], self.image_processor, self.row_name)
        return {name: values.to(self.accelerator.device) for name, values in found.items()}

    def _vision_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Counted from the images, as the guard wants it: placeholders by their grids, and a start and an end each."""
        grids = inputs.get("image_grid_thw")
        if grids is None:
            return 0
        return sum(self.renderer.vision.tokens(tuple(grid)) + 2 for grid in grids.tolist())

    def _decode(self, ids: list[int]) -> str:
        stops = set(self.renderer.stop_ids)
        return self.renderer.tokenizer.decode([token for token in ids if token not in stops])

    def _as_reward_sees(self, ids: list[int], example: dict[str, Any]) -> Any:
        text = self._decode(ids)
        is_conversation = example["prompt"].startswith("[")
        return [message(text, opened=example["opened"])] if is_conversation else text

    def _score(self, groups: Sequence[Group]) -> None:
        """Ask every reward about every completion of this process."""
        rows = [(group, place) for group in groups for place in range(len(group.ids))]
        names = dict.fromkeys(name for group in groups for name in group.columns)
        columns = {name: [group.columns.get(name) for group, _ in rows] for name in names}
        given = {
            "prompts": [group.prompt for group, _ in rows],
            "completions": [group.completions[place] for group, place in rows],
            "completion_ids": [group.ids[place] for group, place in rows],
            "trainer_state": self.state,
            "log_metric": lambda name, value: self._metrics["train"][name].append(value),
            **self._images(rows),
            **columns,
        }
        scores = [[float("nan") if score is None else score for score in reward(**given)] for reward in self.rewards]
        table = torch.tensor(scores, dtype=torch.float32).T
        start = 0
        for group in groups:
            end = start + len(group.ids)
            group.scores = table[start:end]
            group.rewards = weighted_sum(group.scores, [reward.weight for reward in self.rewards])
            start = end

    def _images(self, rows: Sequence[tuple[Group, int]]) -> dict[str, list[list[Any]]]:
        """Column `images` for rewards that look at them: PIL images, each decoded once."""
        if not self.rewards_see_images:
            return {}
        loaded = {
            group: [media.load(image) for image in group.example["media"]] for group in {group for group, _ in rows}
        }
        return {"images": [loaded[group] for group, _ in rows]}

    def _set_advantages(self, groups: Sequence[Group]) -> None:
        """Over the rollouts of all processes: a domain's deviation is that of the whole iteration."""
        here = [(group.rewards.tolist(), group.domain) for group in groups]
        everywhere = gather_object(here)
        before = self.accelerator.process_index * len(groups)
        rewards = torch.tensor([reward for values, _ in everywhere for reward in values])
        numbers = torch.arange(len(everywhere)).repeat_interleave(len(groups[0].ids))
        domains = [domain for values, domain in everywhere for _ in values]
        found = advantages(rewards, numbers, domains, how=self.block.normalize_rewards).split(len(groups[0].ids))
        for group, own in zip(groups, found[before : before + len(groups)], strict=True):
            group.advantages = own if group.left_out is None else torch.zeros_like(own)

    # -- batches ------------------------------------------------------------------------------------------------

    def _collate(self, rows: Sequence[tuple[Group, int]]) -> dict[str, Any]:
        """TRL's inputs for completions (B of them): prompts padded on the left, answers on the right; and the pairs."""
        device = self.accelerator.device
        prompts = [list(group.example["input_ids"]) for group, _ in rows]
        answers = [group.ids[place] for group, place in rows]
        stops = set(self.renderer.stop_ids)
        counted = [not self.mask_truncated_completions or ids[-1] in stops for ids in answers]
        inputs: dict[str, Any] = {
            "prompt_ids": pad(prompts, self._tokenizer.pad_token_id, left=True),
            "prompt_mask": pad([[1] * len(ids) for ids in prompts], 0, left=True),
            "completion_ids": pad(answers, self._tokenizer.pad_token_id),
            "completion_mask": pad([[int(on)] * len(ids) for on, ids in zip(counted, answers, strict=True)], 0),
            "advantages": torch.stack([group.advantages[place] for group, place in rows]),
            **_together([group.pixels for group, _ in rows]),
        }
        inputs = {name: values.to(device) for name, values in inputs.items()}
        if "pixel_values" in inputs:
            inputs["num_images"] = [len(group.pixels.get("image_grid_thw", ())) for group, _ in rows]
        places = {row: number for number, row in enumerate(rows)}
        paired = dict.fromkeys(group for group, _ in rows if group.pair is not None)
        pairs = [[places[group, side] for side in group.pair] for group in paired if (group, group.pair[0]) in places]
        inputs["pairs"] = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2)
        inputs["rows"] = [tuple(group.example["rows"]) for group, _ in rows]
        if self.block.needs_reference:
            with self._reference() as model:
                inputs["ref_per_token_logps"] = self._logps(model, inputs)
        if self._outlives_its_policy():
            inputs["old_per_token_logps"] = self._logps(self.model, inputs)
        return inputs

    def _outlives_its_policy(self) -> bool:
        """Whether a rollout is learned from in more than one optimizer step: TRL's own condition."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) != 0

    def _with_shared_counts(self, batches: list[dict[str, Any]], groups: Sequence[Group]) -> list[dict[str, Any]]:
        """What the sums of a batch are divided by: tokens and pairs of the whole rollout, on all processes."""
        tokens = sum(batch["completion_mask"].sum() for batch in batches)
        pairs = sum(group.pair is not None for group in groups)
        totals = self.accelerator.reduce(torch.stack([tokens, tokens.new_tensor(pairs)]), reduction="sum")
        for batch in batches:
            batch["num_items_in_batch"], batch["pairs_of_rollout"] = totals
            batch["weighted_advantages"] = self.block.policy_weight * batch["advantages"]
        return batches

    def _logps(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """(B, C) log-probabilities of the completions, as the loss computes them."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "num_images") if name in inputs}
        keep = inputs["completion_ids"].shape[1]
        return self._get_per_token_logps_and_entropies(model, ids, mask, keep, **images)[0]

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        """TRL's forward of a batch, of the policy or of the reference, with the routing watched."""
        watch = self.reference_watch if model is self.ref_model else self.watch
        with watch.forward(self._vision_tokens(kwargs), input_ids.numel()):
            result = super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)
        self._policy_logps = result[0]
        return result

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The model that the policy is held to, while the context lasts."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None):
            yield self.model

    # -- what one sees ------------------------------------------------------------------------------------------

    def _is_logged_step(self) -> bool:
        step = self.state.global_step + 1
        return step == 1 or (self.state.logging_steps > 0 and step % self.state.logging_steps == 0)

    def _compare_with_training(
        self, groups: list[Group], drawn: list[Tensor], experts: dict[str, list[Tensor]]
    ) -> None:
        """The rollout against the forward that learns from it: log-probabilities, and the experts of each token."""
        for group in groups:
            group.advantages = torch.zeros(len(group.ids))
        rows = [(group, place) for group in groups for place in range(len(group.ids))]
        inputs = self._collate(rows)
        with record_experts(self.accelerator.unwrap_model(self.model)) as again:
            logps = self._logps(self.model, inputs)
        metrics = self._metrics["train"]
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
            for pool, (flipped, total) in expert_flips(experts, trained, real=real, vision=vision.bool()).items():
                metrics[f"routing/flips_{pool}"].append(flipped / max(total, 1))

    def _log_drawn(self, groups: Sequence[Group], metrics: Mapping[str, list[float]]) -> None:
        """Means over all processes: rewards by function and by domain, and lengths."""
        stops = set(self.renderer.stop_ids)
        rows = gather_object(
            [
                (group.domain, group.scores[place].tolist(), group.rewards[place].item(), len(ids), ids[-1] in stops)
                for group in groups
                for place, ids in enumerate(group.ids)
            ]
        )
        rewards = torch.tensor([row[2] for row in rows])
        scores = torch.tensor([row[1] for row in rows])
        lengths = torch.tensor([float(row[3]) for row in rows])
        metrics["reward"].append(rewards.nanmean().item())
        metrics["reward_std"].append(_std(rewards))
        for number, reward in enumerate(self.rewards):
            metrics[f"rewards/{reward.name}"].append(scores[:, number].nanmean().item())
            for what, count in reward.counts.items():
                metrics[f"rewards/{reward.name}/{what}"].append(count)
        for domain in sorted({row[0] for row in rows}):
            own = torch.tensor([row[0] == domain for row in rows])
            metrics[f"domains/{domain}"].append(rewards[own].nanmean().item())
        metrics["completions/mean_length"].append(lengths.mean().item())
        metrics["completions/max_length"].append(lengths.max().item())
        metrics["completions/cut_off"].append(sum(not row[4] for row in rows) / len(rows))

    def _keep_table(self, groups: Sequence[Group]) -> None:
        names = [reward.name for reward in self.rewards]
        table = table_of(groups, names, self._decode, self.row_name)
        self.tables.keep(self.state.global_step + 1, table)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_completions"):  # a callback of ours that shows them
                callback.on_completions(self.state.global_step + 1, table)


def _together(pixels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """pixel_values and image_grid_thw of several rows; nothing where none has an image."""
    names = ("pixel_values", "image_grid_thw")
    found = {name: [row[name] for row in pixels if name in row] for name in names}
    return {name: torch.cat(values) for name, values in found.items() if values}


def _std(values: Tensor) -> float:
    judged = values[~values.isnan()]
    return judged.std().item() if len(judged) > 1 else 0.0
