"""The only room that knows modality token ids: which tokens are vision, told to the model at its backbone.

The keystone of routing: what pool a token goes to is a function of `input_ids`, so it is computed where it is used, for
whoever calls. No collator, truncation, decode step, upstream trainer or copy of the model can forget it.
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
    """Ids of the placeholders and of the tokens that open and close an image or a video."""

    image: int
    image_start: int
    image_end: int
    video: int
    video_start: int
    video_end: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Any) -> ModalityTokens | None:
        """From a config.json or a transformers config; None for a model without vision."""
        values = config if isinstance(config, Mapping) else config.to_dict()
        if values.get("image_token_id") is None:
            return None
        names = ("image", "image_start", "image_end", "video", "video_start", "video_end")
        return cls(*(values[f"{name}_token_id"] for name in names))

    @property
    def ids(self) -> frozenset[int]:
        """All six: the tokens that go to the vision pool, and that no answer may contain."""
        return frozenset(astuple(self))

    @property
    def image_ids(self) -> tuple[int, int, int]:
        """The three ids of images."""
        return self.image, self.image_start, self.image_end

    @property
    def video_ids(self) -> tuple[int, int, int]:
        """The three ids of videos."""
        return self.video, self.video_start, self.video_end


def moe_mm_token_type_ids(input_ids: torch.Tensor, tokens: ModalityTokens) -> torch.Tensor:
    """(B, T) ids -> (B, T) int64: 0 text pool, 1 and 2 vision pool (image, video); start and end tokens count."""
    import torch

    types = torch.zeros_like(input_ids)
    types[torch.isin(input_ids, input_ids.new_tensor(tokens.image_ids))] = IMAGE
    types[torch.isin(input_ids, input_ids.new_tensor(tokens.video_ids))] = VIDEO
    return types


def mm_token_type_ids(input_ids: torch.Tensor, tokens: ModalityTokens) -> torch.Tensor:
    """(B, T) ids -> (B, T) int64: placeholders only (1 image, 2 video), which is what the 3-D rope reads."""
    types = (input_ids == tokens.image).long() * IMAGE
    return types + (input_ids == tokens.video).long() * VIDEO


def derive_token_types(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the backbone: whatever the caller passed, both type tensors follow from `input_ids`.

    A plain function that reads the module's own config, so that a deep copy of the model carries a working hook.
    """
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    if input_ids is None:
        if kwargs.get("moe_mm_token_type_ids") is None:
            raise ModelError.at(
                "forward",
                "inputs_embeds without input_ids: nothing says which tokens are vision",
                why="the model would send every token to the text experts",
                fix="pass input_ids, or moe_mm_token_type_ids (zeros for text alone) beside inputs_embeds",
            )
        return None
    tokens = ModalityTokens.from_config(module.config)
    kwargs["moe_mm_token_type_ids"] = moe_mm_token_type_ids(input_ids, tokens)
    kwargs["mm_token_type_ids"] = mm_token_type_ids(input_ids, tokens)
    return args, kwargs


def install_routing(backbone: nn.Module) -> None:
    """Install the hook on an `Ernie4_5_VLMoeModel`, before any other hook. Doing it twice does it once."""
    if derive_token_types not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(derive_token_types, prepend=True, with_kwargs=True)
