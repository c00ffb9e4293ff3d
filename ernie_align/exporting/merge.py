"""An adapter becomes part of the weights it sits on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ernie_align.errors import ExportError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

Accumulate = Literal["float32", "native"]


def prove_loaded(model: PeftModel, folder: Path) -> int:
    """Every tensor of the adapter's file is in the model, bit for bit. Their number.

    PEFT only warns where tensors of a file fit nowhere, or where an adapted layer finds none. Raises ExportError.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    held = get_peft_model_state_dict(model)
    kept = load_file(folder / "adapter_model.safetensors")
    odd = sorted(
        name
        for name in held.keys() | kept.keys()
        if name not in held or name not in kept or not held[name].cpu().equal(kept[name].to(held[name].dtype))
    )
    if odd:
        what = f"{len(odd)} of {len(kept)} tensors of the adapter did not reach the model, {odd[0]} among them"
        raise ExportError.at(str(folder), what, fix="use the base and the version of peft that it was trained with")
    return len(kept)


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
