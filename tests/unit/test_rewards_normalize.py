"""Advantages: TRL's own to the last bit where TRL has them, and never a NaN."""

from __future__ import annotations

import pytest
import torch

from ernie_align.losses import compute_advantages

NAN = float("nan")


def test_group_by_hand():
    """Group 0: 1, 3; mean 2, std √2. Group 1: 0, 0; no spread, no signal."""
    found = compute_advantages(
        torch.tensor([1.0, 3, 0, 0]), torch.tensor([0, 0, 1, 1]), ["a"] * 4, normalize="group", eps=0.0
    )
    assert torch.allclose(found[:2], torch.tensor([-1.0, 1.0]) / 2**0.5) and found[2:].tolist() == [0, 0]
    raw = compute_advantages(torch.tensor([1.0, 3, 0, 0]), torch.tensor([0, 0, 1, 1]), ["a"] * 4, normalize="none")
    assert raw.tolist() == [-1, 1, 0, 0]


def trl(rewards, generations, scale):
    """The lines of GRPOTrainer._generate_and_score_completions."""
    from trl.trainer.utils import nanstd

    grouped = rewards.view(-1, generations)
    mean = torch.nanmean(grouped, dim=1).repeat_interleave(generations, dim=0)
    centered = rewards - mean
    if scale == "group":
        centered = centered / (nanstd(grouped, dim=1).repeat_interleave(generations, dim=0) + 1e-4)
    return torch.nan_to_num(centered, nan=0.0)


@pytest.mark.parametrize("normalize", ["group", "none"])
@pytest.mark.parametrize("generations", [2, 7, 8, 16])
def test_equal_to_trl_to_the_last_bit(normalize, generations):
    torch.manual_seed(0)
    rewards = torch.rand(12 * generations)
    rewards[3], rewards[-generations:], rewards[generations : 2 * generations] = NAN, NAN, 0.1
    rewards[2 * generations : 3 * generations - 1] = NAN
    groups = torch.arange(12).repeat_interleave(generations)
    assert torch.equal(
        compute_advantages(rewards, groups, ["x"] * len(rewards), normalize=normalize),
        trl(rewards, generations, normalize),
    )


def test_domains_are_scaled_each_on_its_own():
    """A domain that pays in hundreds weighs no more than one that pays in ones; a reward's scale cancels."""
    rewards = torch.tensor([0.0, 1, 1, 1, 0, 100, 100, 100])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    found = compute_advantages(rewards, groups, ["ones"] * 4 + ["hundreds"] * 4, normalize="per_domain", eps=0.0)
    assert torch.allclose(found[:4], found[4:])
    # 0, 1, 1, 1: mean 3/4, unbiased variance (9/16 + 3/16) / 3 = 1/4, std 1/2; group 0 lies 1/2 around its mean
    assert torch.allclose(found[:4], torch.tensor([-1.0, 1, 0, 0]))


def test_per_domain_is_the_z_score_of_the_domain_less_the_mean_of_the_group():
    torch.manual_seed(0)
    rewards, groups = torch.rand(12), torch.arange(6).repeat_interleave(2)
    domains = ["a"] * 4 + ["b"] * 8
    z = torch.cat([(part - part.mean()) / (part.std() + 1e-4) for part in (rewards[:4], rewards[4:])])
    expected = z - z.view(-1, 2).mean(dim=1).repeat_interleave(2)
    assert torch.allclose(compute_advantages(rewards, groups, domains, normalize="per_domain"), expected, atol=1e-6)


@pytest.mark.parametrize("normalize", ["per_domain", "group", "none"])
def test_there_is_always_a_number(normalize):
    rewards = torch.tensor([0.5, NAN, NAN, NAN, 1.0, 1.0, 0.25])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    domains = ["one", "one", "none", "none", "flat", "flat", "single"]
    assert compute_advantages(rewards, groups, domains, normalize=normalize).tolist() == [0.0] * 7


def test_the_order_of_completions_does_not_matter():
    torch.manual_seed(0)
    rewards, groups = torch.rand(12), torch.arange(4).repeat_interleave(3)
    order = torch.randperm(12)
    for normalize in ("group", "per_domain", "none"):
        straight = compute_advantages(rewards, groups, ["a"] * 12, normalize=normalize)
        assert torch.allclose(
            compute_advantages(rewards[order], groups[order], ["a"] * 12, normalize=normalize), straight[order]
        )
