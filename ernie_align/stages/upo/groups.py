"""Groups of completions: what they earned, which of them teach something, and how they are dealt to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ernie_align import losses

if TYPE_CHECKING:
    from torch import nn

    from ernie_align.stages.upo.recipe import FilterBlock


@dataclass(eq=False)  # a group is itself
class Group:
    """The G completions of one prompt.

    example: of PromptEncoder; columns: of its row; domain: whose rewards it is normalized with; pixels: pixel_values
    and image_grid_thw of its images, or nothing; ids: token ids of each completion, its end token included;
    completions: as rewards see them; scores (G, F): of each of F rewards, NaN where it does not apply; rewards (G,):
    their weighted sum; advantages (G,); sampled: log-probabilities that another engine drew the tokens with; extra:
    what rewards want kept beside the completions; left_out: why the group teaches nothing, if so; pair: (best, worst).
    """

    example: dict[str, Any]
    prompt: Any
    columns: dict[str, Any]
    domain: str
    pixels: dict[str, Tensor]
    ids: list[list[int]]
    completions: list[Any]
    scores: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    sampled: list[list[float | None]] | None = None
    extra: dict[str, list[Any]] = field(default_factory=dict)
    left_out: str | None = None
    pair: tuple[int, int] | None = None


def weighted_sum(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """(N, F) scores -> (N,) rewards; a reward that does not apply (NaN) adds nothing, and where none does it is NaN."""
    total = (scores * scores.new_tensor(weights)).nansum(dim=1)
    return total.masked_fill(scores.isnan().all(dim=1), torch.nan)


def find_filter_reason(group: Group, block: FilterBlock, verifier: int) -> str | None:
    """Why a group gives no signal, or None. verifier: place of the reward that says what is right."""
    right = group.scores[:, verifier]
    right = right[~right.isnan()]
    if len(right) and block.always_right and bool((right >= 1).all()):
        return "always_right"
    if len(right) and block.always_wrong and bool((right <= 0).all()):
        return "always_wrong"
    judged = group.rewards[~group.rewards.isnan()]
    if len(judged) < 2 or float(judged.std()) <= block.min_group_std:
        return "flat"
    return None


def select_pairs(group: Group, *, by: int | None, margin: float) -> None:
    """Best against worst of a group that teaches something. by: place of the reward that ranks; None: their sum."""
    if group.left_out is None:
        ranked = group.rewards if by is None else group.scores[:, by]
        best, worst, is_pair = losses.best_and_worst(ranked[None], margin=margin)
        group.pair = (int(best), int(worst)) if bool(is_pair) else None


def split_into_batches(groups: Sequence[Group], batches: int) -> list[list[tuple[Group, int]]]:
    """Completions -> `batches` lists of equal length, pairs evenly among them and each pair whole in one.

    Raises ValueError where the completions do not go round, or where a pair would be torn.
    """
    singles = [(group, place) for group in groups for place in range(len(group.ids))]
    size, rest = divmod(len(singles), batches)
    if rest:
        raise ValueError(f"{len(singles)} completions cannot be dealt evenly to {batches} batches")
    if batches == 1:
        return [singles]
    dealt: list[list[tuple[Group, int]]] = [[] for _ in range(batches)]
    paired = [group for group in groups if group.pair is not None]
    for number, group in enumerate(paired):
        dealt[number % batches] += [(group, place) for place in group.pair]
    if max(map(len, dealt)) > size:
        raise ValueError(f"batches of {size} cannot hold {len(paired)} whole pairs")
    left = iter([row for row in singles if row[0].pair is None or row[1] not in row[0].pair])
    for batch in dealt:
        batch += [next(left) for _ in range(size - len(batch))]
    return dealt


@contextmanager
def sampled_logps(model: nn.Module, temperature: float) -> Iterator[list[Tensor]]:
    """Log-probabilities of the tokens that `generate` draws while the context lasts: (B,) for each but the last token.

    Under the distribution at `temperature`, before any token is forbidden or cut off by top-p: the loss recomputes it.
    Each is known one forward later, when the token is fed.
    """
    drawn: list[Tensor] = []
    latest: list[Tensor] = []

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if latest:
            fed = kwargs["input_ids"][:, -1:]
            drawn.append(latest.pop().gather(-1, fed).squeeze(-1))
        latest.append(torch.log_softmax(output.logits[:, -1].float() / temperature, dim=-1))

    handle = model.register_forward_hook(take, with_kwargs=True)
    try:
        yield drawn
    finally:
        handle.remove()
