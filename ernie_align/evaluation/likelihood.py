"""Log-probabilities of expected answers and of preference pairs, teacher-forced, in batches of similar length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ernie_align.data.collate import Collator, model_inputs
from ernie_align.data.pairs import PairCollator, PairEncoder
from ernie_align.data.render import IGNORE_INDEX, Renderer
from ernie_align.data.row import Row
from ernie_align.evaluation.generate import Key, Skip, iter_batches
from ernie_align.models.load import Bundle

if TYPE_CHECKING:
    from torch import Tensor


def answer_nlls(
    bundle: Bundle, renderer: Renderer, rows: Sequence[Row], *, batch_size: int, skip: Skip = lambda keys: False
) -> Iterator[list[tuple[int, int, dict[str, Any]]]]:
    """Yield batches of (row number, 0, {nll, tokens}) of the rows' last answers: nats, and tokens with the end token.

    skip: returns True for batches that are not needed; its keys are (row number, 0).
    Raises RowFault for a row without an answer, ModelError if an image does not reach the vision experts.
    """
    encoded = [vars(renderer.examples(row, max_length=sys.maxsize)[-1]) for row in rows]
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)
    examples = _numbered(encoded, lambda example: len(example["input_ids"]))
    for keys, chosen in iter_batches(examples, batch_size=batch_size, skip=skip):
        batch = collate(chosen)
        logps = labeled_logps(bundle, batch, batch["labels"]).tolist()
        lengths = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
        yield [(*key, {"nll": -logp, "tokens": n}) for key, logp, n in zip(keys, logps, lengths, strict=True)]


def pair_logps(
    bundle: Bundle, renderer: Renderer, rows: Sequence[Row], *, batch_size: int, skip: Skip = lambda keys: False
) -> Iterator[list[tuple[int, int, dict[str, Any]]]]:
    """Yield batches of (row number, 0, {chosen_logp, rejected_logp}) of the rows' best and worst answers.

    skip: returns True for batches that are not needed; its keys are (row number, 0).
    Raises RowFault for a row that is not a preference pair, ModelError if an image does not reach the vision experts.
    """
    from ernie_align.models.image_cache import ImageFeatureCache

    encode = PairEncoder(renderer, max_length=sys.maxsize)
    collate = PairCollator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)
    pairs = _numbered([encode(row)[0] for row in rows], lambda pair: pair["length"])
    for keys, chosen in iter_batches(pairs, batch_size=batch_size, skip=skip):
        batch = collate(chosen)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
        with ImageFeatureCache(frozen=True).use(bundle.model, times=2):
            logps = labeled_logps(bundle, batch, labels).view(2, -1).T.tolist()
        names = ("chosen_logp", "rejected_logp")
        yield [(*key, dict(zip(names, both, strict=True))) for key, both in zip(keys, logps, strict=True)]


def _numbered(
    examples: list[dict[str, Any]], length: Callable[[dict[str, Any]], int]
) -> list[tuple[Key, dict[str, Any]]]:
    """Give each example its key and row number, and sort by `length`, longest first."""
    numbered = [((row, 0), example | {"rows": [0, row]}) for row, example in enumerate(examples)]
    return sorted(numbered, key=lambda item: -length(item[1]))


def labeled_logps(bundle: Bundle, batch: dict[str, Any], labels: Tensor) -> Tensor:
    """Return the sum of log-probabilities of each sequence's labeled tokens, (B,). labels: (B, T)."""
    import torch

    from ernie_align.losses import token_logps
    from ernie_align.models.token_dispatch import check_routing, count_routed_tokens, find_expert_pools

    device = next(bundle.model.parameters()).device
    inputs = {name: values.to(device) for name, values in model_inputs(batch).items()}
    bundle.model.eval()
    with torch.no_grad(), count_routed_tokens(find_expert_pools(bundle.model)) as counts:
        logits = bundle.model(**inputs, use_cache=False).logits
    check_routing(counts, vision_tokens=int(batch["vision_tokens"]), tokens=labels.numel())
    return token_logps(logits, labels.to(device)).sum(dim=1)
