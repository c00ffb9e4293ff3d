"""Paired preferences: rows with ranked responses -> pairs of a chosen and a rejected response, and their batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, Literal

from ernie_align.data.collate import BaseEncoder, BatchCollator, example_features, pad
from ernie_align.data.messages import drop_oldest_exchange
from ernie_align.data.render import IGNORE_INDEX, Example, Renderer
from ernie_align.data.row import Response, Row, RowDropped, RowFault

if TYPE_CHECKING:
    import torch

Pairing = Literal["best_worst", "adjacent", "all"]
SIDES = ("chosen", "rejected")


def make_pairs(responses: list[Response], pairing: Pairing) -> list[tuple[Response, Response]]:
    """Return (better, worse) pairs by rank; responses of equal rank are never compared."""
    ranked = sorted(responses, key=lambda response: -response.rank)
    if pairing == "best_worst":
        pairs = [(ranked[0], ranked[-1])]
    elif pairing == "adjacent":
        pairs = list(pairwise(ranked))
    else:
        pairs = list(combinations(ranked, 2))
    return [(better, worse) for better, worse in pairs if better.rank > worse.rank]


def encode_responses(
    renderer: Renderer, row: Row, responses: list[Response], *, cut: bool
) -> Iterator[tuple[list[Example], bool]]:
    """Yield the responses encoded after the row's whole prompt, then, with `cut`, after ever shorter prompts.

    A shorter prompt has lost its oldest exchange, never one with an image. The flag says whether it was shortened.
    """
    messages: list[Any] | None = row.messages
    while messages is not None:
        yield [_encode_response(renderer, row, messages, response) for response in responses], messages != row.messages
        messages = drop_oldest_exchange(messages) if cut and row.plain is None else None


def _encode_response(renderer: Renderer, row: Row, prompt: list[Any], response: Response) -> Example:
    if row.plain is not None:
        whole = replace(row, plain=(row.plain[0], response.text))
    else:  # assistant turns of the prompt are context, whatever their label
        context = [message | {"label": 0} if message["role"] == "assistant" else message for message in prompt]
        whole = replace(row, messages=[*context, *response.messages])
    examples = renderer.examples(whole, max_length=sys.maxsize)
    if len(examples) > 1:
        what = "an answer of several turns, whose earlier turns the chat template renders differently in history"
        raise RowFault(what, "move the earlier turns into the prompt")
    return examples[0]


def split_completion(example: Example) -> tuple[list[int], list[int], list[int]]:
    """Split an example before its first label: prompt ids, completion ids, and 1 per labeled completion token."""
    start = next(place for place, label in enumerate(example.labels) if label != IGNORE_INDEX)
    mask = [int(label != IGNORE_INDEX) for label in example.labels[start:]]
    return example.input_ids[:start], example.input_ids[start:], mask


class PairEncoder(BaseEncoder):
    """Encode rows for preference training: one example per pair.

    max_length: tokens of the prompt with the longer answer, image tokens included; cut: drop the oldest exchanges of a
    longer prompt, never one with an image and never an answer; drop_bad_pairs: drop pairs without a signal (equal
    sides, an empty side, an image in only one) instead of stopping; alternative_fix: what else the error suggests.
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        pairing: Pairing = "best_worst",
        drop_bad_pairs: bool = False,
        alternative_fix: str = "set dpo.bad_pairs: drop",
        **limits: Any,
    ):
        super().__init__(renderer, **limits)
        self.pairing = pairing
        self.drop_bad_pairs = drop_bad_pairs
        self.alternative_fix = alternative_fix

    def features(self) -> dict[str, Any]:
        """Return the columns of an example. A mask has one entry per token of its answer, 0 outside assistant turns."""
        return example_features("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        """Return the pairs of a row. Raises RowFault and RowDropped."""
        if not row.responses:
            fix = "give it chosen and rejected, or train with stage: sft or lora"
            raise RowFault("no preference: the row has no chosen and rejected", fix)
        pairs = make_pairs(row.responses, self.pairing)
        if not pairs:
            raise self._bad_pair("all answers have the same rank", "rank them, or drop the row")
        return [self._encode_pair(row, better, worse) for better, worse in pairs]

    def _bad_pair(self, what: str, fix: str, *, kind: str = "") -> RowFault | RowDropped:
        if self.drop_bad_pairs:
            return RowDropped(kind or what)
        return RowFault(what, f"{fix}, or {self.alternative_fix}", kind=kind)

    def _encode_pair(self, row: Row, better: Response, worse: Response) -> dict[str, Any]:
        for name, response in zip(SIDES, (better, worse), strict=True):
            if response.fault is not None:
                fault = response.fault
                raise self._bad_pair(f"{name}: {fault.what}", fault.fix, kind=f"{name}: {fault.kind}")
            if response.text is not None and not response.text.strip():
                raise self._bad_pair(f"{name}: an empty answer", "drop the row")
        for (chosen, rejected), shortened in encode_responses(self.renderer, row, [better, worse], cut=self.cut):
            if chosen.input_ids == rejected.input_ids:
                raise self._bad_pair("chosen equals rejected", "drop the row")
            if max(len(chosen.input_ids), len(rejected.input_ids)) <= self.max_length:
                return _pair_columns(chosen, rejected, shortened)
        raise RowDropped(f"over data.max_length {self.max_length}")


def _pair_columns(chosen: Example, rejected: Example, cut: bool) -> dict[str, Any]:
    (prompt, chosen_ids, chosen_mask), (other_prompt, rejected_ids, rejected_mask) = map(
        split_completion, (chosen, rejected)
    )
    if prompt != other_prompt:
        raise AssertionError("both sides of a pair answer the same prompt")
    return {
        "prompt_ids": prompt,
        "chosen_ids": chosen_ids,
        "chosen_mask": chosen_mask,
        "rejected_ids": rejected_ids,
        "rejected_mask": rejected_mask,
        "media": chosen.media,
        "length": len(chosen.input_ids) + len(rejected.input_ids),
        "trained": sum(chosen_mask) + sum(rejected_mask),
        "vision_tokens": chosen.vision_tokens + rejected.vision_tokens,
        "reasoning_left_out": chosen.reasoning_left_out + rejected.reasoning_left_out,
        "cut": cut,
    }


class PairCollator(BatchCollator):
    """Collate P pairs to input_ids, attention_mask and completion_mask (2P, T): prompt + chosen of all pairs, then
    prompt + rejected, with the columns of BatchCollator.

    pixel_values and image_grid_thw hold each image once, although its placeholders are in two rows: models.image_cache
    gives it to both. `ref_chosen_logps` and `ref_rejected_logps` (P,) are passed on if the examples have them.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [
            (example["prompt_ids"], example[f"{side}_ids"], example[f"{side}_mask"])
            for side in SIDES
            for example in examples
        ]
        reference = stack_columns(examples, "ref_chosen_logps", "ref_rejected_logps")
        return self._pad_completions(sequences) | reference | self._row_columns(examples)


class SharedPromptCollator(BatchCollator):
    """Collate P pairs to input_ids and attention_mask (P, T): prompt, chosen and rejected in one row; `parts` (P, 3):
    the lengths of the three; completion_mask (2P, 1 + C): of all chosen, then all rejected answers, after one column
    for the last token of the prompt.

    The other columns are those of PairCollator. `vision_tokens` counts the tokens of these rows, where each image
    appears once.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        ids = [[token for name in names for token in example[name]] for example in examples]
        masks = []
        for side in SIDES:
            for example in examples:
                first, *others = example[f"{side}_mask"]
                # without a prompt nothing predicts the first token: it is in the row, but not compared
                masks.append([0, first, *others] if example["prompt_ids"] else [first, 0, *others])
        batch = {
            "input_ids": pad(ids, self.pad_token_id, multiple=self.multiple),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, multiple=self.multiple),
            "parts": torch.tensor([[len(example[name]) for name in names] for example in examples]),
            "completion_mask": pad(masks, 0),
        }
        # an example counts the images of its prompt for both of its sides
        vision_tokens = sum(example["vision_tokens"] for example in examples) // 2
        reference = stack_columns(examples, "ref_chosen_logps", "ref_rejected_logps")
        return batch | reference | self._row_columns(examples, vision_tokens)


def stack_columns(examples: list[dict[str, Any]], *names: str) -> dict[str, torch.Tensor]:
    """Return those of the named columns that the examples have, as tensors (B,)."""
    import torch

    present = [name for name in names if name in examples[0]]
    return {name: torch.tensor([example[name] for example in examples]) for name in present}
