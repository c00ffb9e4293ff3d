"""The widths that memory and time follow from, read off a model's table of parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ernie_align.models.architecture import Architecture

_TOP_K, _TOWER_HEADS, _CONTEXT = 6, 16, 131072  # transformers' class defaults


@dataclass(frozen=True)
class Pool:
    """One pool of experts in one layer."""

    experts: int
    width: int


@dataclass(frozen=True)
class Layer:
    """One decoder layer. mlp: width of the dense or shared SwiGLU, 0 if it has none; pools: by part name."""

    mlp: int
    mlp_part: str
    pools: dict[str, Pool]


@dataclass(frozen=True)
class Tower:
    """The vision tower and its resampler.

    merge: patches of a token; spatial: width of the resampler; pixels: values of a patch.
    """

    depth: int
    width: int
    mlp: int
    heads: int
    merge: int
    spatial: int
    pixels: int


@dataclass(frozen=True)
class ModelShape:
    """H hidden, V vocabulary, widths of the queries and of keys (or values), top_k experts a token."""

    hidden: int
    vocabulary: int
    queries: int
    keys: int
    heads: int
    top_k: int
    context: int
    layers: tuple[Layer, ...]
    tower: Tower | None

    @classmethod
    def of(cls, architecture: Architecture, config: Mapping[str, Any]) -> ModelShape:
        """From the table of parts; head counts and top-k, which no tensor shows, from config.json."""
        text = config.get("text_config") or config
        vision = config.get("vision_config") or {}
        tensors = {tensor.name: tensor for tensor in architecture.tensors}
        stem = next(name for name in tensors if name.endswith("embed_tokens.weight")).removesuffix(
            "embed_tokens.weight"
        )
        vocabulary, hidden = tensors[f"{stem}embed_tokens.weight"].shape
        queries = tensors[f"{stem}layers.0.self_attn.q_proj.weight"].shape[0]
        layers = []
        for number in range(architecture.num_layers):
            here = [tensor for tensor in architecture.tensors if tensor.name.startswith(f"{stem}layers.{number}.mlp.")]
            pools = {t.part: Pool(t.shape[0], t.shape[2]) for t in here if t.name.endswith("experts.down_proj")}
            gate = next((t for t in here if t.name.endswith("gate_proj.weight")), None)
            layers.append(Layer(gate.shape[0] if gate else 0, gate.part if gate else "", pools))
        return cls(
            hidden=hidden,
            vocabulary=vocabulary,
            queries=queries,
            keys=tensors[f"{stem}layers.0.self_attn.k_proj.weight"].shape[0],
            heads=text.get("num_attention_heads") or queries // 128,
            top_k=text.get("moe_k") or _TOP_K,
            context=text.get("max_position_embeddings") or _CONTEXT,
            layers=tuple(layers),
            tower=_tower(tensors, vision) if architecture.has_vision else None,
        )

    def cache(self, tokens: int, *, bytes_each: float) -> float:
        """Bytes of keys and values of so many tokens."""
        return 2 * len(self.layers) * self.keys * tokens * bytes_each


def _tower(tensors: Mapping[str, Any], vision: Mapping[str, Any]) -> Tower:
    mlp, width = tensors["model.vision_tower.blocks.0.mlp.fc1.weight"].shape
    spatial = tensors["model.resampler_model.spatial_linear.fc2.weight"].shape[0]
    depth = sum(name.endswith("attn.proj.weight") for name in tensors)
    pixels = tensors["model.vision_tower.patch_embed.proj.weight"].shape[1]
    return Tower(depth, width, mlp, vision.get("num_heads") or _TOWER_HEADS, spatial // width, spatial, pixels)
