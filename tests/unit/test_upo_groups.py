"""Groups of completions: filter reasons, pairs, and how completions are split into batches."""

from __future__ import annotations

import math

import pytest
import torch

from ernie_align.stages.upo.groups import (
    Group,
    find_filter_reason,
    select_pairs,
    set_rewards,
    split_into_batches,
    weighted_sum,
)
from ernie_align.stages.upo.recipe import FilterBlock


def group(scores, length=1):
    """Make a group. scores: for each completion, the scores of each reward."""
    made = Group({}, "?", {}, "all", {}, [[1] * length for _ in scores], ["" for _ in scores])
    table = torch.tensor(scores, dtype=torch.float32)
    set_rewards([made], table, [1.0] * table.shape[1], FilterBlock(), 0)
    made.filter_reason = None
    return made


def test_rewards_are_weighted_and_inapplicable_scores_add_nothing():
    scores = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [math.nan, math.nan]])
    first, second, third = weighted_sum(scores, [1.0, 0.5]).tolist()
    assert (first, second) == (2.0, 1.0) and math.isnan(third)


def test_each_group_gets_its_own_scores_rewards_and_filter_reason():
    first, second = group([[0.0], [0.0]]), group([[0.0], [0.0], [0.0]])
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.5]])
    set_rewards([first, second], scores, [1.0, 0.5], FilterBlock(), 0)
    assert first.rewards.tolist() == [0.5, 1.0] and second.rewards.tolist() == [1.5, 1.0, 1.25]
    assert second.scores.tolist() == scores[2:].tolist()
    assert (first.filter_reason, second.filter_reason) == (None, "always_right")


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([[1.0, 0.0], [1.0, 0.3]], "always_right"),
        ([[0.0, 0.0], [0.0, 0.3]], "always_wrong"),
        ([[0.5], [0.5]], "flat"),
        ([[0.0], [1.0]], None),
        ([[math.nan, 0.2], [math.nan, 0.9]], None),  # the verifier does not apply: no completion is known to be right
        ([[math.nan], [1.0]], "always_right"),
        ([[math.nan], [0.5]], "flat"),  # a single scored completion cannot be compared
    ],
)
def test_groups_without_a_signal_have_a_filter_reason(scores, reason):
    assert find_filter_reason(group(scores), FilterBlock(), 0) == reason


def test_filters_can_be_switched_off():
    right = group([[1.0, 0.0], [1.0, 0.3]])
    assert find_filter_reason(right, FilterBlock(always_right=False), 0) is None
    assert find_filter_reason(right, FilterBlock(always_right=False, min_group_std=0.3), 0) == "flat"
    assert find_filter_reason(right, FilterBlock(), 1) is None  # by the second reward, one of them is wrong


def test_pairs_are_ranked_by_the_sum_or_by_one_reward():
    made = group([[0.0, 5.0], [1.0, 0.0], [0.0, 0.0]])
    select_pairs([made], by=None, margin=0.0)
    assert made.pair == (0, 2)
    select_pairs([made], by=0, margin=0.0)
    assert made.pair == (1, 0)
    select_pairs([made], by=0, margin=1.0)
    assert made.pair is None
    made.pair, made.filter_reason = None, "always_wrong"
    select_pairs([made], by=None, margin=0.0)
    assert made.pair is None


@pytest.mark.parametrize("batches", [1, 2, 3, 6])
def test_every_completion_is_in_one_batch_and_pairs_stay_whole(batches):
    groups = [group([[0.0], [1.0], [0.5], [0.2]]) for _ in range(6)]
    select_pairs(groups[:5], by=None, margin=0.0)
    split = split_into_batches(groups, batches)
    assert {len(batch) for batch in split} == {24 // batches}
    assert {row for batch in split for row in batch} == {(made, index) for made in groups for index in range(4)}
    pairs = [sum(made.pair is not None and (made, made.pair[0]) in batch for made in groups) for batch in split]
    assert max(pairs) - min(pairs) <= 1 and sum(pairs) == 5
    for batch in split:
        for made, index in batch:
            if made.pair is not None and index in made.pair:
                assert all((made, side) in batch for side in made.pair)


def test_uneven_splits_and_split_pairs_are_errors():
    with pytest.raises(ValueError, match="evenly"):
        split_into_batches([group([[0.0], [1.0], [0.5]])], 2)
    pair = group([[0.0], [1.0]])
    select_pairs([pair], by=None, margin=0.0)
    with pytest.raises(ValueError, match="whole pairs"):
        split_into_batches([pair], 2)
