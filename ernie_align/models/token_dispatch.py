"""Dispatch tokens to the text and vision experts by index, computed once per batch, and count what each pool gets.

transformers' block masks (B, T, H) element by element, four times in every layer, and synchronizes with the device in
every layer to find out if the batch has vision tokens. The indices are the same in all layers: they are computed at the
start of the language model and passed in place of `moe_mm_token_type_ids`, which it forwards unchanged. Nothing is kept
between forwards, so a recomputed layer, a decode step and a copy of the model each use the indices of their own batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock

from ernie_align.errors import ModelError


class ExpertIndices(NamedTuple):
    """Indices into the B·T tokens.

    text, vision: the tokens of each pool; inverse (B·T,): the index of each token in [text; vision].
    """

    text: Tensor
    vision: Tensor
    inverse: Tensor

    @classmethod
    def from_token_types(cls, types: Tensor | ExpertIndices | None) -> ExpertIndices | None:
        """Convert (B, T) token types: 0 text, 1 or 2 vision. None if no token is vision: all go to the text pool.

        Indices are returned unchanged.
        """
        if types is None or isinstance(types, cls):
            return types
        is_vision = types.reshape(-1).bool()
        vision = is_vision.nonzero().squeeze(1)
        if len(vision) == 0:
            return None
        text = (~is_vision).nonzero().squeeze(1)
        inverse = torch.empty_like(is_vision, dtype=torch.long)
        inverse[torch.cat([text, vision])] = torch.arange(len(inverse), device=inverse.device)
        return cls(text, vision, inverse)


class IndexedMoeBlock(Ernie4_5_VLMoeMoeBlock):
    """A replacement for transformers' block: same children and names, bit-equal outputs and gradients."""

    def __init__(self, block: Ernie4_5_VLMoeMoeBlock):
        nn.Module.__init__(self)  # the stock constructor would create new weights
        self.num_experts = block.num_experts
        self.text_moe, self.vision_moe = block.text_moe, block.vision_moe
        self.shared_experts = block.shared_experts
        self.train(block.training)

    def forward(
        self, hidden_states: Tensor, moe_mm_token_type_ids: ExpertIndices | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, T, H), and indices or token types -> (B, T, H) and router logits (B·T, E)."""
        indices = ExpertIndices.from_token_types(moe_mm_token_type_ids)
        if indices is None:
            return super().forward(hidden_states)
        # before the pools, as in the stock block: the order in which autograd sums their gradients depends on it
        shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        pools = (self.text_moe, indices.text), (self.vision_moe, indices.vision)
        outputs, logits = zip(*(pool(tokens.index_select(0, index)) for pool, index in pools), strict=True)
        # the pools return flat vectors
        output = torch.cat(outputs).view_as(tokens).index_select(0, indices.inverse).view_as(hidden_states)
        if shared is not None:
            output = output + shared
        return output, torch.cat(logits).view(-1, self.num_experts).index_select(0, indices.inverse)


def compute_expert_indices(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the language model: replace token types by indices.

    A module-level function, so that a deep copy of the model keeps it.
    """
    kwargs["moe_mm_token_type_ids"] = ExpertIndices.from_token_types(kwargs.get("moe_mm_token_type_ids"))
    return args, kwargs


def install_token_dispatch(language_model: nn.Module) -> None:
    """Replace the block of each sparse layer of an `Ernie4_5_VLMoeTextModel`. Calling it again has no effect.

    Only this model's child modules are replaced, as when an adapter is attached: no class is patched.
    """
    if compute_expert_indices in language_model._forward_pre_hooks.values():
        return
    language_model.register_forward_pre_hook(compute_expert_indices, with_kwargs=True)
    for layer in language_model.layers:
        if isinstance(layer.mlp, Ernie4_5_VLMoeMoeBlock):
            layer.mlp = IndexedMoeBlock(layer.mlp)


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
