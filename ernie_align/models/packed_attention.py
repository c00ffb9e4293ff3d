"""Attention over several examples in one sequence: packed documents, and a prompt shared by two answers.

Packed: text positions restart at 0 with each document, and no document attends to another. transformers detects packed
rows by that, but of its three ERNIE 4.5 families only the two text models use it, and none of them with a cache. The
caller passes `position_ids` (1, T) only; the rest is derived here: the 3-D positions within each document, the bounds
that attention needs, and `use_cache=False`.

Shared prompt: a row is [prompt | chosen | rejected | padding]. Each answer attends to the prompt and itself, at the
positions that follow the prompt, so every token has the logits of a row of its own. Shapes: P pairs, T tokens, C tokens
of the longest answer; `lengths` (P, 3) holds the lengths of prompt, chosen and rejected.
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
    """Text positions (B, T) -> lengths of the documents, row by row.

    As in transformers, a document starts wherever positions do not increase by 1; each row starts one too.
    """
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=-1) != 1
    starts = begins.flatten().nonzero().squeeze(1)
    return starts.diff(append=starts.new_tensor([positions.numel()])).tolist()


def derive_position_ids(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the VL backbone: text positions (B, T) -> [text; 3-D] (4, B, T), document by document.

    transformers uses a 2-D tensor as the positions of all three axes: image positions would be lost, and documents
    would attend to one another. Rows with an attention mask are left to transformers.
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
    """(B, T) -> one padded row for each document, and its mask: 0 on padding."""
    documents = values.flatten().split(lengths)
    padded = nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = torch.arange(padded.shape[1], device=values.device) < torch.tensor(lengths, device=values.device)[:, None]
    return padded, mask.long()


def set_document_bounds(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the decoder of any family: for packed rows, pass the bounds of documents and no cache.

    With a cache, transformers drops the block mask. Raises ModelError if the caller passes one.
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
        what = f"got a cache with {len(lengths)} documents packed in {len(positions)} sequences"
        why = "with a cache, transformers lets documents of a sequence attend to one another"
        raise ModelError.at("forward", what, why=why, fix="pass use_cache=False, or one document per row")
    kwargs["use_cache"] = False
    if len(positions) == 1:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=positions.device).cumsum(0, dtype=torch.int32)
        kwargs["document_lengths"] = lengths
        # transformers' names for flash attention, which would otherwise derive the bounds from 3-D positions
        kwargs["cu_seq_lens_q"] = kwargs["cu_seq_lens_k"] = bounds
        kwargs["max_length_q"] = kwargs["max_length_k"] = max(lengths)
    elif module.config._attn_implementation not in ("eager", "sdpa"):
        what = f"{module.config._attn_implementation} attention needs packed documents in one sequence, "
        what += f"got {len(positions)} sequences"
        raise ModelError.at("forward", what, fix="concatenate the documents to one sequence, or use sdpa")
    return args, kwargs


def install_packed_attention(model: PreTrainedModel) -> None:
    """Install the hooks on a model of any family, after the routing hook. Calling it again has no effect."""
    backbone, decoder = model.model, find_decoder(model)
    if decoder is not backbone and derive_position_ids not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(derive_position_ids, with_kwargs=True)
    if set_document_bounds not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(set_document_bounds, with_kwargs=True)


def find_decoder(model: nn.Module) -> PreTrainedModel:
    """Return the stack of decoder layers, with or without adapters; the language model of a VL model."""
    stacks = (module for module in model.modules() if isinstance(module, PreTrainedModel) and hasattr(module, "layers"))
    return next(stacks)


def use_per_document_attention(model: nn.Module) -> None:
    """Switch the decoder from sdpa to an attention that processes each document separately.

    transformers' block mask computes scores between all documents and then masks them; separately, a document of L
    tokens costs L² and needs no mask. It is registered in transformers' public interfaces under its own name, which
    only models passed to this function use. Does nothing for other attention implementations.
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
    """Return transformers' sdpa mask, or None for full sequences without padding, where attention needs none."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


_PROMPT, _CHOSEN, _REJECTED, _PADDING = range(4)


def shared_prompt_segments(lengths: Tensor, width: int) -> Tensor:
    """Return (P, T): the segment of each token, 0 prompt, 1 chosen, 2 rejected, 3 padding."""
    index = torch.arange(width, device=lengths.device)
    return (index[None, :, None] >= lengths.cumsum(dim=1)[:, None, :]).sum(dim=-1)


def shared_prompt_mask(lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return the attention mask (P, 1, T, T): 0 where a token may attend, the minimum of `dtype` elsewhere.

    Numbers, not booleans, because transformers' eager attention adds the mask to the scores.
    Padding attends to padding, because no row of scores may be empty.
    """
    segments = shared_prompt_segments(lengths, width)
    query, key = segments[:, :, None], segments[:, None, :]
    visible = (query == key) | ((key == _PROMPT) & (query != _PADDING))
    visible = visible & torch.ones(width, width, dtype=torch.bool, device=lengths.device).tril()
    mask = torch.zeros(visible.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def shared_prompt_positions(
    backbone: nn.Module, input_ids: Tensor, lengths: Tensor, image_grid_thw: Tensor | None
) -> Tensor:
    """Return position ids (P, T), or (3, P, T) with images: the rejected answer starts where the chosen one does.

    image_grid_thw: of the images of each row in turn.
    """
    width = input_ids.shape[1]
    segments = shared_prompt_segments(lengths, width)
    index = torch.arange(width, device=input_ids.device).expand_as(segments)
    restarted = index - lengths[:, 1:2] * (segments == _REJECTED)
    if image_grid_thw is None:
        return restarted
    tokens = ModalityTokens.from_config(backbone.config)
    positions, _ = backbone.get_rope_index(
        input_ids,
        mm_token_type_ids=mm_token_type_ids(input_ids, tokens),
        image_grid_thw=image_grid_thw,
        attention_mask=(segments <= _CHOSEN).long(),
    )
    start = lengths[:, :1]
    # an answer is text, whose positions on all three axes increase by one per token
    rejected = positions.gather(2, start.expand(3, -1, -1)) + restarted - start
    return torch.where(segments == _REJECTED, rejected, positions)


def answer_positions(lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return where each answer's tokens are in its row, and where they are predicted: (2P, C) each, chosen ones first.

    The first token of both answers is predicted by the last one of the prompt. Past the end of an answer, and before
    the first token of an empty prompt, indices stay within the row and are to be ignored.
    """
    prompt, chosen, _ = lengths.unbind(dim=1)
    steps = torch.arange(longest, device=lengths.device)
    token_at = torch.cat([prompt, prompt + chosen])[:, None] + steps
    predicted_at = torch.where(steps == 0, prompt.repeat(2)[:, None], token_at) - 1
    last = lengths.sum(dim=1).repeat(2)[:, None] - 1
    return token_at.minimum(last), predicted_at.clamp(min=0).minimum(last)
