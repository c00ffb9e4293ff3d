"""TRL's fused LM head, computed at labeled positions only.

Prompts, images and padding have no labels, but on a device without Triton TRL's fused head runs over every position of
a batch, and with a vocabulary of 103,424 that is most of the cost of a small step. Here the backbone's hidden states
are gathered at the positions that predict a label before the head receives them, on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ernie_align.data.render import IGNORE_INDEX

# fields of TRL's FusedCausalLMOutput, each (B, T - 1) or None
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@contextmanager
def select_hidden_states(backbone: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within the context, the backbone's last hidden state is that of these B·T positions: (*positions.shape, H)."""

    def select(module: nn.Module, args: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[positions]
        return output

    with backbone.register_forward_hook(select):
        yield


def score_positions(
    model: Callable[..., Any], backbone: nn.Module, positions: Tensor, targets: Tensor, inputs: Mapping[str, Any]
) -> Any:
    """Return the outputs of TRL's fused head, per-token fields shaped like targets and 0 where these are IGNORE_INDEX.

    model: has that head, and is called; backbone: the model's own, without its distributed wrapper; positions: the
    position among the B·T tokens that predicts each target.
    """
    mask = targets != IGNORE_INDEX
    with select_hidden_states(backbone, positions[mask][None]):
        outputs = model(**inputs, shift_labels=targets[mask][None], fused_lm_head=True)
    for name in _PER_TOKEN:
        values = getattr(outputs, name)
        if values is not None:
            # stays connected to the model's graph even if there is no target
            setattr(outputs, name, values.new_zeros(mask.shape).masked_scatter(mask, values))
    outputs.label_mask = mask
    return outputs


def fused_head_forward(model: Callable[..., Any], backbone: nn.Module) -> Callable[..., Any]:
    """Wrap `model` for TRL to call: same outputs, with the fused head at labeled positions only.

    A call without labels or without fused_lm_head is passed to the model unchanged.
    """

    def forward(*, labels: Tensor | None = None, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if labels is None or not fused_lm_head:
            return model(**inputs, **({} if labels is None else {"labels": labels}))
        positions = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        return score_positions(model, backbone, positions[:, :-1], labels[:, 1:], inputs)

    return forward
