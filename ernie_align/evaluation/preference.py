"""Pairs of answers -> which of the two a model finds more likely."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ernie_align.data.collate import model_inputs
from ernie_align.data.pairs import PairCollator, PairEncoder
from ernie_align.data.render import IGNORED, Renderer
from ernie_align.data.row import Row
from ernie_align.models.load import Bundle
from ernie_align.models.routing import check_routing, count_routed_tokens, pool_blocks

if TYPE_CHECKING:
    from torch import Tensor


def pair_logps(
    bundle: Bundle, renderer: Renderer, rows: list[Row], *, batch_size: int
) -> Iterator[tuple[int, float, float]]:
    """(number of the row, log-probability of its best answer, of its worst), batch by batch of similar length.

    Raises RowFault for a row that is no pair, ModelError where an image does not reach the vision experts.
    """
    encode = PairEncoder(renderer, max_length=sys.maxsize)
    pairs = [{**encode(row)[0], "rows": [0, number]} for number, row in enumerate(rows)]
    pairs.sort(key=lambda pair: pair["length"])
    collate = PairCollator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)
    bundle.model.eval()
    for start in range(0, len(pairs), batch_size):
        chosen = pairs[start : start + batch_size]
        for pair, logps in zip(chosen, _logps(bundle, collate(chosen)).T.tolist(), strict=True):
            yield pair["rows"][1], *logps


def _logps(bundle: Bundle, batch: dict[str, Any]) -> Tensor:
    """(2, P): of the chosen answers, of the rejected ones."""
    import torch

    from ernie_align.losses import token_logps

    device = next(bundle.model.parameters()).device
    inputs = {name: values.to(device) for name, values in model_inputs(batch).items()}
    labels = inputs["input_ids"].masked_fill(batch["completion_mask"].to(device) == 0, IGNORED)
    with torch.no_grad(), count_routed_tokens(pool_blocks(bundle.model)) as seen:
        logits = bundle.model(**inputs, use_cache=False).logits
    check_routing(seen, vision_tokens=int(batch["vision_tokens"]), tokens=labels.numel())
    return token_logps(logits, labels).sum(dim=1).view(2, -1)
