"""LoRA on experts through PEFT's own door: its wrapper of a parameter, with a forward that never builds W + BA.

PEFT adds BA to the whole stack of experts, twice in each forward, and keeps the sum for the backward pass. Here the
update stays two thin products beside the frozen one (models.grouped). Parameters, names, files and merging are PEFT's:
what is saved here loads in plain PEFT, and the other way round.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners import lora
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeExperts
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeExperts

from ernie_align.errors import ModelError
from ernie_align.models.checkpoint_files import CheckpointFiles
from ernie_align.models.grouped_gemm import LoraFactors, lora_experts_forward

# Kernels of transformers' experts that grouped products stand in for: the default, and the one that generation
# switches to on a GPU. Whoever asks for another one gets it, with PEFT's weights in it.
_KERNELS = ("grouped_mm", "batched_mm")
_WEIGHTS = "adapter_model.safetensors"
_WRONG_BASE = "restore the folder, or use the base and the version of peft that it was trained with"


def register_expert_lora(config: LoraConfig) -> LoraConfig:
    """The config, with our wrapper for the experts of both sparse families. It is never written to files."""
    config._register_custom_module({Ernie4_5_MoeExperts: ParamWrapper, Ernie4_5_VLMoeMoeExperts: ParamWrapper})
    return config


def load_adapter(model: nn.Module, path: str, *, is_trainable: bool = False, revision: str | None = None) -> PeftModel:
    """PeftModel.from_pretrained, with our wrapper where the adapter is a LoRA. Raises what PEFT raises.

    Raises ModelError for weights that are broken, of which any finds no place in the model or any place finds none, or
    in any format but safetensors: PEFT would read a pickle.
    """
    revision = revision or "main"
    files = CheckpointFiles(path, revision)
    files.need(_WEIGHTS)
    config = PeftConfig.from_pretrained(path, revision=revision)
    if isinstance(config, LoraConfig):
        register_expert_lora(config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below, as an error
            warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model, which is a no-op")
            loaded = PeftModel.from_pretrained(model, path, config=config, is_trainable=is_trainable, revision=revision)
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError) as error:  # torch's lists the tensors of another shape
        lines = str(error).splitlines()
        odd = [line.strip() for line in lines if "size mismatch for" in line]
        what = f"{len(odd)} tensors are of another shape, {odd[0]}" if odd else lines[0]
        raise ModelError.at(path, f"the adapter could not be loaded: {what}", fix=_WRONG_BASE) from error
    if not any(weight.is_meta for weight in loaded.parameters()):  # the first process proves it (models.first)
        validate_loaded_adapter(loaded, files.folder)
    return sort_target_modules(loaded)


def validate_loaded_adapter(model: PeftModel, folder: Path) -> int:
    """Every tensor of the adapter's file is in the model, bit for bit, and no adapted layer is without. Their number.

    PEFT only warns where a layer finds none, and says nothing of tensors that fit nowhere. It also renames, and fuses,
    what older versions wrote, so it is asked to load the file once more: nothing is left over, and nothing changes.
    Raises ModelError.
    """
    (adapter,) = model.active_adapters
    kept = load_file(folder / _WEIGHTS)
    # the adapter's own alone: PEFT's get_peft_model_state_dict would gather the base too, where processes share it
    own = {name: tensor for name, tensor in model.state_dict().items() if adapter in name.split(".")}
    held = {name: tensor.clone() for name, tensor in own.items()}
    told = set_peft_model_state_dict(model, kept, adapter_name=adapter)
    changed = {name for name, tensor in own.items() if not _bits(tensor).equal(_bits(held[name]))}
    odd = sorted(changed | {name for name in told.missing_keys if name in own} | {*told.unexpected_keys})
    if odd:
        first = odd[0].replace(f".{adapter}.", ".")  # as the file has it
        what = f"{len(odd)} tensors of the adapter did not reach the model, {first} among them; its file holds "
        raise ModelError.at(str(folder), what + str(len(kept)), fix=_WRONG_BASE)
    return len(kept)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)  # a NaN is no number, and the same bits


def sort_target_modules(model: PeftModel) -> PeftModel:
    """PEFT keeps the names of adapted modules in a set, and writes it in another order in every process of Python. In
    order, the same adapter is the same bytes."""
    for config in model.peft_config.values():
        if isinstance(getattr(config, "target_modules", None), set):
            config.target_modules = sorted(config.target_modules)
    return model


class ParamWrapper(lora.ParamWrapper):
    """PEFT's wrapper of one weight of a pool. It bears PEFT's name because PEFT finds such layers by that name.

    Two adapted weights of one pool are two wrappers, one within the other; the outer one speaks for both.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (N, H), and the router's choice and weights, both (N, k) -> (N, H)."""
        experts = self.get_base_layer()
        obstacle = _obstacle(experts)
        if obstacle:
            # Python itself shows a warning once
            warnings.warn(f"expert LoRA takes PEFT's slow path: {obstacle}", RuntimeWarning, stacklevel=2)
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        updates = {wrapper.parameter_name: wrapper.update() for wrapper in self._wrappers()}
        updates = {name: update for name, update in updates.items() if update is not None}
        if not updates:
            return experts(x, *args, **kwargs)
        if experts._is_expert_parallel:
            with experts.low_rank.adapted(updates):
                return experts(x, *args, **kwargs)
        gate_up, down = updates.get("gate_up_proj"), updates.get("down_proj")
        return lora_experts_forward(experts, x, *args, **kwargs, gate_up=gate_up, down=down)

    def _wrappers(self) -> Iterator[ParamWrapper]:
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            yield layer
            layer = layer.base_layer

    def update(self) -> LoraFactors | None:
        """The sum of the active adapters, side by side along the rank; None where there is nothing to add."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return None
        parts = [self._factors(adapter) for adapter in self.active_adapters if adapter in self.lora_A]
        if len(parts) < 2:
            return parts[0] if parts else None
        a, b, scaling = zip(*parts, strict=True)
        return LoraFactors(torch.cat(a, dim=1), torch.cat(b, dim=1), torch.cat(scaling))

    def _factors(self, adapter: str) -> LoraFactors:
        """PEFT keeps A as (E·r, in) and B as (out, r·E), in float32 also where the experts are bfloat16. Of dealt-out
        experts, only this process's are taken."""
        experts = self.get_base_layer()
        own = experts.low_rank.own if experts._is_expert_parallel else slice(None)
        a = self.lora_A[adapter].weight.view(self.num_experts, self.r[adapter], -1)[own]
        b = self.lora_B[adapter].weight.view(-1, self.r[adapter], self.num_experts).permute(2, 1, 0)[own]
        rows = -self.r[adapter] % 8  # the kernels want strides of 16 bytes, of bfloat16 too
        a, b = (pad(factor, (0, 0, 0, rows)) if rows else factor for factor in (a, b))
        dtype = self.get_param().dtype
        scaling = torch.full(a.shape[1:2], self.scaling[adapter], dtype=torch.float32, device=a.device)
        return LoraFactors(a.to(dtype), b.to(dtype).contiguous(), scaling)


def _obstacle(experts: nn.Module) -> str | None:
    """Why grouped products cannot serve this pool, if they cannot."""
    weights = (experts.gate_up_proj, experts.down_proj)
    kernel, device = experts.config._experts_implementation, weights[0].device
    if kernel not in _KERNELS:
        return f"the experts' kernel is {kernel}, not one of {', '.join(_KERNELS)}"
    if experts.config.hidden_act != "silu":
        return f"the experts' activation is {experts.config.hidden_act}, not silu"
    if experts._is_expert_parallel and not hasattr(experts, "low_rank"):
        return "the experts were spread over processes by another hand (models.parallel)"
    kinds = (DTensor,) if experts._is_expert_parallel else (nn.Parameter,)
    if any(type(weight) not in kinds or not weight.is_floating_point() for weight in weights):
        return "the experts' weights are quantized, distributed or parametrized"
    if any(weight.requires_grad for weight in weights):
        return "the experts' own weights are trained"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "grouped products need a GPU of compute capability 8.0"
    if device.type not in ("cpu", "cuda"):
        return f"grouped products are untested on {device.type}"
    return None
