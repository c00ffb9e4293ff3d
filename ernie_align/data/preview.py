"""One example as the model will see it: token by token, trained or not, and which pool of experts it goes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ernie_align.data.render import IGNORE_INDEX, Renderer

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class TokenSpan:
    """Neighbouring tokens of one kind. repeat: times a placeholder stands here."""

    text: str
    trained: bool
    vision: bool
    repeat: int = 1

    @property
    def pool(self) -> str:
        """Which experts these tokens go to, in a model with two pools."""
        return "vision" if self.vision else "text"


def preview_example(example: dict[str, Any], renderer: Renderer) -> dict[str, list[TokenSpan]]:
    """What the example consists of: `example`, or `prompt`, `chosen` and `rejected`."""
    if "labels" in example:
        trained = [label != IGNORE_INDEX for label in example["labels"]]
        return {"example": _stretches(example["input_ids"], trained, renderer)}
    sides = {side: _stretches(example[f"{side}_ids"], example[f"{side}_mask"], renderer) for side in _SIDES}
    prompt = example["prompt_ids"]
    return {"prompt": _stretches(prompt, [0] * len(prompt), renderer), **sides}


def _stretches(ids: list[int], trained: Sequence[int], renderer: Renderer) -> list[TokenSpan]:
    """One stretch per token; a run of placeholders is one stretch."""
    tokenizer, vision_ids = renderer.tokenizer, renderer.vision.ids if renderer.vision else frozenset()
    pairs = zip(ids, map(bool, trained), strict=True)
    stretches = []
    for (token, is_trained), run in groupby(pairs):
        count = len(list(run))
        text = tokenizer.convert_ids_to_tokens(int(token)).replace("▁", " ")
        if token in vision_ids:
            stretches.append(TokenSpan(text, is_trained, True, count))
        else:
            stretches += [TokenSpan(text, is_trained, False)] * count
    return stretches


def format_preview(parts: dict[str, list[TokenSpan]]) -> str:
    """Tables of plain text: token, trained or not, pool."""
    return "\n".join(f"{name}\n{_table(stretches)}" for name, stretches in parts.items())


def _table(stretches: list[TokenSpan]) -> str:
    names = [repr(stretch.text)[1:-1] + (f" x{stretch.repeat}" if stretch.repeat > 1 else "") for stretch in stretches]
    width = max(map(len, names), default=0)
    lines = [
        f"{name:{width}}  {'trained' if stretch.trained else '-':7}  {stretch.pool}"
        for name, stretch in zip(names, stretches, strict=True)
    ]
    return "\n".join([f"{'token':{width}}  trained  pool", *lines]) + "\n"
