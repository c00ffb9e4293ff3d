"""The parameters of each ERNIE 4.5 family: name, shape, and the part each one belongs to.

Computed from config.json alone, so that `check` can report what a recipe would train without loading torch or weights.
models.load compares this table with the real model every time it loads one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ernie_align.errors import ModelError

# model_type in config.json -> short name of the family
FAMILIES = {"ernie4_5": "dense", "ernie4_5_moe": "moe", "ernie4_5_vl_moe": "vl_moe"}

# Parts that a sequence without images or videos never passes through.
VISION_PARTS = frozenset({"vision_experts", "vision_router", "vision_tower", "resampler"})

# linear: weight of an nn.Linear [out, in]; fused: the experts of a pool [E, out, in]; router: a gate [E, H], fp32;
# frozen: the correction bias, which is not trained by gradient; plain: everything else (norms, biases, embeddings).
Kind = Literal["linear", "fused", "router", "frozen", "plain"]

# transformers' class defaults, for keys that a config.json leaves out.
_TEXT_DEFAULTS = {
    "vocab_size": 103424,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "use_bias": False,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_interval": 1,
}
_DENSE_DEFAULTS = {
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "head_dim": 128,
}
_VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_merge_size": 2,
}


@dataclass(frozen=True)
class ParameterSpec:
    """Name and shape of one parameter.

    name: as in `model.named_parameters()`; layer: its index in the decoder or vision tower, if it belongs to a layer;
    size: number of values.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    kind: Kind
    layer: int | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", math.prod(self.shape))


@dataclass(frozen=True)
class Architecture:
    """All parameters of a model. tied: lm_head shares the weight of the embeddings and has no parameter of its own."""

    family: Literal["dense", "moe", "vl_moe"]
    tensors: tuple[ParameterSpec, ...]
    tied: bool
    num_layers: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str = "config.json") -> Architecture:
        """Read it from the content of a config.json. Raises ModelError for models outside the three families."""
        family = model_family(config, where=where)
        if family == "vl_moe":
            text = {**_TEXT_DEFAULTS, **(config.get("text_config") or {})}
            vision = {**_VISION_DEFAULTS, **(config.get("vision_config") or {})}
            tensors = [*_language_model("model.language_model.", text, family), *_vision("model.", vision, text)]
        else:
            text = {**_TEXT_DEFAULTS, **(_DENSE_DEFAULTS if family == "dense" else {}), **config}
            tensors = list(_language_model("model.", text, family))
        tied = bool(config.get("tie_word_embeddings", True))
        if not tied:
            shape = (text["vocab_size"], text["hidden_size"])
            tensors.append(ParameterSpec("lm_head.weight", shape, "lm_head", "linear"))
        return cls(family, tuple(tensors), tied, text["num_hidden_layers"])

    @cached_property
    def by_part(self) -> dict[str, list[ParameterSpec]]:
        """The parameters of each part this model has, in the order of its parameters."""
        parts: dict[str, list[ParameterSpec]] = {}
        for tensor in self.tensors:
            parts.setdefault(tensor.part, []).append(tensor)
        return parts

    @cached_property
    def has_vision(self) -> bool:
        """True if the model accepts images."""
        return self.family == "vl_moe"

    @cached_property
    def size(self) -> int:
        """Number of values of all parameters."""
        return sum(tensor.size for tensor in self.tensors)


def model_family(config: Mapping[str, Any], *, where: str) -> Literal["dense", "moe", "vl_moe"]:
    """Return the family's short name. Raises ModelError for anything that is not native ERNIE 4.5."""
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    fix = f"use a checkpoint whose model_type is one of {', '.join(FAMILIES)}"
    if model_type == "ernie4_5_moe_vl" or "auto_map" in config:
        why = "this layout needs remote code, which this toolkit never runs"
        fix = "use a revision whose config.json says ernie4_5_vl_moe (or ernie4_5, ernie4_5_moe) and has no auto_map"
        raise ModelError.at(where, f"model_type {model_type!r} is not native ERNIE 4.5", why=why, fix=fix)
    raise ModelError.at(where, f"model_type {model_type!r} is not ERNIE 4.5", fix=fix)


def _linear(
    name: str, out: int, inner: int, part: str, bias: bool, layer: int | None = None
) -> Iterator[ParameterSpec]:
    yield ParameterSpec(f"{name}.weight", (out, inner), part, "linear", layer)
    if bias:
        yield ParameterSpec(f"{name}.bias", (out,), part, "plain", layer)


def _norm(name: str, width: int, part: str, bias: bool = False, layer: int | None = None) -> Iterator[ParameterSpec]:
    for kind in ("weight", "bias") if bias else ("weight",):
        yield ParameterSpec(f"{name}.{kind}", (width,), part, "plain", layer)


def _swiglu(name: str, width: int, hidden: int, part: str, bias: bool, layer: int) -> Iterator[ParameterSpec]:
    yield from _linear(f"{name}.gate_proj", width, hidden, part, bias, layer)
    yield from _linear(f"{name}.up_proj", width, hidden, part, bias, layer)
    yield from _linear(f"{name}.down_proj", hidden, width, part, bias, layer)


def _pool(name: str, experts: int, width: int, hidden: int, pool: str, layer: int) -> Iterator[ParameterSpec]:
    """Yield one pool of experts and its router; pool is text or vision."""
    yield ParameterSpec(f"{name}.gate.weight", (experts, hidden), f"{pool}_router", "router", layer)
    bias = f"{name}.gate.moe_statics.e_score_correction_bias"
    yield ParameterSpec(bias, (1, experts), f"{pool}_router", "frozen", layer)
    yield ParameterSpec(f"{name}.experts.gate_up_proj", (experts, 2 * width, hidden), f"{pool}_experts", "fused", layer)
    yield ParameterSpec(f"{name}.experts.down_proj", (experts, hidden, width), f"{pool}_experts", "fused", layer)


def _is_sparse(config: Mapping[str, Any], family: str, layer: int) -> bool:
    if family == "dense":
        return False
    if family == "vl_moe":
        types = config.get("mlp_layer_types")
        return types[layer] == "sparse" if types else layer > 0
    end = config.get("moe_layer_end_index", -1)
    end = config["num_hidden_layers"] - 1 if end == -1 else end
    in_range = config["moe_layer_start_index"] <= layer <= end
    return in_range and (layer + 1) % config["moe_layer_interval"] == 0


def _language_model(prefix: str, config: Mapping[str, Any], family: str) -> Iterator[ParameterSpec]:
    hidden, bias = config["hidden_size"], bool(config["use_bias"])
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"] or heads
    head_dim = config.get("head_dim") or hidden // heads
    widths = config.get("moe_intermediate_size") or ([1536, 512] if family == "vl_moe" else 1536)
    text_width = widths[0] if isinstance(widths, (list, tuple)) else widths
    yield ParameterSpec(f"{prefix}embed_tokens.weight", (config["vocab_size"], hidden), "embeddings", "plain")
    for layer in range(config["num_hidden_layers"]):
        at = f"{prefix}layers.{layer}."
        for name, out, inner in (
            ("q_proj", heads * head_dim, hidden),
            ("k_proj", kv_heads * head_dim, hidden),
            ("v_proj", kv_heads * head_dim, hidden),
            ("o_proj", hidden, heads * head_dim),
        ):
            yield from _linear(f"{at}self_attn.{name}", out, inner, "attention", bias, layer)
        if _is_sparse(config, family, layer):
            experts = config["moe_num_experts"]
            if family == "vl_moe":
                yield from _pool(f"{at}mlp.text_moe", experts, text_width, hidden, "text", layer)
                yield from _pool(f"{at}mlp.vision_moe", experts, widths[1], hidden, "vision", layer)
            else:
                yield from _pool(f"{at}mlp", experts, text_width, hidden, "text", layer)
            shared = text_width * config["moe_num_shared_experts"]
            if shared:
                yield from _swiglu(f"{at}mlp.shared_experts", shared, hidden, "shared_experts", bias, layer)
        else:
            yield from _swiglu(f"{at}mlp", config["intermediate_size"], hidden, "dense_mlp", bias, layer)
        yield from _norm(f"{at}input_layernorm", hidden, "norms", layer=layer)
        yield from _norm(f"{at}post_attention_layernorm", hidden, "norms", layer=layer)
    yield from _norm(f"{prefix}norm", hidden, "norms")


def _vision(prefix: str, vision: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[ParameterSpec]:
    width, mlp, tower = vision["hidden_size"], vision["intermediate_size"], f"{prefix}vision_tower."
    patch = vision["patch_size"]
    rows, columns = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    part = "vision_tower"
    yield from _linear(f"{tower}patch_embed.proj", width, vision["in_channels"] * rows * columns, part, False)
    for layer in range(vision["depth"]):
        at = f"{tower}blocks.{layer}."
        yield from _norm(f"{at}norm1", width, part, True, layer)
        yield from _norm(f"{at}norm2", width, part, True, layer)
        yield from _linear(f"{at}attn.qkv", 3 * width, width, part, True, layer)
        yield from _linear(f"{at}attn.proj", width, width, part, True, layer)
        yield from _linear(f"{at}mlp.fc1", mlp, width, part, True, layer)
        yield from _linear(f"{at}mlp.fc2", width, mlp, part, True, layer)
    yield from _norm(f"{tower}ln", width, part, True)
    resampler, part = f"{prefix}resampler_model.", "resampler"
    spatial = width * vision["spatial_merge_size"] ** 2
    for name, inner in (("spatial_linear", spatial), ("temporal_linear", spatial * vision["temporal_merge_size"])):
        yield from _linear(f"{resampler}{name}.fc1", spatial, inner, part, True)
        yield from _linear(f"{resampler}{name}.fc2", spatial, spatial, part, True)
        yield from _norm(f"{resampler}{name}.ln", spatial, part, True)
    yield from _linear(f"{resampler}mlp", text["hidden_size"], spatial, part, True)
    yield from _norm(f"{resampler}after_norm", text["hidden_size"], part)
