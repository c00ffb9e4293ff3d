"""Rollouts: sample completions of prompts, score them, and turn them into training batches.

They sit between TRL's generation and TRL's policy loss, and add what TRL does not have: prompts and images from our own
renderer, rewards normalized by domain, replacement of zero-advantage groups, and pairs that stay in one batch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

import ernie_align.losses as losses
from ernie_align.data import media
from ernie_align.data.collate import load_pixels, pad
from ernie_align.losses import compute_advantages
from ernie_align.models.image_cache import deduplicate_images
from ernie_align.models.routing import ModalityTokens, mm_token_type_ids, moe_mm_token_type_ids
from ernie_align.models.token_dispatch import count_expert_flips, record_expert_choices
from ernie_align.rewards import Reward
from ernie_align.rewards.reward import parse_completion
from ernie_align.stages.upo.completion_log import rollout_metrics
from ernie_align.stages.upo.groups import Group, Sample, select_pairs, set_rewards, split_into_batches
from ernie_align.stages.upo.recipe import UpoBlock

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import TrainerState
    from trl import GRPOConfig

    from ernie_align.data.render import Renderer

Metrics = MutableMapping[str, list[float]]
# token ids and, from vLLM, log-probs of each completion
Generated = tuple[list[list[int]], list[list[float | None]] | None]


@dataclass
class RolloutState:
    """The position in a rollout that lasts several steps, and the batches that are left of it on this rank.

    Checkpoints keep it, so that a resumed run learns from the same completions. (TRL samples new ones, from a newer
    policy.) step: micro-batches trained so far; batches: None if the rollout is used up; world_size: number of ranks.
    """

    step: int
    batches: list[dict[str, Any]] | None
    world_size: int

    def save(self, path: Path) -> None:
        """Write the state of this rank."""
        torch.save({"step": self.step, "batches": self.batches, "processes": self.world_size}, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> RolloutState:
        """Read a file that `save` wrote."""
        saved = torch.load(path, map_location=device, weights_only=True)
        return cls(saved["step"], saved["batches"], saved["processes"])


@dataclass(kw_only=True, eq=False)
class RolloutSampler:
    """Samples and scores completions for a trainer, which passes in everything that needs its model.

    block, config: the recipe's `upo` block and TRL's config; prompts: rows that replace zero-advantage groups; rewards:
    in the recipe's order; row_name: (source, row) -> name of the row, for errors; model: returns the unwrapped policy;
    generate: (prompts, PIL images for vLLM, model inputs, generations per prompt) -> completions; logps: (batch,
    reference=False) -> (B, C) log-probs of its completions.
    """

    block: UpoBlock
    config: GRPOConfig
    prompts: Dataset
    rewards: list[Reward]
    renderer: Renderer
    image_processor: Any
    row_name: Callable[[int, int], str]
    pad_token_id: int
    accelerator: Accelerator
    model: Callable[[], nn.Module]
    generate: Callable[[list[list[int]], list | None, dict[str, Any], int], Generated]
    logps: Callable[..., Tensor]

    def __post_init__(self) -> None:
        self.modality = ModalityTokens.from_config(self.model().config)
        self._stop_ids = set(self.renderer.stop_ids)
        self._scores_images = any("images" in reward.columns for reward in self.rewards)
        index = {reward.name: number for number, reward in enumerate(self.rewards)}
        self._correctness = index.get(self.block.filter.by, 0)
        self._ranked_by = index.get(self.block.pairs_by)

    def draw(
        self,
        examples: Sequence[dict[str, Any]],
        generations: int,
        *,
        state: TrainerState,
        metrics: Metrics,
        micro_step: int | None = None,
    ) -> list[Group]:
        """Return one group per prompt with rewards, advantages and pair. Call it in eval mode: training mode may
        disable the key-value cache.

        micro_step: index of the training batch within its optimizer step; None in evaluation, which replaces no group.
        """
        training = micro_step is not None
        compare = training and _is_logged_step(state)
        groups = self.sample(examples, generations, metrics=metrics if compare else None)
        self.score(groups, state, metrics)
        # Before any group is replaced: a mean over the groups that are left says little about the policy.
        for name, value in rollout_metrics(groups, self.rewards, self.renderer.stop_ids).items():
            metrics[name].append(value)
        if training:
            groups = self._replace_zero_advantage_groups(groups, state, metrics, micro_step)
        self._set_advantages(groups)
        select_pairs(groups, by=self._ranked_by, margin=self.block.pairs_margin)
        metrics["pairs/per_rollout"].append(sum(gather_object([group.pair is not None for group in groups])))
        return groups

    def sample(
        self, examples: Sequence[dict[str, Any]], generations: int, *, metrics: Metrics | None = None
    ) -> list[Group]:
        """Sample completions of each prompt. metrics: if given, also compare the rollout with a training forward."""
        pixels = [self._load_pixels(example) for example in examples]
        prompts, images, fields = self._generation_inputs(examples, pixels, generations)
        base = self.model()
        base = base.get_base_model() if hasattr(base, "peft_config") else base
        with (
            deduplicate_images(base),  # the completions of a group show the same images
            nullcontext({}) if metrics is None else record_expert_choices(base) as experts,
            nullcontext([]) if metrics is None else record_sampled_logps(base, self.block.temperature) as logps,
        ):
            ids, vllm_logps = self.generate(prompts, images, fields, generations)
        groups = []
        for number, example in enumerate(examples):
            of_group = slice(number * generations, (number + 1) * generations)
            columns = json.loads(example["columns"])
            by_column = self.block.domain_column
            group = Group(
                example=example,
                prompt=json.loads(example["prompt"]),
                columns=columns,
                domain=columns[by_column] if by_column else f"source {example['rows'][0]}",
                pixels=pixels[number],
                completion_ids=ids[of_group],
                completions=[self._as_completion(completion_ids, example) for completion_ids in ids[of_group]],
                sampled_logps=None if vllm_logps is None else vllm_logps[of_group],
            )
            groups.append(group)
        if logps or experts:
            self._compare_with_training(groups, logps, experts, metrics)
        return groups

    def _load_pixels(self, example: dict[str, Any]) -> dict[str, Tensor]:
        pixels = load_pixels([example], self.image_processor, self.row_name)
        return {name: values.to(self.accelerator.device) for name, values in pixels.items()}

    def _generation_inputs(
        self, examples: Sequence[dict[str, Any]], pixels: Sequence[dict[str, Tensor]], generations: int
    ) -> tuple[list[list[int]], list | None, dict[str, Any]]:
        """Return prompts, PIL images (for vLLM only) and model inputs, each prompt repeated `generations` times."""
        repeated = [number for number in range(len(examples)) for _ in range(generations)]
        prompts = [list(examples[number]["input_ids"]) for number in repeated]
        fields: dict[str, Any] = _concatenate_pixels([pixels[number] for number in repeated])
        if self.modality is not None:  # `generate` places the image features before it calls the backbone
            types = [mm_token_type_ids(torch.tensor(example["input_ids"]), self.modality) for example in examples]
            fields["mm_token_type_ids"] = [types[number].tolist() for number in repeated]
        images = None
        if self.config.use_vllm and "pixel_values" in fields:  # vLLM computes its own pixels
            loaded = [_load_images(example) or None for example in examples]
            images = [loaded[number] for number in repeated]
        return prompts, images, fields

    def decode(self, ids: list[int]) -> str:
        """Return the text of a completion without its stop token."""
        return self.renderer.tokenizer.decode([token for token in ids if token not in self._stop_ids])

    def _as_completion(self, ids: list[int], example: dict[str, Any]) -> Any:
        """Return a completion as rewards receive it: a list of messages for a conversation, otherwise a string."""
        text, is_conversation = self.decode(ids), example["prompt"].startswith("[")
        return [parse_completion(text, opened=example["opened"])] if is_conversation else text

    def score(self, groups: Sequence[Group], state: TrainerState, metrics: Metrics) -> None:
        """Call every reward on all completions of this rank; set scores, rewards and filter reason of each group."""
        samples = [(group, index) for group in groups for index in range(len(group.completion_ids))]
        names = dict.fromkeys(name for group in groups for name in group.columns)
        extra: dict[str, list[Any]] = {}
        arguments: dict[str, Any] = {
            **{name: [group.columns.get(name) for group, _ in samples] for name in names},
            "prompts": [group.prompt for group, _ in samples],
            "completions": [group.completions[index] for group, index in samples],
            "completion_ids": [group.completion_ids[index] for group, index in samples],
            "trainer_state": state,
            "log_metric": lambda name, value: metrics[name].append(value),
            "log_extra": lambda column, values: extra.update({column: list(values)}),
        }
        if self._scores_images:
            images = {group: _load_images(group.example) for group in groups}
            arguments["images"] = [images[group] for group, _ in samples]
        scores = [
            [float("nan") if score is None else score for score in reward(**arguments)] for reward in self.rewards
        ]
        table = torch.tensor(scores, dtype=torch.float32).T
        set_rewards(groups, table, [reward.weight for reward in self.rewards], self.block.filter, self._correctness)
        for group in groups:
            size = len(group.completion_ids)
            group.extra = {column: values[:size] for column, values in extra.items()}
            extra = {column: values[size:] for column, values in extra.items()}

    def _replace_zero_advantage_groups(
        self, groups: list[Group], state: TrainerState, metrics: Metrics, micro_step: int
    ) -> list[Group]:
        """Replace groups with a filter reason by groups of other prompts, in at most `filter.refills` rounds.

        If too few informative groups are found, filtered groups fill the rollout; they get no advantage and no pair.
        """
        wanted, drawn = len(groups), len(groups)
        informative = [group for group in groups if group.filter_reason is None]
        filtered = [group for group in groups if group.filter_reason is not None]
        for refill in range(self.block.filter.refills):
            missing = wanted - len(informative)
            if not max(gather_object([missing])):  # all ranks sample or none does: they may share the weights
                break
            examples = self._other_prompts(max(missing, 1), state, micro_step, refill)
            more = self.sample(examples, self.config.num_generations)
            self.score(more, state, metrics)
            drawn += len(more)
            informative += [group for group in more if group.filter_reason is None]
            filtered += [group for group in more if group.filter_reason is not None]
        reasons = gather_object([group.filter_reason for group in filtered])
        for reason in ("always_right", "always_wrong", "flat"):
            metrics[f"filter/{reason}"].append(reasons.count(reason))
        metrics["filter/drawn"].append(sum(gather_object([drawn])))
        metrics["filter/unfilled"].append(sum(gather_object([max(wanted - len(informative), 0)])))
        return (informative + filtered)[:wanted]

    def _other_prompts(self, count: int, state: TrainerState, micro_step: int, refill: int) -> list[dict[str, Any]]:
        """Draw prompts by seed and step alone, so that a resumed run draws the same ones."""
        key = (self.config.seed, state.global_step, micro_step, refill, self.accelerator.process_index)
        generator = random.Random(" ".join(map(str, key)))
        rows = generator.sample(range(len(self.prompts)), min(count, len(self.prompts)))
        return [self.prompts[row] for row in rows]

    def _set_advantages(self, groups: Sequence[Group]) -> None:
        """Set advantages from the rewards of all ranks: a domain is normalized over the whole rollout."""
        size = len(groups[0].completion_ids)
        gathered = gather_object([(group.rewards.tolist(), group.domain) for group in groups])
        first = self.accelerator.process_index * len(groups)
        rewards = torch.tensor([reward for values, _ in gathered for reward in values])
        numbers = torch.arange(len(gathered)).repeat_interleave(size)
        domains = [domain for values, domain in gathered for _ in values]
        advantages = compute_advantages(rewards, numbers, domains, normalize=self.block.normalize_rewards).split(size)
        for group, values in zip(groups, advantages[first : first + len(groups)], strict=True):
            group.advantages = values if group.filter_reason is None else torch.zeros_like(values)

    # -- batches ------------------------------------------------------------------------------------------------

    def make_batches(self, groups: Sequence[Group], count: int) -> list[dict[str, Any]]:
        """Return `count` batches for the loss. Each also has num_items_in_batch and pairs_of_rollout, the tokens and
        pairs of the whole rollout on all ranks, by which the sums of a batch are divided."""
        batches = [self._collate(samples) for samples in split_into_batches(groups, count)]
        tokens = sum(batch["completion_mask"].sum() for batch in batches)
        pairs = sum(group.pair is not None for group in groups)
        totals = self.accelerator.reduce(torch.stack([tokens, tokens.new_tensor(pairs)]), reduction="sum")
        for batch in batches:
            batch["num_items_in_batch"], batch["pairs_of_rollout"] = totals
        return batches

    def _collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the inputs of the loss: tokens, advantages, pairs (P, 2) and log-probs of other policies (B, C)."""
        inputs = self._pad(samples)
        device = self.accelerator.device
        inputs["advantages"] = torch.stack([group.advantages[index] for group, index in samples]).to(device)
        numbers = {sample: number for number, sample in enumerate(samples)}
        paired = [group for group in dict.fromkeys(group for group, _ in samples) if group.pair is not None]
        pairs = [[numbers[group, side] for side in group.pair] for group in paired if (group, group.pair[0]) in numbers]
        inputs["pairs"] = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2)
        inputs["rows"] = [tuple(group.example["rows"]) for group, _ in samples]
        if self.block.needs_reference:
            inputs["ref_per_token_logps"] = self.logps(inputs, reference=True)
        corrects_vllm = self.config.use_vllm and self.config.vllm_importance_sampling_correction
        batches_per_rollout = self.config.steps_per_generation * self.config.num_iterations
        # TRL's condition: the policy that learns from a completion is not always the policy that sampled it
        if corrects_vllm or self.config.gradient_accumulation_steps % batches_per_rollout:
            inputs["old_per_token_logps"] = self.logps(inputs)
        if corrects_vllm:
            inputs["importance_sampling_ratio"] = self._vllm_ratio(samples, inputs)
        return inputs

    def _pad(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return TRL's inputs for B completions: prompts padded on the left, completions on the right."""
        prompts = [list(group.example["input_ids"]) for group, _ in samples]
        completions = [group.completion_ids[index] for group, index in samples]
        trained = [not self.config.mask_truncated_completions or ids[-1] in self._stop_ids for ids in completions]
        masks = [[int(is_trained)] * len(ids) for is_trained, ids in zip(trained, completions, strict=True)]
        inputs: dict[str, Any] = {
            "prompt_ids": pad(prompts, self.pad_token_id, left=True),
            "prompt_mask": pad([[1] * len(ids) for ids in prompts], 0, left=True),
            "completion_ids": pad(completions, self.pad_token_id),
            "completion_mask": pad(masks, 0),
            **_concatenate_pixels([group.pixels for group, _ in samples]),
        }
        inputs = {name: values.to(self.accelerator.device) for name, values in inputs.items()}
        if "pixel_values" in inputs:
            inputs["num_images"] = [len(group.pixels.get("image_grid_thw", ())) for group, _ in samples]
        return inputs

    def _vllm_ratio(self, samples: Sequence[Sample], inputs: Mapping[str, Any]) -> Tensor:
        """Return the ratio of the policy's probability of each token to vLLM's, clipped as TRL's keys say."""
        policy, mask = inputs["old_per_token_logps"], inputs["completion_mask"]
        sampled = torch.full_like(policy, torch.nan)  # NaN where vLLM returned none
        for number, (group, index) in enumerate(samples):
            logps = [torch.nan if logp is None else logp for logp in group.sampled_logps[index]]
            sampled[number, : len(logps)] = torch.tensor(logps, device=policy.device)
        level, _, cut = self.config.vllm_importance_sampling_mode.partition("_")
        low, high = self.config.vllm_importance_sampling_clip_min, self.config.vllm_importance_sampling_clip_max
        return losses.mismatch_ratio(policy, sampled, mask, per=level, cut=cut, low=low, high=high)

    def _compare_with_training(
        self, groups: list[Group], drawn: list[Tensor], experts: dict[str, list[Tensor]], metrics: Metrics
    ) -> None:
        """Compare the rollout with the training forward: log-probs of the sampled tokens, and experts of each token."""
        inputs = self._pad([(group, index) for group in groups for index in range(len(group.completion_ids))])
        with record_expert_choices(self.model()) as again:
            logps = self.logps(inputs)
        if drawn:
            sampled = torch.stack(drawn, dim=1)[:, : logps.shape[1]]
            mask = inputs["completion_mask"][:, : sampled.shape[1]]
            difference = (logps[:, : sampled.shape[1]] - sampled).abs() * mask
            metrics["rollout/logps_apart"].append(difference.max().item())
        if experts:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
            vision = torch.zeros_like(ids) if self.modality is None else moe_mm_token_type_ids(ids, self.modality)
            trained = {name.removeprefix("base_model.model."): chosen for name, chosen in again.items()}
            for pool, (flipped, total) in count_expert_flips(experts, trained, real=real, vision=vision.bool()).items():
                metrics[f"routing/flips_{pool}"].append(flipped / max(total, 1))


@contextmanager
def record_sampled_logps(model: nn.Module, temperature: float) -> Iterator[list[Tensor]]:
    """Record the log-probs of the tokens that `generate` samples in this context: (B,) for each token but the last.

    They are of the distribution at `temperature` before tokens are suppressed or cut off by top-p, which is what the
    loss recomputes. The log-prob of a token is known one forward later, when the token is the input.
    """
    sampled: list[Tensor] = []
    latest: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if latest:
            inputs = kwargs["input_ids"][:, -1:]
            sampled.append(latest.pop().gather(-1, inputs).squeeze(-1))
        latest.append(torch.log_softmax(output.logits[:, -1].float() / temperature, dim=-1))

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield sampled
    finally:
        handle.remove()


def _is_logged_step(state: TrainerState) -> bool:
    step = state.global_step + 1
    return step == 1 or (state.logging_steps > 0 and step % state.logging_steps == 0)


def _load_images(example: dict[str, Any]) -> list[Any]:
    return [media.load_image(image) for image in example["media"]]


def _concatenate_pixels(pixels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return pixel_values and image_grid_thw of several rows, or {} if no row has an image."""
    names = ("pixel_values", "image_grid_thw")
    columns = {name: [row[name] for row in pixels if name in row] for name in names}
    return {name: torch.cat(values) for name, values in columns.items() if values}
