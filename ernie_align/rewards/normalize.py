"""Compute advantages from rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def compute_advantages(
    rewards: Tensor,
    groups: Tensor,
    domains: Sequence[str],
    *,
    normalize: Literal["per_domain", "group", "none"],
    eps: float = 1e-4,
) -> Tensor:
    """Compute by how much each completion is better than the others of its prompt.

    rewards (N,) float, NaN where no reward applied; groups (N,) int, equal for the completions of one prompt; domains:
    N names -> (N,), 0 where the reward is NaN.

    A = r - mean(group)                          none
    A = (r - mean(group)) / (std(group) + eps)   group: TRL's GRPOTrainer with scale_rewards="group"
    A = (r - mean(group)) / (std(domain) + eps)  per_domain

    The last one is our reading of "rewards are normalized per domain, at each iteration", which is all that is
    published about ERNIE 4.5: z = (r - mean(domain)) / (std(domain) + eps) over this batch, and A = z - mean_group(z).
    A group belongs to one domain, so the domain's mean cancels. Standard deviations are unbiased (n - 1), and 0 for a
    single reward.
    """
    mean, std = _moments(rewards, groups)
    if normalize == "none":
        return (rewards - mean).nan_to_num(nan=0.0)
    if normalize == "per_domain":
        names = {name: number for number, name in enumerate(dict.fromkeys(domains))}
        _, std = _moments(rewards, torch.tensor([names[name] for name in domains], device=rewards.device))
    return ((rewards - mean) / (std + eps)).nan_to_num(nan=0.0)


def _moments(rewards: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
    """rewards (N,), sets (N,) int -> mean and std over each reward's set, both (N,); NaN rewards are ignored.

    The table has one row for each set, padded with NaN to the longest. With sets of equal size its rows are TRL's, and
    the sums run in TRL's order, so that the results are bit-identical.
    """
    _, row, sizes = sets.unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row[order]]
    table = rewards.new_full((len(sizes), int(sizes.max())), torch.nan)
    table[row, column] = rewards
    count = (~table.isnan()).sum(dim=1, keepdim=True)
    mean = table.nanmean(dim=1, keepdim=True)
    variance = ((table - mean) ** 2).nanmean(dim=1, keepdim=True) * (count / (count - 1))
    std = torch.where(count > 1, variance, 0.0).sqrt()
    return mean[row, 0], std[row, 0]
