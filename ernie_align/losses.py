"""Losses as pure functions of tensors.

Shapes: B rows, T tokens, V vocabulary, P pairs, G generations per prompt. The log-probability of a sequence is the sum
over its trained tokens; a log-ratio is log π(y|x) - log π_ref(y|x). y_w is the chosen answer of a pair, y_l the
rejected one; s is the sigmoid.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Log-probability of each label given the tokens before it.

    logits (B, T, V), labels (B, T) with ignore_index at untrained positions -> (B, T - 1) float32, 0 at those.
    """
    shifted = labels[:, 1:]
    logps = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    chosen = logps.gather(-1, shifted.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(shifted == ignore_index, 0.0)


def length_normalized(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale both log-probabilities as if each answer had their mean length. All (P,); lengths in trained tokens.

    log π(y) · L / |y|, L = (|y_w| + |y_l|) / 2
    The official ERNIE toolkit calls this normalize_logps, and has it on by default.
    """
    mean = (chosen_lengths + rejected_lengths) / 2
    return chosen_logps * mean / chosen_lengths, rejected_logps * mean / rejected_lengths


def dpo_sigmoid(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """DPO loss: (P,) log-ratios -> (P,).

    -log s(β · (ratio_w - ratio_l))
    Rafailov et al. (2023), Direct Preference Optimization, eq. 7. https://arxiv.org/abs/2305.18290
    """
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


def simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
) -> Tensor:
    """SimPO loss: (P,) log-probabilities of the policy and lengths in trained tokens -> (P,). Needs no reference.

    -log s(β · log π(y_w) / |y_w| - β · log π(y_l) / |y_l| - gamma)
    Meng et al. (2024), SimPO, eq. 6. https://arxiv.org/abs/2405.14734
    """
    return -F.logsigmoid(beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - gamma)


def dpop(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, lambda_: float) -> Tensor:
    """DPO-positive loss: (P,) log-ratios -> (P,). DPO with a penalty if the chosen answer becomes less likely.

    -log s(β · (ratio_w - ratio_l - λ · max(0, -ratio_w)))
    Pal et al. (2024), Smaug: fixing failure modes of preference optimisation with DPO-positive, eq. 3.
    https://arxiv.org/abs/2402.13228
    """
    penalty = torch.relu(-chosen_logratios)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - lambda_ * penalty))


def clipped_policy(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float
) -> Tensor:
    """PPO's clipped policy loss: (B, T) log-probs now and when sampled, (B,) advantages, (B, T) mask -> ().

    mean over tokens of -min(r · A, clip(r, 1 - low, 1 + high) · A), r = π / π_old
    Schulman et al. (2017), Proximal Policy Optimization, eq. 7, https://arxiv.org/abs/1707.06347; separate bounds and
    the mean over all tokens of the batch as in Yu et al. (2025), DAPO, https://arxiv.org/abs/2503.14476.
    """
    ratio = torch.exp(logps - old_logps)
    objective = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - low, 1 + high) * advantages[:, None])
    return -(objective * mask).sum() / mask.sum().clamp(min=1)


def best_and_worst(rewards: Tensor, *, margin: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Select a pair in each group: (P, G) rewards -> index of the best (P,), of the worst (P,), and is_pair (P,) bool.

    is_pair is False unless the best is more than `margin` above the worst. NaN (no reward scored the completion) is
    neither best nor worst. Of equal rewards the first one is selected.
    """
    unscored = rewards.isnan()
    best = rewards.masked_fill(unscored, -torch.inf).argmax(dim=1)
    worst = rewards.masked_fill(unscored, torch.inf).argmin(dim=1)
    rows = torch.arange(len(rewards), device=rewards.device)
    return best, worst, rewards[rows, best] - rewards[rows, worst] > margin


def mismatch_ratio(
    logps: Tensor,
    sampled_logps: Tensor,
    mask: Tensor,
    *,
    per: Literal["token", "sequence"],
    cut: Literal["truncate", "mask"],
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Importance weight of each token that another engine sampled, as in TRL.

    logps, sampled_logps, mask (B, T), NaN if the engine returned none -> (B, T), or (B, 1) per sequence.

    r = π / π_sampled of the token, or of the whole sequence; truncate: clip r to [low, high]; mask: 0 outside of it
    Truncation: Yao et al. (2025), Your efficient RL framework secretly brings you off-policy training; masking tokens
    at both ends is known as IcePop, which the card of ERNIE-4.5-VL-28B-A3B-Thinking names.
    """
    difference = ((logps - sampled_logps) * mask).nan_to_num(nan=0.0)
    ratio = torch.exp(difference.sum(dim=1, keepdim=True) if per == "sequence" else difference)
    if cut == "truncate":
        return ratio.clamp(low, high)
    outside = (ratio < (-torch.inf if low is None else low)) | (ratio > (torch.inf if high is None else high))
    return ratio.masked_fill(outside, 0.0)
