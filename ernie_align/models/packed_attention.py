"""Documents that share one sequence, told apart by text positions that begin anew: no document sees another.

That is how transformers knows packed rows, but of its three ERNIE 4.5 families only the two text models act on it, and
none of them once a cache exists. Where the documents lie is all that a caller has to say (`position_ids` (1, T), 0 at
the first token of each); what follows from it is derived here: the 3-D positions of each document, as if it stood
alone, the bounds that attention needs, and that there is no cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ernie_align.errors import ModelError
from ernie_align.models.routing import ModalityTokens, mm_token_type_ids

SDPA_BY_DOCUMENT = "sdpa_by_document"


def document_lengths(positions: Tensor) -> list[int]:
    """Text positions (B, T) -> lengths of the documents, row by row. One begins wherever positions do not go on by 1,
    as transformers has it, and with each row."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=-1) != 1
    starts = begins.flatten().nonzero().squeeze(1)
    return starts.diff(append=starts.new_tensor([positions.numel()])).tolist()


def derive_position_ids(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the VL backbone: text positions (B, T) -> [text; 3-D] (4, B, T), by document.

    transformers takes a 2-D tensor for the positions of all three axes and asks no further: images would lose theirs,
    and documents would see one another. Padded rows, which come with a mask, are left to it.
    """
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 2:
        return None
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    grids = kwargs.get("image_grid_thw")
    if grids is None:
        kwargs["position_ids"] = positions[None].expand(4, -1, -1)
        return args, kwargs
    lengths = document_lengths(positions)
    rows, mask = _as_rows(input_ids, lengths)
    types, _ = _as_rows(kwargs["mm_token_type_ids"], lengths)
    derived, _ = module.get_rope_index(rows, types, image_grid_thw=grids, attention_mask=mask)
    derived = derived[:, mask.bool()].view(3, *positions.shape)
    kwargs["position_ids"] = torch.cat([positions[None], derived])
    return args, kwargs


def _as_rows(values: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(B, T) -> one padded row for each document, and which of it is not padding."""
    documents = values.flatten().split(lengths)
    padded = nn.utils.rnn.pad_sequence(documents, batch_first=True)
    kept = torch.arange(padded.shape[1], device=values.device) < torch.tensor(lengths, device=values.device)[:, None]
    return padded, kept.long()


def set_document_bounds(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the decoder, of any family: where rows are packed, hands down where documents end, and keeps
    every cache away, beside which transformers drops the block mask.

    Raises ModelError where a cache is asked for.
    """
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None:
        return None
    if positions.ndim == 3:
        if positions.shape[0] != 4:
            return None
        positions = positions[0]
    lengths = document_lengths(positions)
    if len(lengths) == len(positions):
        return None
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        what = f"a cache for {len(lengths)} documents in {len(positions)} sequences"
        why = "with a cache transformers masks no document from the next"
        raise ModelError.at("forward", what, why=why, fix="pass use_cache=False, or one document a row")
    kwargs["use_cache"] = False
    if len(positions) == 1:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=positions.device).cumsum(0, dtype=torch.int32)
        kwargs["document_lengths"] = lengths
        # the names of transformers' flash attention, which would derive the bounds from 3-D positions otherwise
        kwargs["cu_seq_lens_q"] = kwargs["cu_seq_lens_k"] = bounds
        kwargs["max_length_q"] = kwargs["max_length_k"] = max(lengths)
    elif module.config._attn_implementation not in ("eager", "sdpa"):
        what = f"packed documents in {len(positions)} sequences"
        raise ModelError.at("forward", what, fix="lay them end to end in one sequence")
    return args, kwargs


def install_packed_attention(model: PreTrainedModel) -> None:
    """Install the hooks on a model of any family, behind the one that derives modality. Twice is once."""
    backbone, decoder = model.model, find_decoder(model)
    if decoder is not backbone and derive_position_ids not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(derive_position_ids, with_kwargs=True)
    if set_document_bounds not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(set_document_bounds, with_kwargs=True)


def find_decoder(model: nn.Module) -> PreTrainedModel:
    """The stack of decoder layers, under whatever adapter: of a VL model its language model."""
    stacks = (module for module in model.modules() if isinstance(module, PreTrainedModel) and hasattr(module, "layers"))
    return next(stacks)


def use_per_document_attention(model: nn.Module) -> None:
    """Let the decoder's sdpa attention go through each document by itself.

    With transformers' block mask every document is multiplied with every other one first and masked then; by itself, a
    document of L tokens costs L² and needs no mask. Registered in transformers' public interfaces under a name of its
    own, which only models that are handed to this function use. Any other attention stays what it is.
    """
    decoder = find_decoder(model)
    if decoder.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(SDPA_BY_DOCUMENT, _attention_by_document)
    AttentionMaskInterface.register(SDPA_BY_DOCUMENT, _mask_unless_packed)
    decoder.set_attn_implementation(SDPA_BY_DOCUMENT)


def _attention_by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    document_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D). Without lengths: plain sdpa."""
    if document_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = (states.split(document_lengths, dim=2) for states in (query, key, value))
    outputs = [sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=1), None


def _mask_unless_packed(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """transformers' mask for sdpa; none for whole sequences without padding, whose documents attention keeps apart."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


_PROMPT, _CHOSEN, _REJECTED, _PADDING = range(4)


def shared_prompt_segments(parts: Tensor, width: int) -> Tensor:
    """(P, T): which part each token belongs to."""
    place = torch.arange(width, device=parts.device)
    return (place[None, :, None] >= parts.cumsum(dim=1)[:, None, :]).sum(dim=-1)


def shared_prompt_mask(parts: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(P, 1, T, T): 0 where a token is seen, the least number of `dtype` where it is not.

    Numbers, which are added to attention scores: transformers' eager attention adds booleans too, as 0 and 1.
    Padding sees padding, as no row of scores may be empty.
    """
    part = shared_prompt_segments(parts, width)
    here, there = part[:, :, None], part[:, None, :]
    seen = (here == there) | ((there == _PROMPT) & (here != _PADDING))
    seen = seen & torch.ones(width, width, dtype=torch.bool, device=parts.device).tril()
    hidden = torch.zeros(seen.shape, dtype=dtype, device=parts.device)
    return hidden.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def shared_prompt_positions(
    backbone: nn.Module, input_ids: Tensor, parts: Tensor, image_grid_thw: Tensor | None
) -> Tensor:
    """(P, T), or (3, P, T) with images: the rejected answer begins where the chosen one does.

    image_grid_thw: of the images of each row in turn.
    """
    width = input_ids.shape[1]
    part = shared_prompt_segments(parts, width)
    place = torch.arange(width, device=input_ids.device).expand_as(part)
    restarted = place - parts[:, 1:2] * (part == _REJECTED)
    if image_grid_thw is None:
        return restarted
    tokens = ModalityTokens.from_config(backbone.config)
    apart, _ = backbone.get_rope_index(
        input_ids,
        mm_token_type_ids=mm_token_type_ids(input_ids, tokens),
        image_grid_thw=image_grid_thw,
        attention_mask=(part <= _CHOSEN).long(),
    )
    begin = parts[:, :1]
    # an answer is text, of which all three axes rise by one from token to token
    rejected = apart.gather(2, begin.expand(3, -1, -1)) + restarted - begin
    return torch.where(part == _REJECTED, rejected, apart)


def answer_positions(parts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Where in its row each answer's tokens are, and where they are predicted: (2P, C) each, all chosen answers first.

    The first token of both answers is predicted by the last one of the prompt. Beyond an answer's end, and before the
    first token of an empty prompt, places are within the row and mean nothing.
    """
    prompt, chosen, _ = parts.unbind(dim=1)
    steps = torch.arange(longest, device=parts.device)
    found = torch.cat([prompt, prompt + chosen])[:, None] + steps
    predicted = torch.where(steps == 0, prompt.repeat(2)[:, None], found) - 1
    last = parts.sum(dim=1).repeat(2)[:, None] - 1
    return found.minimum(last), predicted.clamp(min=0).minimum(last)
