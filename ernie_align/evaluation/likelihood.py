"""Expected answers -> how likely a model finds them, teacher-forced, in batches of similar length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ernie_align.data.collate import Collator, model_inputs
from ernie_align.data.pairs import PairCollator, PairEncoder
from ernie_align.data.render import IGNORE_INDEX, Renderer
from ernie_align.data.row import Row
from ernie_align.models.load import Bundle
from ernie_align.models.routing_stats import check_routing, count_routed_tokens, find_expert_pools

if TYPE_CHECKING:
    from torch import Tensor

Skip = Callable[[list[tuple[int, int]]], bool]


def answer_nlls(
    bundle: Bundle, renderer: Renderer, rows: Sequence[Row], *, batch_size: int, skip: Skip = lambda keys: False
) -> Iterator[list[tuple[int, float, int]]]:
    """(number of the row, negative log-likelihood of its last answer in nats, its tokens), batch by batch.

    The end token of an answer is one of its tokens. skip: batches of these rows, each with a 0 beside it, are left out.
    Raises RowFault for a row without an answer, ModelError where an image does not reach the vision experts.
    """
    examples = [
        vars(renderer.examples(row, max_length=sys.maxsize)[-1]) | {"rows": [0, number]}
        for number, row in enumerate(rows)
    ]
    examples.sort(key=lambda example: -len(example["input_ids"]))
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        numbers = [example["rows"][1] for example in chosen]
        if skip([(number, 0) for number in numbers]):
            continue
        batch = collate(chosen)
        logps = answer_logps(bundle, batch, batch["labels"]).tolist()
        lengths = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
        yield [(number, -logp, length) for number, logp, length in zip(numbers, logps, lengths, strict=True)]


def pair_logps(
    bundle: Bundle, renderer: Renderer, rows: Sequence[Row], *, batch_size: int, skip: Skip = lambda keys: False
) -> Iterator[list[tuple[int, float, float]]]:
    """(number of the row, log-probability of its best answer, of its worst), batch by batch.

    skip: batches of these rows, each with a 0 beside it, are left out.
    Raises RowFault for a row that is no pair, ModelError where an image does not reach the vision experts.
    """
    from ernie_align.models.image_cache import ImageFeatureCache

    encode = PairEncoder(renderer, max_length=sys.maxsize)
    pairs = [{**encode(row)[0], "rows": [0, number]} for number, row in enumerate(rows)]
    pairs.sort(key=lambda pair: -pair["length"])
    collate = PairCollator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)
    for start in range(0, len(pairs), batch_size):
        chosen = pairs[start : start + batch_size]
        numbers = [pair["rows"][1] for pair in chosen]
        if skip([(number, 0) for number in numbers]):
            continue
        batch = collate(chosen)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
        with ImageFeatureCache(frozen=True).use(bundle.model, times=2):
            sides = answer_logps(bundle, batch, labels).view(2, -1).T.tolist()
        yield [(number, better, worse) for number, (better, worse) in zip(numbers, sides, strict=True)]


def answer_logps(bundle: Bundle, batch: dict[str, Any], labels: Tensor) -> Tensor:
    """(B,): sum of the log-probabilities of each sequence's labelled tokens. labels (B, T)."""
    import torch

    from ernie_align.losses import token_logps

    device = next(bundle.model.parameters()).device
    inputs = {name: values.to(device) for name, values in model_inputs(batch).items()}
    bundle.model.eval()
    with torch.no_grad(), count_routed_tokens(find_expert_pools(bundle.model)) as seen:
        logits = bundle.model(**inputs, use_cache=False).logits
    check_routing(seen, vision_tokens=int(batch["vision_tokens"]), tokens=labels.numel())
    return token_logps(logits, labels.to(device)).sum(dim=1)
