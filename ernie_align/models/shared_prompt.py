"""One prompt and two answers in one row: who sees whom, where each token stands, and where an answer is read.

A row is [prompt | chosen | rejected | padding]. Each answer sees the prompt and itself and stands where it would stand
behind the prompt alone, so every token is what it is in a row of its own. Shapes: P pairs, T tokens, C tokens of the
longest answer; `parts` (P, 3) holds the lengths of prompt, chosen and rejected.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ernie_align.models.modality import ModalityTokens, mm_token_type_ids

_PROMPT, _CHOSEN, _REJECTED, _PADDING = range(4)


def part_of_each(parts: Tensor, width: int) -> Tensor:
    """(P, T): which part each token belongs to."""
    place = torch.arange(width, device=parts.device)
    return (place[None, :, None] >= parts.cumsum(dim=1)[:, None, :]).sum(dim=-1)


def attention_mask(parts: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(P, 1, T, T): 0 where a token is seen, the least number of `dtype` where it is not.

    Numbers, which are added to attention scores: transformers' eager attention adds booleans too, as 0 and 1.
    Padding sees padding, as no row of scores may be empty.
    """
    part = part_of_each(parts, width)
    here, there = part[:, :, None], part[:, None, :]
    seen = (here == there) | ((there == _PROMPT) & (here != _PADDING))
    seen = seen & torch.ones(width, width, dtype=torch.bool, device=parts.device).tril()
    hidden = torch.zeros(seen.shape, dtype=dtype, device=parts.device)
    return hidden.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def position_ids(backbone: nn.Module, input_ids: Tensor, parts: Tensor, image_grid_thw: Tensor | None) -> Tensor:
    """(P, T), or (3, P, T) with images: the rejected answer begins where the chosen one does.

    image_grid_thw: of the images of each row in turn.
    """
    width = input_ids.shape[1]
    part = part_of_each(parts, width)
    place = torch.arange(width, device=input_ids.device).expand_as(part)
    restarted = place - parts[:, 1:2] * (part == _REJECTED)
    if image_grid_thw is None:
        return restarted
    tokens = ModalityTokens.from_config(backbone.config)
    apart, _ = backbone.get_rope_index(
        input_ids,
        mm_token_type_ids=mm_token_type_ids(input_ids, tokens),
        image_grid_thw=image_grid_thw,
        attention_mask=(part <= _CHOSEN).long(),
    )
    begin = parts[:, :1]
    # an answer is text, of which all three axes rise by one from token to token
    rejected = apart.gather(2, begin.expand(3, -1, -1)) + restarted - begin
    return torch.where(part == _REJECTED, rejected, apart)


def answer_places(parts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Where in its row each answer's tokens are, and where they are predicted: (2P, C) each, all chosen answers first.

    The first token of both answers is predicted by the last one of the prompt. Beyond an answer's end, and before the
    first token of an empty prompt, places are within the row and mean nothing.
    """
    prompt, chosen, _ = parts.unbind(dim=1)
    steps = torch.arange(longest, device=parts.device)
    found = torch.cat([prompt, prompt + chosen])[:, None] + steps
    predicted = torch.where(steps == 0, prompt.repeat(2)[:, None], found) - 1
    last = parts.sum(dim=1).repeat(2)[:, None] - 1
    return found.minimum(last), predicted.clamp(min=0).minimum(last)
