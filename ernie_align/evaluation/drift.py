"""What a checkpoint has kept of another's text: the same logits bit for bit, or how far its distributions moved."""

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
    """What a model says about text.

    certificate: its logits on random text tokens; ids: of each held-out row; logps: of each row (T - 1, V) float32 on
    the CPU, the log-probabilities of every next token.
    """

    certificate: TextProbe
    ids: list[list[int]]
    logps: list[Tensor]


def load_held_out_text(block: RetentionBlock) -> list[Row]:
    """The plan's text rows, else the page of short questions and answers that comes along."""
    page = str(files("ernie_align.evaluation").joinpath("held_out_text.jsonl"))
    blocks = block.text or [DataSetBlock(path=page)]
    return [answered for data in blocks for question in load_questions(data) if (answered := question.answered)]


def take_text_snapshot(bundle: Bundle, renderer: Renderer, rows: Sequence[Row], *, tokens: int) -> TextSnapshot:
    """Rows until `tokens` tokens are reached, the last one cut; each on its own, so that no padding moves a bit.

    Raises DataError for a row that cannot be rendered, or that shows an image.
    """
    import torch

    device = next(bundle.model.parameters()).device
    ids, left = [], tokens
    for row in rows:
        try:
            if row.images:
                raise RowFault("an image in held-out text", "name rows of text alone under retention.text")
            own = renderer.examples(row, max_length=sys.maxsize)[-1].input_ids[: left + 1]
        except RowFault as fault:
            raise DataError.at("retention.text", fault.what, fix=fault.fix) from None
        left -= len(own) - 1
        ids.append(own)
        if left <= 0:
            break
    bundle.model.eval()
    logps = []
    with torch.no_grad():
        for own in ids:
            batch = torch.tensor([own], device=device)
            logits = bundle.model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
            logps.append(logits[0, :-1].float().log_softmax(dim=-1).cpu())
    return TextSnapshot(probe_text(bundle), ids, logps)


def compare_text(first: TextSnapshot, other: TextSnapshot) -> dict[str, Any] | None:
    """How much of the first model's text the other has kept; None where their tokens differ.

    bit_identical: the certificate holds, and agreement is then 1 and kl 0 by construction; agreement: share of tokens
    whose most likely successor is the same; kl: mean over tokens of KL(first || other) in nats; both with 95 %
    intervals over draws of rows.
    """
    if first.ids != other.ids:
        return None
    identical = first.certificate == other.certificate and all(
        one.equal(two) for one, two in zip(first.logps, other.logps, strict=True)
    )
    agreed, diverged = [], []
    for one, two in zip(first.logps, other.logps, strict=True):
        count = float(len(one))
        agreed.append((float((one.argmax(dim=-1) == two.argmax(dim=-1)).sum()), count))
        kl = (one.exp() * (one - two)).nansum(dim=-1)  # 0 · (-inf - -inf) where a token cannot come
        diverged.append((float(kl.clamp_min(0).sum()), count))
    return {
        "bit_identical": identical,
        "rows": len(first.ids),
        "tokens": sum(len(one) for one in first.logps),
        "agreement": ratio(agreed),
        "agreement_interval": list(bootstrap_interval(agreed)),
        "kl": ratio(diverged),
        "kl_interval": list(bootstrap_interval(diverged)),
    }
