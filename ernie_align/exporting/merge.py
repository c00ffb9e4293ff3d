"""An adapter becomes part of the weights it sits on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

Accumulate = Literal["float32", "native"]


def merge(model: PeftModel, *, accumulate: Accumulate = "float32") -> PreTrainedModel:
    """W <- W + scaling · B·A for each adapted tensor. Returns the base model, without any adapter layer.

    accumulate: float32 computes product and sum in float32 and rounds once to W's dtype; native is PEFT's own way,
    which rounds the product for experts, routers and other bare parameters before it is added.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
            dtype = weight.dtype
            if accumulate == "float32":
                weight.data = weight.data.float()
            module.merge()
            weight.data = weight.data.to(dtype)
    return model.unload()


def digests(model: nn.Module) -> dict[str, str]:
    """Name of each parameter -> SHA-256 of its dtype, shape and bits."""
    import torch

    found = {}
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        found[name] = digest.hexdigest()
    return found
