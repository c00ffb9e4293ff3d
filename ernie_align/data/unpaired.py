"""Unpaired preferences (TRL's name): a prompt, one completion and a label -> examples and batches for KTO."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ernie_align.data.collate import BaseEncoder, BatchCollator, example_features
from ernie_align.data.pairs import encode_responses, split_completion, stack_columns
from ernie_align.data.row import Response, Row, RowDropped, RowFault

if TYPE_CHECKING:
    import torch


class UnpairedEncoder(BaseEncoder):
    """Encode rows with a `label`: true for a desirable completion, false for an undesirable one.

    The completion is the `completion` of a prompt/completion row, otherwise the last assistant turn; everything before
    it is its prompt.
    max_length: tokens of prompt and completion, image tokens included; cut: drop the oldest exchanges of a longer
    prompt, never one with an image and never the completion.
    """

    def features(self) -> dict[str, Any]:
        """Return the columns of an example. completion_mask: one per completion token, 0 outside assistant turns."""
        return example_features("prompt_ids", "completion_ids", "completion_mask", label="bool")

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        """Return the row's example. Raises RowFault and RowDropped."""
        if row.responses:
            what = "chosen and rejected, but this stage trains on one labeled completion per row"
            raise RowFault(what, "train with stage: dpo, or split the row into two labeled ones")
        label, fix = row.columns.get("label"), "give the row label: true (desirable) or label: false (undesirable)"
        if label is None:
            raise RowFault("no label", fix)
        if not isinstance(label, (bool, int, float)) or label not in (0, 1):
            raise RowFault(f"label is {str(label)[:60]!r}", fix, kind="a label other than true and false")
        prompt, response = _split_row(row)
        for (example,), shortened in encode_responses(self.renderer, prompt, [response], cut=self.cut):
            if len(example.input_ids) <= self.max_length:
                prompt_ids, completion_ids, completion_mask = split_completion(example)
                return [
                    {
                        "prompt_ids": prompt_ids,
                        "completion_ids": completion_ids,
                        "completion_mask": completion_mask,
                        "label": bool(label),
                        "media": example.media,
                        "length": len(example.input_ids),
                        "trained": sum(completion_mask),
                        "vision_tokens": example.vision_tokens,
                        "reasoning_left_out": example.reasoning_left_out,
                        "cut": shortened,
                    }
                ]
        raise RowDropped(f"over data.max_length {self.max_length}")


def _split_row(row: Row) -> tuple[Row, Response]:
    """Split a row into its prompt and its completion. The rank of the response is not used."""
    if row.plain is not None:
        return row, Response(0, text=row.plain[1])
    answers = [place for place, message in enumerate(row.messages) if message["role"] == "assistant"]
    start = row.prompt_length
    if start is None:
        start = answers[-1] if answers else len(row.messages)
    if not answers or answers[-1] < start:
        raise RowFault("no completion: the row has no assistant turn to label", "end it with an answer, or drop it")
    return replace(row, messages=row.messages[:start]), Response(0, row.messages[start:])


class UnpairedCollator(BatchCollator):
    """Collate examples to what TRL's KTOTrainer reads: input_ids, attention_mask and completion_mask (B, T), `label`
    (B,) bool, with the columns of BatchCollator.

    With `kl` also KL_input_ids, KL_attention_mask and KL_completion_mask (B, U): each prompt with the completion of the
    example before it (the first with the last one's), from which KTO estimates its KL term. A mismatched sequence shows
    the same images in the same order, so that pixel_values and `vision_tokens` hold for either forward pass.
    max_length: mismatched sequences are truncated to it, as TRL does; matched ones already fit.
    `ref_logps` and `ref_KL_logps` (B,) are passed on if the examples have them.
    """

    def __init__(self, pad_token_id: int, *, max_length: int | None = None, kl: bool = True, **settings: Any):
        super().__init__(pad_token_id, **settings)
        self.max_length = max_length
        self.kl = kl

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [example["prompt_ids"] for example in examples]
        completions = [(example["completion_ids"], example["completion_mask"]) for example in examples]
        batch = self._pad_completions([(prompt, *own) for prompt, own in zip(prompts, completions, strict=True)])
        if self.kl:
            mismatched = []
            for prompt, (ids, mask) in zip(prompts, completions[-1:] + completions[:-1], strict=True):
                room = None if self.max_length is None else max(1, self.max_length - len(prompt))
                mismatched.append((prompt, ids[:room], mask[:room]))
            batch |= {f"KL_{name}": values for name, values in self._pad_completions(mismatched).items()}
        columns = stack_columns(examples, "label", "ref_logps", "ref_KL_logps")
        return batch | columns | self._row_columns(examples)
