"""One example as the model will see it: token by token, trained or not, and which pool of experts it goes to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ernie_align.data.render import IGNORED, Renderer


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of one kind. repeat: times a placeholder stands here."""

    text: str
    trained: bool
    vision: bool
    repeat: int = 1

    @property
    def pool(self) -> str:
        """Which experts these tokens go to, in a model with two pools."""
        return "vision" if self.vision else "text"


def preview(example: dict[str, Any], renderer: Renderer) -> list[Stretch]:
    """One stretch per token; a run of placeholders is one stretch."""
    tokenizer, vision_ids = renderer.tokenizer, renderer.vision.ids if renderer.vision else frozenset()
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    stretches = []
    for (token, trained), run in groupby(pairs, key=lambda pair: (pair[0], pair[1] != IGNORED)):
        count = len(list(run))
        text = tokenizer.convert_ids_to_tokens(int(token)).replace("▁", " ")
        if token in vision_ids:
            stretches.append(Stretch(text, trained, True, count))
        else:
            stretches += [Stretch(text, trained, False)] * count
    return stretches


def as_text(stretches: list[Stretch]) -> str:
    """A table of plain text: token, trained or not, pool."""
    names = [repr(stretch.text)[1:-1] + (f" x{stretch.repeat}" if stretch.repeat > 1 else "") for stretch in stretches]
    width = max(map(len, names), default=0)
    lines = [
        f"{name:{width}}  {'trained' if stretch.trained else '-':7}  {stretch.pool}"
        for name, stretch in zip(names, stretches, strict=True)
    ]
    return "\n".join([f"{'token':{width}}  trained  pool", *lines]) + "\n"
