"""Count the tokens that enter each expert pool, compare the experts that two models choose, and check the counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ernie_align.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class RoutedTokenCounts:
    """Number of tokens that entered each pool, by the module name of the pool."""

    text: dict[str, int] = field(default_factory=dict)
    vision: dict[str, int] = field(default_factory=dict)


def find_expert_pools(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> module of every text and vision pool; empty for models with a single kind of pool."""
    pools = ("text_moe", "vision_moe")
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in pools}


@contextmanager
def count_routed_tokens(pools: dict[str, nn.Module]) -> Iterator[RoutedTokenCounts]:
    """Count the tokens that enter each of the pools (from find_expert_pools) within the context.

    Reads shapes only: no computation and no device synchronization.
    """
    seen = RoutedTokenCounts()

    def make_counter(counts: dict[str, int], name: str):
        def count(pool: nn.Module, args: tuple) -> None:
            if not getattr(pool, "is_dummy_forward", False):  # models.distributed.dummy_vision
                # the input is (B, T, H) or, selected by modality, N · H values
                counts[name] += args[0].numel() // pool.hidden_dim

        return count

    with ExitStack() as hooks:
        for name, pool in pools.items():
            counts = seen.vision if name.endswith("vision_moe") else seen.text
            counts[name] = 0
            hooks.enter_context(pool.register_forward_pre_hook(make_counter(counts, name)))
        yield seen


@contextmanager
def record_expert_choices(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record the experts that each router chooses: name of the router -> for each forward, (N, k) sorted expert ids.

    N counts the tokens of its pool, row by row of the batch.
    """
    choices: dict[str, list[Tensor]] = {}

    def make_recorder(name: str):
        def record(router: nn.Module, args: tuple, output: tuple) -> None:
            choices.setdefault(name, []).append(output[2].sort(dim=-1).values)

        return record

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if "TopKRouter" in type(module).__name__:
                hooks.enter_context(module.register_forward_hook(make_recorder(name)))
        yield choices


def count_expert_flips(
    policy: dict[str, list[Tensor]], reference: dict[str, list[Tensor]], *, real: Tensor, vision: Tensor
) -> dict[str, tuple[int, int]]:
    """Return for each pool, summed over layers: tokens that the policy sends to other experts, and all tokens.

    policy, reference: from record_expert_choices, on the same batch, each one forward or one generation (the prompts,
    then token by token; the last token is never fed); real (B, T): False on padding; vision (B, T): True for tokens
    that go to the vision pool.
    """
    flips: dict[str, tuple[int, int]] = {}
    for name, calls in policy.items():
        pool = "vision" if ".vision_moe." in name else "text"
        in_pool = vision if pool == "vision" else ~vision
        if not in_pool.any():  # a pool without tokens may still have run a dummy forward (distributed.dummy_vision)
            continue
        ours, theirs = _by_position(calls, in_pool), _by_position(reference[name], in_pool)
        counted = real & in_pool & (ours[..., 0] >= 0) & (theirs[..., 0] >= 0)
        flipped = (ours != theirs).any(dim=-1) & counted
        flipped_before, total_before = flips.get(pool, (0, 0))
        flips[pool] = (flipped_before + int(flipped.sum()), total_before + int(counted.sum()))
    return flips


def _by_position(calls: list[Tensor], in_pool: Tensor) -> Tensor:
    """Arrange a router's choices, call by call, as (B, T, k); -1 where it made none. in_pool (B, T): its tokens."""
    first, *decoded = calls
    placed = first.new_full((*in_pool.shape, first.shape[-1]), -1)
    width = int((in_pool.sum(dim=0).cumsum(dim=0) <= len(first)).sum())  # positions covered by the first call
    placed[:, :width][in_pool[:, :width]] = first
    # With sharded weights, a rank that has finished its rows keeps decoding until the others have: those are surplus.
    for column, chosen in zip(range(width, in_pool.shape[1]), decoded, strict=False):
        placed[:, column] = chosen
    return placed


def check_routing(seen: RoutedTokenCounts, *, vision_tokens: int, tokens: int | None = None) -> None:
    """Check that every layer sent exactly the vision tokens of the data to its vision pool. Raises ModelError.

    vision_tokens: counted from the images of the batch, not from its ids; tokens: all positions, padding included, if
    known (generation adds text tokens).
    """
    for name, count in seen.vision.items():
        text = seen.text[name.removesuffix("vision_moe") + "text_moe"]
        if count != vision_tokens or (tokens is not None and text != tokens - vision_tokens):
            raise ModelError.at(
                name,
                f"the batch has {vision_tokens} vision tokens, but {count} reached the vision experts and {text} "
                "tokens the text experts",
                why="image tokens in the text experts train the wrong half of the model, with no other symptom",
                fix="load the model with ernie_align.load_model, which derives the routing from input_ids",
            )
