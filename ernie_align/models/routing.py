"""Derive from `input_ids` which tokens go to the vision experts, in a hook on the backbone.

This is the only module that knows the token ids of images and videos. Because routing is computed where it is used, for
every caller, no collator, truncation, decode step, upstream trainer or copy of the model can omit it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from ernie_align.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

TEXT, IMAGE, VIDEO = 0, 1, 2


@dataclass(frozen=True)
class ModalityTokens:
    """Ids of the image and video placeholders, and of the tokens that start and end an image or a video."""

    image: int
    image_start: int
    image_end: int
    video: int
    video_start: int
    video_end: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Any) -> ModalityTokens | None:
        """Read them from a config.json or a transformers config; None for a model without vision."""
        values = config if isinstance(config, Mapping) else config.to_dict()
        if values.get("image_token_id") is None:
            return None
        names = ("image", "image_start", "image_end", "video", "video_start", "video_end")
        return cls(*(values[f"{name}_token_id"] for name in names))

    @property
    def ids(self) -> frozenset[int]:
        """All six: the tokens that go to the vision experts and may not be generated."""
        return frozenset(astuple(self))

    @property
    def image_ids(self) -> tuple[int, int, int]:
        """Ids of the image placeholder, start and end tokens."""
        return self.image, self.image_start, self.image_end

    @property
    def video_ids(self) -> tuple[int, int, int]:
        """Ids of the video placeholder, start and end tokens."""
        return self.video, self.video_start, self.video_end


def moe_mm_token_type_ids(input_ids: torch.Tensor, tokens: ModalityTokens) -> torch.Tensor:
    """(B, T) ids -> (B, T) int64: 0 text, 1 image, 2 video; start and end tokens count as vision."""
    import torch

    types = torch.zeros_like(input_ids)
    types[torch.isin(input_ids, input_ids.new_tensor(tokens.image_ids))] = IMAGE
    types[torch.isin(input_ids, input_ids.new_tensor(tokens.video_ids))] = VIDEO
    return types


def mm_token_type_ids(input_ids: torch.Tensor, tokens: ModalityTokens) -> torch.Tensor:
    """(B, T) ids -> (B, T) int64: 1 and 2 at the placeholders of images and videos only, as the 3-D RoPE expects."""
    types = (input_ids == tokens.image).long() * IMAGE
    return types + (input_ids == tokens.video).long() * VIDEO


def derive_token_types(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the backbone: set both token type tensors from `input_ids`, whatever the caller passed.

    A module-level function that reads the module's own config, so that a deep copy of the model keeps a working hook.
    Raises ModelError for inputs_embeds without input_ids or token types.
    """
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    if input_ids is None:
        if kwargs.get("moe_mm_token_type_ids") is None:
            raise ModelError.at(
                "forward",
                "got inputs_embeds without input_ids, so vision tokens cannot be identified",
                why="the model would send every token to the text experts",
                fix="pass input_ids as well, or moe_mm_token_type_ids (zeros for text)",
            )
        return None
    tokens = ModalityTokens.from_config(module.config)
    kwargs["moe_mm_token_type_ids"] = moe_mm_token_type_ids(input_ids, tokens)
    kwargs["mm_token_type_ids"] = mm_token_type_ids(input_ids, tokens)
    return args, kwargs


def install_routing(backbone: nn.Module) -> None:
    """Install the hook on an `Ernie4_5_VLMoeModel`, before other hooks. Calling it again has no effect."""
    if derive_token_types not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(derive_token_types, prepend=True, with_kwargs=True)
