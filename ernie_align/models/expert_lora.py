"""LoRA on experts: PEFT's wrapper of a parameter, with a forward that never computes W + BA.

PEFT adds BA to the weights of all experts, twice in each forward, and keeps the sum for the backward pass. Here the
update is two thin products added to the frozen one (models.grouped_gemm). Parameters, names, files and merging are
PEFT's: an adapter saved here loads in plain PEFT, and the other way round.
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

# Kernels of transformers' experts that grouped GEMMs replace: the default, and the one that generation switches to on a
# GPU. Any other kernel is used as configured, with PEFT's weights.
_KERNELS = ("grouped_mm", "batched_mm")
_WEIGHTS = "adapter_model.safetensors"
_WRONG_BASE = "restore the folder, or use the base model and the peft version that it was trained with"


def register_expert_lora(config: LoraConfig) -> LoraConfig:
    """Add our wrapper for the experts of both sparse families to the config. The wrapper is not saved in files."""
    config._register_custom_module({Ernie4_5_MoeExperts: ParamWrapper, Ernie4_5_VLMoeMoeExperts: ParamWrapper})
    return config


def load_adapter(model: nn.Module, path: str, *, is_trainable: bool = False, revision: str | None = None) -> PeftModel:
    """Load an adapter with PeftModel.from_pretrained, with our wrapper for a LoRA. Raises what PEFT raises.

    Raises ModelError for corrupt weights, for missing, unexpected or differently shaped tensors, and for any format but
    safetensors (PEFT would load a pickle).
    """
    revision = revision or "main"
    files = CheckpointFiles(path, revision)
    files.require(_WEIGHTS)
    config = PeftConfig.from_pretrained(path, revision=revision)
    if isinstance(config, LoraConfig):
        register_expert_lora(config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model, which is a no-op")
            loaded = PeftModel.from_pretrained(model, path, config=config, is_trainable=is_trainable, revision=revision)
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError) as error:  # torch lists the tensors of another shape
        lines = str(error).splitlines()
        mismatched = [line.strip() for line in lines if "size mismatch for" in line]
        what = f"{len(mismatched)} tensors have another shape: {mismatched[0]}" if mismatched else lines[0]
        raise ModelError.at(path, f"the adapter could not be loaded: {what}", fix=_WRONG_BASE) from error
    if not any(weight.is_meta for weight in loaded.parameters()):  # on meta: rank 0 does it
        validate_loaded_adapter(loaded, files.folder)
    return sort_target_modules(loaded)


def validate_loaded_adapter(model: PeftModel, folder: Path) -> int:
    """Check that the model holds every tensor of the adapter's file, bit for bit, and return their number.

    PEFT only warns about a layer without tensors, and ignores tensors that match no layer. It also renames and fuses
    tensors of older versions, so PEFT itself loads the file a second time: that must change nothing and leave no key.
    Raises ModelError.
    """
    (adapter,) = model.active_adapters
    saved = load_file(folder / _WEIGHTS)
    # not PEFT's get_peft_model_state_dict, which would gather a sharded base model too
    loaded = {name: tensor for name, tensor in model.state_dict().items() if adapter in name.split(".")}
    before = {name: tensor.clone() for name, tensor in loaded.items()}
    keys = set_peft_model_state_dict(model, saved, adapter_name=adapter)
    changed = {name for name, tensor in loaded.items() if not _bits(tensor).equal(_bits(before[name]))}
    differing = sorted(changed | {name for name in keys.missing_keys if name in loaded} | {*keys.unexpected_keys})
    if differing:
        name = differing[0].replace(f".{adapter}.", ".")  # as in the file
        what = f"{len(differing)} tensors do not match the model, for example {name}; the file has {len(saved)} tensors"
        raise ModelError.at(str(folder), what, fix=_WRONG_BASE)
    return len(saved)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)  # NaN differs from itself, its bits do not


def sort_target_modules(model: PeftModel) -> PeftModel:
    """Sort the names of adapted modules, so that the same adapter is saved as the same bytes.

    PEFT keeps them in a set, whose order differs between Python processes.
    """
    for config in model.peft_config.values():
        if isinstance(getattr(config, "target_modules", None), set):
            config.target_modules = sorted(config.target_modules)
    return model


class ParamWrapper(lora.ParamWrapper):
    """PEFT's wrapper of one weight of a pool. It has PEFT's name because PEFT finds such layers by that name.

    Two adapted weights of one pool are two nested wrappers; the forward of the outer one handles both.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (N, H), and the router's choices and weights, both (N, k) -> (N, H)."""
        experts = self.get_base_layer()
        obstacle = _obstacle(experts)
        if obstacle:
            # Python shows a warning once
            warnings.warn(f"expert LoRA uses PEFT's slow path: {obstacle}", RuntimeWarning, stacklevel=2)
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        updates = {wrapper.parameter_name: wrapper.update() for wrapper in self._wrappers()}
        updates = {name: update for name, update in updates.items() if update is not None}
        if not updates:
            return experts(x, *args, **kwargs)
        if experts._is_expert_parallel:
            with experts.lora_ep.apply_updates(updates):
                return experts(x, *args, **kwargs)
        gate_up, down = updates.get("gate_up_proj"), updates.get("down_proj")
        return lora_experts_forward(experts, x, *args, **kwargs, gate_up=gate_up, down=down)

    def _wrappers(self) -> Iterator[ParamWrapper]:
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            yield layer
            layer = layer.base_layer

    def update(self) -> LoraFactors | None:
        """Return the active adapters, concatenated along the rank; None if there is nothing to add."""
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
        """Return one adapter's factors for the experts on this rank, in the dtype of the experts.

        PEFT keeps A as (E·r, in) and B as (out, r·E), in float32 even if the experts are bfloat16.
        """
        experts = self.get_base_layer()
        local = experts.lora_ep.local_experts if experts._is_expert_parallel else slice(None)
        a = self.lora_A[adapter].weight.view(self.num_experts, self.r[adapter], -1)[local]
        b = self.lora_B[adapter].weight.view(-1, self.r[adapter], self.num_experts).permute(2, 1, 0)[local]
        rows = -self.r[adapter] % 8  # the kernels require strides of 16 bytes, also in bfloat16
        a, b = (pad(factor, (0, 0, 0, rows)) if rows else factor for factor in (a, b))
        dtype = self.get_param().dtype
        scaling = torch.full(a.shape[1:2], self.scaling[adapter], dtype=torch.float32, device=a.device)
        return LoraFactors(a.to(dtype), b.to(dtype).contiguous(), scaling)


def _obstacle(experts: nn.Module) -> str | None:
    """Return why grouped GEMMs cannot be used for this pool, or None."""
    weights = (experts.gate_up_proj, experts.down_proj)
    kernel, device = experts.config._experts_implementation, weights[0].device
    if kernel not in _KERNELS:
        return f"the experts' kernel is {kernel}, not one of {', '.join(_KERNELS)}"
    if experts.config.hidden_act != "silu":
        return f"the experts' activation is {experts.config.hidden_act}, not silu"
    if experts._is_expert_parallel and not hasattr(experts, "lora_ep"):
        return "the experts are distributed by another implementation than models.distributed.sharding"
    kinds = (DTensor,) if experts._is_expert_parallel else (nn.Parameter,)
    if any(type(weight) not in kinds or not weight.is_floating_point() for weight in weights):
        return "the experts' weights are quantized, distributed or parametrized"
    if any(weight.requires_grad for weight in weights):
        return "the experts' own weights are trained"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "grouped GEMMs need a GPU of compute capability 8.0"
    if device.type not in ("cpu", "cuda"):
        return f"grouped GEMMs are not tested on {device.type}"
    return None
