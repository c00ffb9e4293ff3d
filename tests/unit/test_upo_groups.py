"""Groups of completions: which of them teach, which make a pair, and how they are dealt to batches."""

from __future__ import annotations

import math

import pytest
import torch

from ernie_align.stages.upo.groups import Group, find_filter_reason, select_pairs, split_into_batches, weighted_sum
from ernie_align.stages.upo.recipe import FilterBlock


def group(scores, rewards=None, length=1):
    """scores: one list for each completion, of each reward."""
    table = torch.tensor(scores, dtype=torch.float32)
    made = Group({}, "?", {}, "all", {}, [[1] * length for _ in scores], ["" for _ in scores], scores=table)
    made.rewards = weighted_sum(table, [1.0] * table.shape[1]) if rewards is None else torch.tensor(rewards)
    return made


def test_rewards_are_weighted_and_what_does_not_apply_adds_nothing():
    scores = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [math.nan, math.nan]])
    first, second, third = weighted_sum(scores, [1.0, 0.5]).tolist()
    assert (first, second) == (2.0, 1.0) and math.isnan(third)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([[1.0, 0.0], [1.0, 0.3]], "always_right"),
        ([[0.0, 0.0], [0.0, 0.3]], "always_wrong"),
        ([[0.5], [0.5]], "flat"),
        ([[0.0], [1.0]], None),
        ([[math.nan, 0.2], [math.nan, 0.9]], None),  # the verifier does not apply: nobody says what is right
        ([[math.nan], [1.0]], "always_right"),
        ([[math.nan], [0.5]], "flat"),  # one judged completion has nothing to be compared with
    ],
)
def test_groups_without_a_signal_are_left_out(scores, reason):
    assert find_filter_reason(group(scores), FilterBlock(), 0) == reason


def test_the_filter_does_what_it_is_told():
    right = group([[1.0, 0.0], [1.0, 0.3]])
    assert find_filter_reason(right, FilterBlock(always_right=False), 0) is None
    assert find_filter_reason(right, FilterBlock(always_right=False, min_group_std=0.3), 0) == "flat"
    assert find_filter_reason(right, FilterBlock(), 1) is None  # by the second reward, one of them is wrong


def test_pairs_are_ranked_by_the_sum_or_by_one_reward():
    made = group([[0.0, 5.0], [1.0, 0.0], [0.0, 0.0]])
    select_pairs(made, by=None, margin=0.0)
    assert made.pair == (0, 2)
    select_pairs(made, by=0, margin=0.0)
    assert made.pair == (1, 0)
    select_pairs(made, by=0, margin=1.0)
    assert made.pair is None
    made.left_out = "always_wrong"
    select_pairs(made, by=None, margin=0.0)
    assert made.pair is None


@pytest.mark.parametrize("batches", [1, 2, 3, 6])
def test_every_completion_is_dealt_once_and_pairs_stay_whole(batches):
    groups = [group([[0.0], [1.0], [0.5], [0.2]]) for _ in range(6)]
    for made in groups[:5]:
        select_pairs(made, by=None, margin=0.0)
    dealt = split_into_batches(groups, batches)
    assert {len(batch) for batch in dealt} == {24 // batches}
    assert {row for batch in dealt for row in batch} == {(made, place) for made in groups for place in range(4)}
    pairs = [sum(made.pair is not None and (made, made.pair[0]) in batch for made in groups) for batch in dealt]
    assert max(pairs) - min(pairs) <= 1 and sum(pairs) == 5
    for batch in dealt:
        for made, place in batch:
            if made.pair is not None and place in made.pair:
                assert all((made, side) in batch for side in made.pair)


def test_what_cannot_be_dealt_is_refused():
    with pytest.raises(ValueError, match="evenly"):
        split_into_batches([group([[0.0], [1.0], [0.5]])], 2)
    pair = group([[0.0], [1.0]])
    select_pairs(pair, by=None, margin=0.0)
    with pytest.raises(ValueError, match="whole pairs"):
        split_into_batches([pair], 2)
