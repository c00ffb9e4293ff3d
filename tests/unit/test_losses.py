"""Losses against values computed on paper."""

from __future__ import annotations

import math

import pytest
import torch

from ernie_align import losses

# One pair, small enough for paper: log-ratios 0.5 and -0.25, lengths 2 and 4, log-probabilities -1 and -6.
CHOSEN, REJECTED = torch.tensor([0.5]), torch.tensor([-0.25])
LONG, SHORT = torch.tensor([4]), torch.tensor([2])
LOGP_CHOSEN, LOGP_REJECTED = torch.tensor([-1.0]), torch.tensor([-6.0])


def log_sigmoid(value: float) -> float:
    return -math.log(1 + math.exp(-value))


def test_dpo_sigmoid():
    """β (0.5 + 0.25) = 0.075"""
    assert losses.dpo_sigmoid(CHOSEN, REJECTED, beta=0.1).item() == pytest.approx(-log_sigmoid(0.075))


def test_dpo_of_equal_ratios_is_log_two():
    assert losses.dpo_sigmoid(CHOSEN, CHOSEN, beta=0.1).item() == pytest.approx(math.log(2), abs=1e-7)


def test_simpo():
    """2 · (-1 / 2 + 6 / 4) - 0.5 = 1.5"""
    found = losses.simpo(LOGP_CHOSEN, LOGP_REJECTED, SHORT, LONG, beta=2.0, gamma=0.5).item()
    assert found == pytest.approx(-log_sigmoid(1.5))


def test_dpop_penalizes_a_chosen_answer_that_became_less_likely():
    """A ratio of 0.5 has no penalty. One of -0.5 with λ 2 costs 1: 0.1 · (-0.5 + 0.25 - 1) = -0.125"""
    unpenalized = losses.dpop(CHOSEN, REJECTED, beta=0.1, lambda_=2.0)
    assert unpenalized.item() == losses.dpo_sigmoid(CHOSEN, REJECTED, beta=0.1).item()
    penalized = losses.dpop(-CHOSEN, REJECTED, beta=0.1, lambda_=2.0).item()
    assert penalized == pytest.approx(-log_sigmoid(-0.125))


def test_length_normalized():
    """Mean length 3: -1 · 3 / 2, -6 · 3 / 4"""
    chosen, rejected = losses.length_normalized(LOGP_CHOSEN, LOGP_REJECTED, SHORT, LONG)
    assert (chosen.item(), rejected.item()) == (-1.5, -4.5)


def test_token_logps_skip_ignored_labels():
    """Two tokens with equal logits have probability one half each."""
    found = losses.token_logps(torch.zeros(1, 3, 2), torch.tensor([[0, -100, 1]]))
    assert found.tolist() == [[0.0, pytest.approx(math.log(0.5))]]


def test_clipped_policy():
    """Ratios 1.5, 0.5 | 1, and one token masked. A = 2: min(3, 1.2 · 2) and min(1, 1.6) | A = -1: min(-1, -1)."""
    old = torch.tensor([[0.0, 0.0], [-1.0, -1.0]])
    logps = old + torch.tensor([[1.5, 0.5], [1.0, 7.0]]).log()
    mask = torch.tensor([[1, 1], [1, 0]])
    found = losses.clipped_policy(logps, old, torch.tensor([2.0, -1.0]), mask, low=0.2, high=0.2)
    assert found.item() == pytest.approx(-(2.4 + 1.0 - 1.0) / 3)


def test_a_bad_token_that_became_likelier_is_not_clipped():
    """Ratio 1.5, A = -1: min(-1.5, -1.2) keeps the gradient that lowers it."""
    logps = torch.tensor([[math.log(1.5)]], requires_grad=True)
    found = losses.clipped_policy(logps, torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1), low=0.2, high=0.2)
    found.backward()
    assert (found.item(), logps.grad.item()) == (pytest.approx(1.5), pytest.approx(1.5))


def test_best_and_worst_of_groups():
    nan = math.nan
    rewards = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3], [nan, 0.2, 0.9], [nan, nan, nan], [0.0, 0.1, 0.1]])
    best, worst, pairs = losses.best_and_worst(rewards)
    assert pairs.tolist() == [True, False, True, False, True]
    assert best[pairs].tolist() == [1, 2, 1] and worst[pairs].tolist() == [0, 1, 0]
    assert losses.best_and_worst(rewards, margin=0.5)[2].tolist() == [True, False, True, False, False]


def test_mismatch_ratio():
    """Ratios 2, 1/2 and one unknown token; the ratio of the sequence is their product."""
    here = torch.tensor([[0.0, 0.0, 0.0, 5.0]])
    there = torch.tensor([[-math.log(2), math.log(2), math.nan, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0]])

    def found(per, cut, **bounds):
        return losses.mismatch_ratio(here, there, mask, per=per, cut=cut, **bounds)[0].tolist()

    assert found("token", "truncate", high=1.5) == pytest.approx([1.5, 0.5, 1.0, 1.0])
    assert found("token", "mask", low=0.6, high=3.0) == pytest.approx([2.0, 0.0, 1.0, 1.0])
    assert found("sequence", "truncate", high=3.0) == pytest.approx([1.0])
