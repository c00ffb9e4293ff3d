"""What two models say to the same prompts, and how far apart they may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_align.data.collate import Collator, model_inputs
from ernie_align.data.render import renderer_of
from ernie_align.data.row import Row
from ernie_align.evaluation.generate import Sampling, generate_answers
from ernie_align.models.load import Bundle

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = 64  # of each prompt, the last ones: what stands before reaches them through attention
NEW_TOKENS = 32  # of each greedy continuation


@dataclass(frozen=True)
class Bound:
    """How far an export may be from its origin. of: a value of Difference; label: what users call it."""

    of: str
    label: str
    value: float
    why: str


# by dtype of the weights
BOUNDS = {
    "float32": Bound(
        "relative_difference",
        "worst difference of two logits over the largest logit",
        1e-5,
        "float32 sums in another order differ by less; a larger difference is something else",
    ),
    "bfloat16": Bound(
        "mean_kl",
        "mean KL",
        1e-2,
        "by Pinsker's inequality, samples differ in at most 7 tokens of 100 below it: sqrt(0.01 / 2)",
    ),
}


@dataclass(frozen=True)
class Said:
    """What a model says. logits: of each prompt (t, V) in float32, t up to POSITIONS; texts: greedy continuations."""

    logits: list[Tensor]
    texts: list[str]


@dataclass(frozen=True)
class Difference:
    """Of two models over all prompts.

    worst_difference: of any two logits; largest_logit: in absolute value; mean_kl: KL(first ‖ second) of the next
    token, in nats, over all positions; same_top: share of positions with the same likeliest token; same_texts: prompts
    continued alike to the letter.
    """

    worst_difference: float
    largest_logit: float
    mean_kl: float
    same_top: float
    same_texts: int
    prompts: int
    positions: int

    @property
    def relative_difference(self) -> float:
        """worst_difference in units of the largest logit, which says how coarse float32 is there; at least of 1."""
        return self.worst_difference / max(1.0, self.largest_logit)


def ask(bundle: Bundle, rows: Iterable[Row], *, thinking: bool = False, continued: bool = True) -> Said:
    """Logits at the end of each prompt, and what greedy generation goes on with (if continued)."""
    import torch

    rows = list(rows)
    renderer = renderer_of(bundle, thinking=thinking)
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)
    device = next(bundle.model.parameters()).device
    bundle.model.eval()
    logits = []
    for number, row in enumerate(rows):  # one by one: padding would change the shapes that are summed over
        batch = model_inputs(collate([vars(renderer.prompt(row)) | {"rows": [0, number]}]))
        inputs = {name: values.to(device) for name, values in batch.items()}
        with torch.no_grad():
            output = bundle.model(**inputs, logits_to_keep=POSITIONS, use_cache=False)
        logits.append(output.logits[0].float().cpu())
    texts: dict[int, str] = {}
    if continued:
        batches = generate_answers(bundle, renderer, rows, sampling=Sampling(NEW_TOKENS), batch_size=len(rows))
        texts = {number: said.text for batch in batches for number, _, said in batch}
    return Said(logits, [texts[number] for number in sorted(texts)])


def compare(first: Said, second: Said) -> Difference:
    """How far the second model is from the first."""
    worst, largest, kl, same, positions = 0.0, 0.0, 0.0, 0, 0
    for mine, theirs in zip(first.logits, second.logits, strict=True):
        worst = max(worst, (mine - theirs).abs().max().item())
        largest = max(largest, mine.abs().max().item())
        here, there = mine.double().log_softmax(dim=-1), theirs.double().log_softmax(dim=-1)
        kl += (here.exp() * (here - there)).sum().item()
        same += int((mine.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
        positions += len(mine)
    alike = sum(a == b for a, b in zip(first.texts, second.texts, strict=False))
    # rounding may leave a sum of terms that cancel just below zero
    return Difference(worst, largest, max(kl / positions, 0.0), same / positions, alike, len(first.logits), positions)


def exceeds(difference: Difference, bound: Bound) -> str | None:
    """Why an export is refused, or None."""
    value = getattr(difference, bound.of)
    if math.isfinite(value) and value <= bound.value:
        return None
    return f"{bound.label} {value:.3g} is over the bound of {bound.value:g}"
