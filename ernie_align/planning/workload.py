"""Describe what determines memory and time in plain numbers: the model's shape, and the recipe on given hardware."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ernie_align.errors import ModelError
from ernie_align.models.architecture import Architecture
from ernie_align.models.checkpoint_files import CheckpointFiles
from ernie_align.models.trainable_parts import Target
from ernie_align.recipe import Recipe
from ernie_align.stages import STAGES

Strategy = Literal["ddp", "fsdp", "ep", "zero2", "zero3"]
Device = Literal["gpu", "cpu"]

# Defaults of TRL and transformers for the keys that matter here.
_TRAINING_DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "optim": "adamw_torch_fused",
}
_TOP_K, _TOWER_HEADS, _CONTEXT = 6, 16, 131072  # defaults of transformers' config classes
_TEXT = {"vocab_size": 103424, "max_position_embeddings": 131072, "tie_word_embeddings": True}
_A3B = {
    "hidden_size": 2560,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}

# Published sizes of family members, by the beginning of their hub names. VL-424B is not among them: its widths are
# published only in its own config.json.
PRESETS: dict[str, dict[str, Any]] = {
    "ERNIE-4.5-0.3B": {
        "model_type": "ernie4_5",
        **_TEXT,
        "hidden_size": 1024,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 3072,
    },
    "ERNIE-4.5-21B-A3B": {"model_type": "ernie4_5_moe", **_TEXT, **_A3B, "moe_intermediate_size": 1536},
    "ERNIE-4.5-VL-28B-A3B": {
        "model_type": "ernie4_5_vl_moe",
        "tie_word_embeddings": True,
        "text_config": {**_TEXT, **_A3B, "moe_intermediate_size": [1536, 512]},
        "vision_config": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 5120},
    },
    "ERNIE-4.5-300B-A47B": {
        "model_type": "ernie4_5_moe",
        **_TEXT,
        "tie_word_embeddings": False,
        "hidden_size": 8192,
        "num_hidden_layers": 54,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 28672,
        "moe_intermediate_size": 3584,
        "moe_num_experts": 64,
        "moe_k": 8,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 3,
    },
}


def load_config(name: str, revision: str | None = None, *, where: str = "") -> tuple[dict[str, Any], str]:
    """Return (config.json, its origin): from a folder, else the hub's cache, else a preset, else the hub itself.

    The network comes last, so that a plan answers at once. Raises ModelError if no config is found.
    """
    files = CheckpointFiles(name, revision, where)
    if files.is_folder:
        return files.read_json("config.json"), f"{name}/config.json"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return json.loads(Path(cached).read_text(encoding="utf-8")), f"config.json of {name}"
    owner, _, short = name.partition("/")
    for member, config in PRESETS.items():
        if owner == "baidu" and short.startswith(member):
            return config, f"built-in sizes of {member}: its own config.json has not been downloaded yet"
    try:
        return files.read_json("config.json"), f"config.json of {name}"
    except ModelError as error:
        fix = f"download its config.json, or plan one of baidu/{', baidu/'.join(PRESETS)}"
        raise ModelError.at(where or name, error.faults[0].what, fix=fix) from error


@dataclass(frozen=True)
class Pool:
    """One pool of experts in one layer. width: of an expert."""

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

    merge: patches per token; spatial: width of the resampler; pixels: values per patch.
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
    """Widths of the model: hidden, vocabulary, queries, keys (and values); top_k: experts per token."""

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
        """Read the widths from the architecture, and head counts and top-k, which no tensor shows, from config.json."""
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
            mlp = [tensor for tensor in architecture.tensors if tensor.name.startswith(f"{stem}layers.{number}.mlp.")]
            pools = {t.part: Pool(t.shape[0], t.shape[2]) for t in mlp if t.name.endswith("experts.down_proj")}
            gate = next((t for t in mlp if t.name.endswith("gate_proj.weight")), None)
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

    def cache_bytes(self, tokens: int, *, bytes_each: float) -> float:
        """Return the size of the KV cache for a number of tokens."""
        return 2 * len(self.layers) * self.keys * tokens * bytes_each


def _tower(tensors: Mapping[str, Any], vision: Mapping[str, Any]) -> Tower:
    mlp, width = tensors["model.vision_tower.blocks.0.mlp.fc1.weight"].shape
    spatial = tensors["model.resampler_model.spatial_linear.fc2.weight"].shape[0]
    depth = sum(name.endswith("attn.proj.weight") for name in tensors)
    pixels = tensors["model.vision_tower.patch_embed.proj.weight"].shape[1]
    return Tower(depth, width, mlp, vision.get("num_heads") or _TOWER_HEADS, spatial // width, spatial, pixels)


@dataclass(frozen=True)
class Workload:
    """One recipe on given hardware. The expert LoRA is computed by models.grouped_gemm.

    rows: sequences in a training forward on each device (both sides of a pair count); tokens: length of each, at most;
    vision: fraction of image tokens; scored: fraction of tokens that predict a trained token; trained: sizes by part,
    of the adapter with LoRA; targets: adapted tensors; copies: frozen copies of the adapter (the reference when an
    adapter is trained further); reference: a second whole model is held; asks_reference: the reference scores each
    batch, reference_in_step: while the activations of the training forward are held; drawn: completions of a rollout
    on each device, `generations` for each prompt; completion: tokens of each; rows_per_example, min_rows: sequences of
    an example, and of the smallest batch; padded: rows differ in length; flat: rows are packed or concatenated, and
    attention is per row; shared: one sequence holds a prompt with both of its answers.
    """

    stage: str
    bytes_each: int
    rows: int
    tokens: int
    accumulation: int
    checkpointing: bool
    eager: bool
    optimizer: str
    trained: dict[str, int]
    targets: tuple[Target, ...] | None
    copies: int = 0
    reference: bool = False
    asks_reference: bool = False
    reference_in_step: bool = False
    drawn: int = 0
    completion: int = 0
    generations: int = 1
    rows_per_example: int = 1
    min_rows: int = 1
    vision: float = 0.0
    scored: float = 1.0
    steps: int | None = None
    gpus: int = 1
    strategy: Strategy = "ddp"
    base_bits: int = 16
    device: Device = "gpu"
    padded: bool = True
    flat: bool = False
    shared: bool = False

    @classmethod
    def of(cls, recipe: Recipe, architecture: Architecture, *, vision: float) -> Workload:
        """Read a recipe. Raises ModelError if a scope matches nothing."""
        training = {key: recipe.training.get(key, default) for key, default in _TRAINING_DEFAULTS.items()}
        stage = STAGES[recipe.stage]
        profile = stage.memory_profile(recipe)
        trained = stage.trained_parameters(recipe, architecture)
        targets = tuple(item for item in trained if isinstance(item, Target))
        sizes: dict[str, int] = {}
        for item in trained:
            part, size = (item.tensor.part, item.size) if targets else (item.part, item.size)
            sizes[part] = sizes.get(part, 0) + size
        steps = recipe.training.get("max_steps")
        bytes_each = 2 if recipe.model.dtype == "bfloat16" else 4
        batch = training["per_device_train_batch_size"]
        workload = cls(
            stage=recipe.stage,
            bytes_each=bytes_each,
            rows=batch * profile.sequences_per_row,
            tokens=recipe.data.max_length + profile.completion_length,
            accumulation=training["gradient_accumulation_steps"],
            checkpointing=bool(training["gradient_checkpointing"]),
            eager=recipe.model.attention == "eager",
            optimizer=training["optim"],
            trained=sizes,
            targets=targets or None,
            copies=profile.adapter_copies,
            reference=profile.second_model,
            asks_reference=profile.reference_forward,
            reference_in_step=profile.reference_in_step,
            drawn=batch * profile.batches_per_rollout,
            completion=profile.completion_length,
            generations=profile.generations,
            rows_per_example=profile.sequences_per_row,
            min_rows=profile.min_sequences,
            vision=vision if architecture.has_vision else 0.0,
            steps=steps if isinstance(steps, int) and steps > 0 else None,
            base_bits=8 * bytes_each,
            flat=bool(recipe.training.get("packing") or recipe.training.get("padding_free")),
        )
        if workload.flat and workload.eager:  # eager attention scores the whole concatenated sequence
            return replace(workload, rows=1, tokens=workload.positions)
        return _share_prompts(workload) if profile.shared_prompt else workload

    @property
    def positions(self) -> int:
        """Tokens of a training forward, padding included."""
        return self.rows * self.tokens

    @property
    def max_length(self) -> int:
        """The data.max_length of these rows."""
        return round(self.tokens * (1 + self.vision) / 2) if self.shared else self.tokens - self.completion

    def with_max_length(self, max_length: int) -> Workload:
        """Return this workload with another data.max_length."""
        tokens = round(2 * max_length / (1 + self.vision)) if self.shared else max_length + self.completion
        return replace(self, tokens=tokens)

    @property
    def masked(self) -> bool:
        """True if attention needs a mask, unlike rows of one length and concatenated rows."""
        return self.shared or (self.padded and self.rows > 1 and not self.flat)

    @property
    def is_adapter(self) -> bool:
        """True if LoRA is trained, False if the weights themselves are."""
        return self.targets is not None

    @property
    def trainable(self) -> int:
        """Number of trained values."""
        return sum(self.trained.values())


def _share_prompts(workload: Workload) -> Workload:
    """Share each prompt by both of its answers.

    The recipe says nothing about how much of the text is prompt, so only the images are counted as shared. With a
    fraction v of image tokens in max_length tokens, a row has (2 - v) · max_length, of which v / (2 - v) are images.
    """
    tokens = round((2 - workload.vision) * workload.tokens)
    return replace(workload, tokens=tokens, vision=workload.vision * workload.tokens / tokens, shared=True)
