"""The language model's head, where it is asked for the log-probabilities of labels: it sees no position without one.

Of a prompt, of an image and of padding nothing is trained, yet on a device without Triton TRL's fused head runs over
every position of a batch, and with a vocabulary of 103,424 that is most of what a small step costs. Here the backbone's
hidden states are gathered where a label is predicted before the head sees them, on every device alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ernie_align.data.render import IGNORE_INDEX

# of TRL's FusedCausalLMOutput, each (B, T - 1) or None
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@contextmanager
def select_hidden_states(backbone: nn.Module, places: Tensor) -> Iterator[None]:
    """While it lasts, the backbone's last hidden state is of these places among its B·T tokens: (*places.shape, H)."""

    def choose(module: nn.Module, args: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[places]
        return output

    handle = backbone.register_forward_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def score_positions(
    model: Callable[..., Any], backbone: nn.Module, places: Tensor, targets: Tensor, inputs: Mapping[str, Any]
) -> Any:
    """TRL's outputs of its fused head, each per-token field as wide as targets, and zero where a target is IGNORED.

    model: with that head, as it is called; backbone: its own, without what wraps it for many devices; places: where
    among the B·T tokens each target is predicted.
    """
    mask = targets != IGNORE_INDEX
    with select_hidden_states(backbone, places[mask][None]):
        outputs = model(**inputs, shift_labels=targets[mask][None], fused_lm_head=True)
    for name in _PER_TOKEN:
        values = getattr(outputs, name)
        if values is not None:
            # keeps its way back to the model where there is no target at all, too
            setattr(outputs, name, values.new_zeros(mask.shape).masked_scatter(mask, values))
    outputs.label_mask = mask
    return outputs


def fused_head_forward(model: Callable[..., Any], backbone: nn.Module) -> Callable[..., Any]:
    """`model` with TRL's fused head, for TRL to call: the same outputs. A call without labels is the model's own."""

    def forward(*, labels: Tensor | None = None, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if labels is None or not fused_lm_head:
            return model(**inputs, **({} if labels is None else {"labels": labels}))
        places = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        return score_positions(model, backbone, places[:, :-1], labels[:, 1:], inputs)

    return forward
