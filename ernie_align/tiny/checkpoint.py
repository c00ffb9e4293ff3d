"""Tiny checkpoints of the real ERNIE 4.5 classes with random weights, saved in the hub's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ernie_align.errors import ModelError
from ernie_align.tiny.tokenizer import make_tokenizer

# tiny trains in minutes on a laptop; mini has the real number of experts and vocabulary size, for benchmarks.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mrope_section": [6, 6, 4],  # sums to half of the head dimension
        "expert_widths": [96, 64],
        "experts": 8,
        "top_k": 2,
        "vision": {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 256},
        "vocab_size": None,  # the tokenizer's size
        "initializer_range": 0.08,  # about 1/sqrt(hidden_size): the real 0.02 is too small for this width
    },
    "mini": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "mrope_section": [11, 11, 10],
        "expert_widths": [384, 128],
        "experts": 64,
        "top_k": 6,
        "vision": {"depth": 4, "hidden_size": 320, "num_heads": 8, "intermediate_size": 1280},
        "vocab_size": 103424,
        "initializer_range": 0.04,
    },
}

Family = Literal["dense", "moe", "vl_moe"]


def make_checkpoint(family: Family, folder: str | Path, *, preset: str = "tiny", seed: int = 0) -> Path:
    """Write a checkpoint with tokenizer, chat template and (vl_moe) image processor. Return its folder.

    The weights are float32 and determined by the seed. Raises ModelError if the folder is not empty.
    """
    import torch

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ModelError.at(str(folder), "the folder is not empty", fix="give a new folder, or remove this one")
    sizes = PRESETS[preset]
    tokenizer = make_tokenizer("vl" if family == "vl_moe" else "text", vision=family == "vl_moe")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build_model(family, sizes, tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.sep_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family == "vl_moe":
        _save_processor_configs(folder)
        _rename_vision_weights(folder)
    return folder


def _build_model(family: Family, sizes: dict[str, Any], tokenizer) -> Any:
    from transformers import (
        Ernie4_5_MoeConfig,
        Ernie4_5_MoeForCausalLM,
        Ernie4_5_VLMoeConfig,
        Ernie4_5_VLMoeForConditionalGeneration,
        Ernie4_5Config,
        Ernie4_5ForCausalLM,
    )

    common = {
        "vocab_size": sizes["vocab_size"] or len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 4096,
        **{
            key: sizes[key]
            for key in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "initializer_range",
            )
        },
    }
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    pools = {"moe_num_experts": sizes["experts"], "moe_k": sizes["top_k"], "moe_num_shared_experts": 2}
    if family == "dense":
        return Ernie4_5ForCausalLM(Ernie4_5Config(**common, head_dim=head_dim))
    if family == "moe":
        width = sizes["expert_widths"][0]
        return Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**common, **pools, moe_intermediate_size=width))
    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": sizes["mrope_section"]}
    config = Ernie4_5_VLMoeConfig(
        text_config={**common, **pools, "moe_intermediate_size": sizes["expert_widths"], "rope_parameters": rope},
        vision_config={**sizes["vision"], "initializer_range": sizes["initializer_range"]},
        **{
            f"{name}_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in tokenizer.init_kwargs["extra_special_tokens"].items()
        },
    )
    return Ernie4_5_VLMoeForConditionalGeneration(config)


def _save_processor_configs(folder: Path) -> None:
    """Write the files that transformers' processor reads. Its class defaults are those of the real model."""
    import json

    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

    settings = Ernie4_5_VLMoeImageProcessorPil().to_dict()
    settings["image_processor_type"] = "Ernie4_5_VLMoeImageProcessor"
    files = {
        "preprocessor_config.json": settings,
        # a tiny checkpoint contains no font, so no time stamps are drawn on video frames
        "video_preprocessor_config.json": {
            "video_processor_type": "Ernie4_5_VLMoeVideoProcessor",
            "draw_on_frames": False,
        },
        "processor_config.json": {"processor_class": "Ernie4_5_VLMoeProcessor"},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _rename_vision_weights(folder: Path) -> None:
    """Rename vision weights to the hub's names: `vision_model.*`, where transformers saves `model.vision_model.*`."""
    from safetensors.torch import load_file, save_file

    for shard in folder.glob("*.safetensors"):
        weights = load_file(shard)
        renamed = {name.removeprefix("model.") if ".vision_model." in name else name: w for name, w in weights.items()}
        save_file(renamed, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text(encoding="utf-8")
        index.write_text(text.replace('"model.vision_model.', '"vision_model.'), encoding="utf-8")
