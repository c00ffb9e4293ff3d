"""Groups of completions: rewards, filter reasons and pairs, and how their completions are split into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import ernie_align.losses as losses

if TYPE_CHECKING:
    from ernie_align.stages.upo.recipe import FilterBlock


@dataclass(eq=False)  # compared and hashed by identity
class Group:
    """The G completions of one prompt.

    example: from PromptEncoder; prompt and columns: its JSON fields, decoded; domain: groups of one domain are
    normalized together; pixels: pixel_values and image_grid_thw of its images, empty without images; completion_ids:
    token ids of each completion, end token included; completions: the same as rewards receive them; sampled_logps:
    log-probs of the sampled tokens as vLLM computed them; scores (G, F): one column for each of F rewards, NaN where
    the reward does not apply; rewards (G,): their weighted sum; advantages (G,); extra: columns that rewards add to the
    completion log; filter_reason: why the group has zero advantage, None for an informative group; pair: indices of
    (best, worst).
    """

    example: dict[str, Any]
    prompt: Any
    columns: dict[str, Any]
    domain: str
    pixels: dict[str, Tensor]
    completion_ids: list[list[int]]
    completions: list[Any]
    sampled_logps: list[list[float | None]] | None = None
    scores: Tensor = field(init=False, repr=False)
    rewards: Tensor = field(init=False, repr=False)
    advantages: Tensor = field(init=False, repr=False)
    extra: dict[str, list[Any]] = field(init=False, repr=False)
    filter_reason: str | None = None
    pair: tuple[int, int] | None = None


Sample = tuple[Group, int]  # a group and the index of one of its completions


def set_rewards(
    groups: Sequence[Group], scores: Tensor, weights: Sequence[float], filters: FilterBlock, correctness: int
) -> None:
    """Set scores, rewards and filter reason of each group.

    scores (N, F): of all completions, group by group; weights: of the F rewards; correctness: index of the reward that
    decides which completions are right.
    """
    sizes = [len(group.completion_ids) for group in groups]
    rewards = weighted_sum(scores, weights).split(sizes)
    for group, group_scores, group_rewards in zip(groups, scores.split(sizes), rewards, strict=True):
        group.scores, group.rewards = group_scores, group_rewards
        group.filter_reason = find_filter_reason(group, filters, correctness)


def weighted_sum(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """(N, F) scores -> (N,) rewards. NaN scores count as 0; a row in which all scores are NaN gives NaN."""
    total = (scores * scores.new_tensor(weights)).nansum(dim=1)
    return total.masked_fill(scores.isnan().all(dim=1), torch.nan)


def find_filter_reason(group: Group, filters: FilterBlock, correctness: int) -> str | None:
    """Return why a group carries no training signal (always_right, always_wrong or flat), or None if it does.

    correctness: index of the reward that decides which completions are right.
    """
    right = group.scores[:, correctness]
    right = right[~right.isnan()]
    if len(right) and filters.always_right and bool((right >= 1).all()):
        return "always_right"
    if len(right) and filters.always_wrong and bool((right <= 0).all()):
        return "always_wrong"
    scored = group.rewards[~group.rewards.isnan()]
    if len(scored) < 2 or float(scored.std()) <= filters.min_group_std:
        return "flat"
    return None


def select_pairs(groups: Sequence[Group], *, by: int | None, margin: float) -> None:
    """Pair the best completion of each informative group with its worst.

    by: index of the reward that ranks the completions; None ranks by the weighted sum.
    """
    for group in groups:
        if group.filter_reason is None:
            ranked = group.rewards if by is None else group.scores[:, by]
            best, worst, is_pair = losses.best_and_worst(ranked[None], margin=margin)
            group.pair = (int(best), int(worst)) if bool(is_pair) else None


def split_into_batches(groups: Sequence[Group], batches: int) -> list[list[Sample]]:
    """Split all completions into lists of equal length, with the pairs spread evenly and never split.

    Raises ValueError if the completions do not divide evenly, or if a batch cannot hold its pairs.
    """
    samples = [(group, index) for group in groups for index in range(len(group.completion_ids))]
    size, remainder = divmod(len(samples), batches)
    if remainder:
        raise ValueError(f"{len(samples)} completions cannot be split evenly into {batches} batches")
    if batches == 1:
        return [samples]
    result: list[list[Sample]] = [[] for _ in range(batches)]
    paired = [group for group in groups if group.pair is not None]
    for number, group in enumerate(paired):
        result[number % batches] += [(group, index) for index in group.pair]
    if max(map(len, result)) > size:
        raise ValueError(f"batches of {size} cannot hold {len(paired)} whole pairs")
    unpaired = iter([sample for sample in samples if sample[0].pair is None or sample[1] not in sample[0].pair])
    for batch in result:
        batch += [next(unpaired) for _ in range(size - len(batch))]
    return result
