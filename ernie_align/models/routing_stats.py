"""Who was routed where: counts of tokens per pool, and the guard that stops a run whose images go astray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ernie_align.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class RoutedTokenCounts:
    """Tokens that entered each pool, by the name of the pool's block."""

    text: dict[str, int] = field(default_factory=dict)
    vision: dict[str, int] = field(default_factory=dict)


def find_expert_pools(model: nn.Module) -> dict[str, nn.Module]:
    """Name of each block that holds one pool of experts -> the block; none in models with a single pool."""
    pools = ("text_moe", "vision_moe")
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in pools}


@contextmanager
def count_routed_tokens(blocks: dict[str, nn.Module]) -> Iterator[RoutedTokenCounts]:
    """Count the tokens that enter each pool while the context lasts.

    blocks: of pool_blocks. Shapes alone are read: nothing is computed, no device is waited for.
    """
    seen = RoutedTokenCounts()

    def counter(counts: dict[str, int], name: str):
        def count(block: nn.Module, args: tuple) -> None:
            # the block is given (B, T, H) or, selected by modality, (N · H) values
            if not getattr(block, "is_dummy_forward", False):  # models.touch
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


@contextmanager
def record_expert_choices(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Experts that each router chooses, forward by forward: name of the router -> of each (N, k) ids in rising order.

    N counts the tokens of its pool, row by row of the batch.
    """
    chosen: dict[str, list[Tensor]] = {}

    def recorder(name: str):
        def record(router: nn.Module, args: tuple, output: tuple) -> None:
            chosen.setdefault(name, []).append(output[2].sort(dim=-1).values)

        return record

    routers = {name: module for name, module in model.named_modules() if "TopKRouter" in type(module).__name__}
    handles = [module.register_forward_hook(recorder(name)) for name, module in routers.items()]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def count_expert_flips(
    policy: dict[str, list[Tensor]], reference: dict[str, list[Tensor]], *, real: Tensor, vision: Tensor
) -> dict[str, tuple[int, int]]:
    """Of the tokens of each pool, over all layers: how many go to other experts in the policy, and how many there are.

    policy, reference: of record_experts, on the same batch, each one forward or one generation (the prompts, then token
    by token, the last of which is never fed); real (B, T): False on padding; vision (B, T): True where a token belongs
    to the vision pool.
    """
    flips: dict[str, tuple[int, int]] = {}
    for name, calls in policy.items():
        pool = "vision" if ".vision_moe." in name else "text"
        own = vision if pool == "vision" else ~vision
        if not own.any():  # one of the two may have touched the pool, for the sake of other processes (models.touch)
            continue
        here, there = _by_position(calls, own), _by_position(reference[name], own)
        counted = real & own & (here[..., 0] >= 0) & (there[..., 0] >= 0)
        other = (here != there).any(dim=-1) & counted
        flipped, total = flips.get(pool, (0, 0))
        flips[pool] = (flipped + int(other.sum()), total + int(counted.sum()))
    return flips


def _by_position(calls: list[Tensor], own: Tensor) -> Tensor:
    """What a router chose, call by call -> (B, T, k), -1 where it was not asked. own (B, T): tokens of its pool."""
    first, *decoded = calls
    placed = first.new_full((*own.shape, first.shape[-1]), -1)
    width = int((own.sum(dim=0).cumsum(dim=0) <= len(first)).sum())  # of what the first call was about
    placed[:, :width][own[:, :width]] = first
    # a process that is done goes on decoding while others are not, if their weights are spread: of nobody's tokens
    for column, chosen in zip(range(width, own.shape[1]), decoded, strict=False):
        placed[:, column] = chosen
    return placed


def check_routing(seen: RoutedTokenCounts, *, vision_tokens: int, tokens: int | None = None) -> None:
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
