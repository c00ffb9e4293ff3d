"""The config.json of a recipe's model: its own, or that of a known family member where none is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ernie_align.errors import ModelError
from ernie_align.models.checkpoint_files import CheckpointFiles

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

# Family members by the beginning of their hub names: sizes of the published configs. VL-424B is not among them: its
# widths are published nowhere but in its own config.json.
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


def config_of(name: str, revision: str | None = None, *, where: str = "") -> tuple[dict[str, Any], str]:
    """(config.json, where it is from). A folder, else the hub's cache, else a preset, else the hub itself.

    The network is asked last, so that a plan answers at once. Raises ModelError where nothing says what the model is.
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
