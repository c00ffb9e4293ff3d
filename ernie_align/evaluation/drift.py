"""Drift of a checkpoint's text predictions from those of its baseline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ernie_align.data.render import Renderer
from ernie_align.data.row import Row, RowFault
from ernie_align.errors import DataError
from ernie_align.evaluation.intervals import bootstrap_interval, ratio
from ernie_align.evaluation.questions import load_questions
from ernie_align.models.load import Bundle
from ernie_align.models.text_parity import TextProbe, probe_text
from ernie_align.recipe.evaluation import DataSetBlock, RetentionBlock

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TextSnapshot:
    """A model's predictions on text.

    probe: its logits on random text tokens; ids: token ids of each held-out row; logps: log-probabilities of every next
    token, one (T - 1, V) float32 CPU tensor per row.
    """

    probe: TextProbe
    ids: list[list[int]]
    logps: list[Tensor]


def load_held_out_text(block: RetentionBlock) -> list[Row]:
    """Load the config's text rows, or by default the page of short questions and answers in this package."""
    page = str(files("ernie_align.evaluation").joinpath("held_out_text.jsonl"))
    blocks = block.text or [DataSetBlock(path=page)]
    return [row for data in blocks for question in load_questions(data) if (row := question.with_answer)]


def take_text_snapshot(bundle: Bundle, renderer: Renderer, rows: Sequence[Row], *, tokens: int) -> TextSnapshot:
    """Run rows until `tokens` tokens are reached, and truncate the last one. One row per forward pass: no padding.

    Raises DataError for a row that cannot be rendered or that has an image.
    """
    import torch

    device = next(bundle.model.parameters()).device
    ids, left = [], tokens
    for row in rows:
        try:
            if row.images:
                raise RowFault("an image in held-out text", "list only rows without images under retention.text")
            row_ids = renderer.examples(row, max_length=sys.maxsize)[-1].input_ids[: left + 1]
        except RowFault as fault:
            raise DataError.at("retention.text", fault.what, fix=fault.fix) from None
        left -= len(row_ids) - 1
        ids.append(row_ids)
        if left <= 0:
            break
    bundle.model.eval()
    logps = []
    with torch.no_grad():
        for row_ids in ids:
            batch = torch.tensor([row_ids], device=device)
            logits = bundle.model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
            logps.append(logits[0, :-1].float().log_softmax(dim=-1).cpu())
    return TextSnapshot(probe_text(bundle), ids, logps)


def compare_text(baseline: TextSnapshot, other: TextSnapshot) -> dict[str, Any] | None:
    """Compare text predictions with the baseline's. Return None if the two tokenize the text differently.

    bit_identical: all logits are equal, and then agreement is 1 and kl is 0; agreement: share of positions with the
    same most likely token; kl: mean over tokens of KL(baseline || other) in nats. agreement and kl have 95 % bootstrap
    intervals over rows.
    """
    if baseline.ids != other.ids:
        return None
    identical = baseline.probe == other.probe
    agreed, diverged = [], []
    for p, q in zip(baseline.logps, other.logps, strict=True):
        identical = identical and p.equal(q)
        count = float(len(p))
        agreed.append((float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum()), count))
        kl = (p.exp() * (p - q)).nansum(dim=-1)  # 0 * (-inf - -inf) for impossible tokens
        diverged.append((float(kl.clamp_min(0).sum()), count))
    return {
        "bit_identical": identical,
        "rows": len(baseline.ids),
        "tokens": sum(len(p) for p in baseline.logps),
        "agreement": ratio(agreed),
        "agreement_interval": list(bootstrap_interval(agreed)),
        "kl": ratio(diverged),
        "kl_interval": list(bootstrap_interval(diverged)),
    }
