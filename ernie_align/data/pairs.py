"""Preference rows -> pairs of answers to one prompt, and their batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, Literal

from ernie_align.data.collate import load_pixels, pad, shared_features
from ernie_align.data.messages import without_oldest_exchange
from ernie_align.data.render import IGNORE_INDEX, Example, Renderer
from ernie_align.data.row import Message, Response, Row, RowDropped, RowFault

if TYPE_CHECKING:
    import torch

Pairing = Literal["best_worst", "adjacent", "all"]


def make_pairs(responses: list[Response], pairing: Pairing) -> list[tuple[Response, Response]]:
    """(better, worse) by rank; endings of the same rank are never compared."""
    ranked = sorted(responses, key=lambda ending: -ending.rank)
    if pairing == "best_worst":
        pairs = [(ranked[0], ranked[-1])]
    elif pairing == "adjacent":
        pairs = list(pairwise(ranked))
    else:
        pairs = list(combinations(ranked, 2))
    return [(better, worse) for better, worse in pairs if better.rank > worse.rank]


class PairEncoder:
    """Rows for preference training: one example per pair.

    max_length: tokens of the prompt with the longer answer, image tokens included; cut: drop the oldest exchanges of a
    longer prompt, never one with an image and never an answer; drop_bad_pairs: leave out pairs that teach nothing
    (equal sides, an empty one, an image in only one) instead of stopping; way_out: what else a user can do about one.
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        max_length: int,
        cut: bool = False,
        pairing: Pairing = "best_worst",
        drop_bad_pairs: bool = False,
        alternative_fix: str = "set dpo.bad_pairs: drop",
    ):
        self.renderer = renderer
        self.max_length = max_length
        self.cut = cut
        self.pairing = pairing
        self.drop_bad_pairs = drop_bad_pairs
        self.alternative_fix = alternative_fix

    def features(self) -> dict[str, Any]:
        """Columns of an example: a mask has one entry per token of its answer, 0 where the model does not speak."""
        from datasets import Value
        from datasets.features import List

        names = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")
        return {**{name: List(Value("int32")) for name in names}, **shared_features()}

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        """The row's pairs. Raises RowFault and RowDropped."""
        if not row.responses:
            raise RowFault("no preference: a row without chosen and rejected", "train on it with stage: sft or lora")
        pairs = make_pairs(row.responses, self.pairing)
        if not pairs:
            raise self._bad("all answers have the same rank", "rank them, or drop the row")
        return [self._encode(row, better, worse) for better, worse in pairs]

    def _bad(self, what: str, fix: str, *, kind: str = "") -> RowFault | RowDropped:
        if self.drop_bad_pairs:
            return RowDropped(kind or what)
        return RowFault(what, f"{fix}, or {self.alternative_fix}", kind=kind)

    def _encode(self, row: Row, better: Response, worse: Response) -> dict[str, Any]:
        for name, ending in (("chosen", better), ("rejected", worse)):
            if ending.fault is not None:
                fault = ending.fault
                raise self._bad(f"{name}: {fault.what}", fault.fix, kind=f"{name}: {fault.kind}")
            if ending.text is not None and not ending.text.strip():
                raise self._bad(f"{name}: an empty answer", "drop the row")
        cut, messages = False, row.messages
        while True:
            chosen, rejected = (self._render(row, messages, ending) for ending in (better, worse))
            if chosen.input_ids == rejected.input_ids:
                raise self._bad("chosen equals rejected", "drop the row")
            if max(len(chosen.input_ids), len(rejected.input_ids)) <= self.max_length:
                return _columns(chosen, rejected, cut)
            shorter = without_oldest_exchange(messages) if self.cut and row.plain is None else None
            if shorter is None:
                raise RowDropped(f"over data.max_length {self.max_length}")
            cut, messages = True, shorter

    def _render(self, row: Row, messages: list[Message], ending: Response) -> Example:
        if row.plain is not None:
            side = replace(row, plain=(row.plain[0], ending.text))
        else:  # what stands in the prompt is context, whoever said it
            context = [message | {"label": 0} if message["role"] == "assistant" else message for message in messages]
            side = replace(row, messages=[*context, *ending.messages])
        examples = self.renderer.examples(side, max_length=sys.maxsize)
        if len(examples) > 1:
            what = "an answer of several turns, of which the template renders the earlier ones unlike they were said"
            raise RowFault(what, "move the earlier turns into the prompt")
        return examples[0]


def _columns(chosen: Example, rejected: Example, cut: bool) -> dict[str, Any]:
    start = next(place for place, label in enumerate(chosen.labels) if label != IGNORE_INDEX)
    if rejected.input_ids[:start] != chosen.input_ids[:start] or rejected.labels[start] == IGNORE_INDEX:
        raise AssertionError("both sides of a pair answer the same prompt")
    sides = {
        name: values
        for side, example in (("chosen", chosen), ("rejected", rejected))
        for name, values in (
            (f"{side}_ids", example.input_ids[start:]),
            (f"{side}_mask", [int(label != IGNORE_INDEX) for label in example.labels[start:]]),
        )
    }
    return {
        "prompt_ids": chosen.input_ids[:start],
        **sides,
        "media": chosen.media,
        "length": len(chosen.input_ids) + len(rejected.input_ids),
        "trained": sum(sides["chosen_mask"]) + sum(sides["rejected_mask"]),
        "vision_tokens": chosen.vision_tokens + rejected.vision_tokens,
        "reasoning_left_out": chosen.reasoning_left_out + rejected.reasoning_left_out,
        "cut": cut,
    }


class PairCollator:
    """Pairs -> input_ids (2P, T), attention_mask (2P, T), completion_mask (2P, T): the chosen answers of all pairs,
    then the rejected ones, each behind its prompt; and pixel_values (patches, C·P²), image_grid_thw (n, 3) of each
    image once, though its placeholders stand in two rows: models.vision_once shows it to both.

    `rows` (P, 2) and `vision_tokens` () come along as from Collator; `ref_chosen_logps` and `ref_rejected_logps` (P,)
    where they were computed beforehand.
    row_name: (source, row) -> the row's name, for errors; pad_to_multiple_of: T is one of its multiples.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        image_processor: Any = None,
        row_name: Callable[[int, int], str] = lambda source, row: f"row {row} of source {source}",
        pad_to_multiple_of: int | None = None,
    ):
        self.pad_token_id = pad_token_id
        self.image_processor = image_processor
        self.row_name = row_name
        self.multiple = pad_to_multiple_of

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises DataError where an image is gone or broken since the row was judged."""
        import torch

        sides = [(example, side) for side in ("chosen", "rejected") for example in examples]
        ids = [[*example["prompt_ids"], *example[f"{side}_ids"]] for example, side in sides]
        masks = [[0] * len(example["prompt_ids"]) + [*example[f"{side}_mask"]] for example, side in sides]
        batch = {
            "input_ids": pad(ids, self.pad_token_id, multiple=self.multiple),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, multiple=self.multiple),
            "completion_mask": pad(masks, 0, multiple=self.multiple),
            "rows": torch.tensor([example["rows"] for example in examples]),
            "vision_tokens": torch.tensor(sum(example["vision_tokens"] for example in examples)),
        }
        return batch | _reference(examples) | load_pixels(examples, self.image_processor, self.row_name)


class SharedPromptCollator(PairCollator):
    """Pairs -> input_ids (P, T), attention_mask (P, T): each prompt once, behind it the chosen and the rejected answer;
    `parts` (P, 3): the lengths of the three; completion_mask (2P, 1 + C): of the chosen answers of all pairs, then of
    the rejected ones, behind the last token of the prompt; and the pixels of each image.

    The rest is as from PairCollator. `vision_tokens` counts what stands in these rows.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises DataError where an image is gone or broken since the row was judged."""
        import torch

        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        ids = [[token for name in names for token in example[name]] for example in examples]
        masks = []
        for side in ("chosen", "rejected"):
            for example in examples:
                first, *others = example[f"{side}_mask"]
                # without a prompt nothing predicts the first token: it counts, and is not compared
                masks.append([0, first, *others] if example["prompt_ids"] else [first, 0, *others])
        batch = {
            "input_ids": pad(ids, self.pad_token_id, multiple=self.multiple),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, multiple=self.multiple),
            "parts": torch.tensor([[len(example[name]) for name in names] for example in examples]),
            "completion_mask": pad(masks, 0),
            "rows": torch.tensor([example["rows"] for example in examples]),
            # images stand in prompts alone: an example counts them in both of its sides
            "vision_tokens": torch.tensor(sum(example["vision_tokens"] for example in examples) // 2),
        }
        return batch | _reference(examples) | load_pixels(examples, self.image_processor, self.row_name)


def _reference(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """ref_chosen_logps and ref_rejected_logps (P,) where they were computed beforehand."""
    import torch

    names = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in examples[0]]
    return {name: torch.tensor([example[name] for example in examples]) for name in names}
