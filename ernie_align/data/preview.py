"""Preview of one example as the model sees it: each token, whether it is trained, and its expert pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ernie_align.data.render import IGNORE_INDEX, Renderer


@dataclass(frozen=True)
class TokenSpan:
    """One token, or a run of the same image placeholder. repeat: length of that run."""

    text: str
    trained: bool
    vision: bool
    repeat: int = 1

    @property
    def pool(self) -> str:
        """The expert pool of these tokens, in a model that has two."""
        return "vision" if self.vision else "text"


def preview_example(example: dict[str, Any], renderer: Renderer) -> dict[str, list[TokenSpan]]:
    """Return the spans of `example`; of a preference, of its `prompt` and of each response."""
    if "labels" in example:
        trained = [label != IGNORE_INDEX for label in example["labels"]]
        return {"example": _token_spans(example["input_ids"], trained, renderer)}
    prompt = example["prompt_ids"]
    parts = {"prompt": _token_spans(prompt, [0] * len(prompt), renderer)}
    for name in ("chosen", "rejected", "completion"):
        if f"{name}_ids" in example:
            title = f"{name}, label: {str(example['label']).lower()}" if "label" in example else name
            parts[title] = _token_spans(example[f"{name}_ids"], example[f"{name}_mask"], renderer)
    return parts


def _token_spans(ids: list[int], trained: Sequence[int], renderer: Renderer) -> list[TokenSpan]:
    """Return one span per token; a run of image placeholders is one span."""
    tokenizer, vision_ids = renderer.tokenizer, renderer.vision.ids if renderer.vision else frozenset()
    spans = []
    for (token, is_trained), run in groupby(zip(ids, map(bool, trained), strict=True)):
        count = len(list(run))
        text = tokenizer.convert_ids_to_tokens(int(token)).replace("▁", " ")
        if token in vision_ids:
            spans.append(TokenSpan(text, is_trained, True, count))
        else:
            spans += [TokenSpan(text, is_trained, False)] * count
    return spans


def format_preview(parts: dict[str, list[TokenSpan]]) -> str:
    """Format the spans as plain-text tables: token, trained or not, pool."""
    return "\n".join(f"{name}\n{_format_table(spans)}" for name, spans in parts.items())


def _format_table(spans: list[TokenSpan]) -> str:
    names = [repr(span.text)[1:-1] + (f" x{span.repeat}" if span.repeat > 1 else "") for span in spans]
    width = max(map(len, names), default=0)
    lines = [
        f"{name:{width}}  {'trained' if span.trained else '-':7}  {span.pool}"
        for name, span in zip(names, spans, strict=True)
    ]
    return "\n".join([f"{'token':{width}}  trained  pool", *lines]) + "\n"
