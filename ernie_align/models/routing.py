"""Who was routed where: counts of tokens per pool, and the guard that stops a run whose images go astray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ernie_align.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


@dataclass
class RoutedTokens:
    """Tokens that entered each pool, by the name of the pool's block."""

    text: dict[str, int] = field(default_factory=dict)
    vision: dict[str, int] = field(default_factory=dict)


def pool_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name of each block that holds one pool of experts -> the block; none in models with a single pool."""
    pools = ("text_moe", "vision_moe")
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in pools}


@contextmanager
def count_routed_tokens(blocks: dict[str, nn.Module]) -> Iterator[RoutedTokens]:
    """Count the tokens that enter each pool while the context lasts.

    blocks: of pool_blocks. Shapes alone are read: nothing is computed, no device is waited for.
    """
    seen = RoutedTokens()

    def counter(counts: dict[str, int], name: str):
        def count(block: nn.Module, args: tuple) -> None:
            # the block is given (B, T, H) or, selected by modality, (N · H) values
            counts[name] += args[0].numel() // block.hidden_dim

        return count

    handles = []
    for name, block in blocks.items():
        counts = seen.vision if name.endswith("vision_moe") else seen.text
        counts[name] = 0
        handles.append(block.register_forward_pre_hook(counter(counts, name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_routing(seen: RoutedTokens, *, vision_tokens: int, tokens: int | None = None) -> None:
    """Vision tokens in the data are vision tokens in the pool, in every layer. Raises ModelError where they are not.

    vision_tokens: counted from the images of the batch, not from its ids; tokens: all positions, padding included,
    where they are known (generation goes on adding text).
    """
    for name, count in seen.vision.items():
        text = seen.text[name.removesuffix("vision_moe") + "text_moe"]
        if count != vision_tokens or (tokens is not None and text != tokens - vision_tokens):
            raise ModelError.at(
                name,
                f"{vision_tokens} tokens are vision; {count} reached the vision pool and {text} the text pool",
                why="image tokens that reach the text experts train the wrong half of the model without any other sign",
                fix="load the model with ernie_align.load_model, which derives the routing at the backbone",
            )
