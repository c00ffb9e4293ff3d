"""Every parameter of a real model belongs to exactly one part, and scopes become exact names."""

from __future__ import annotations

import json

import pytest

from ernie_align.errors import ModelError
from ernie_align.models.architecture import FAMILIES, Architecture
from ernie_align.models.trainable_parts import adapter_targets, parameter_summary, tuned_parameters
from ernie_align.recipe import ADAPTABLE, PARTS, AdapterBlock, PartAdapter, PartTune, TuneBlock


def architecture_of(checkpoint) -> Architecture:
    return Architecture.from_config(json.loads((checkpoint / "config.json").read_text()))


def real_class(family):
    import transformers

    return {
        "dense": transformers.Ernie4_5ForCausalLM,
        "moe": transformers.Ernie4_5_MoeForCausalLM,
        "vl_moe": transformers.Ernie4_5_VLMoeForConditionalGeneration,
    }[family]


def test_the_table_is_the_model(checkpoints, family):
    model = real_class(family).from_pretrained(checkpoints[family])
    told = [(tensor.name, tensor.shape) for tensor in architecture_of(checkpoints[family]).tensors]
    assert told == [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert {tensor.part for tensor in architecture_of(checkpoints[family]).tensors} <= set(PARTS)


@pytest.mark.parametrize(
    ("model_type", "billions"), [("ernie4_5", 0.361), ("ernie4_5_moe", 21.825), ("ernie4_5_vl_moe", 29.399)]
)
def test_the_table_is_the_full_size_model(model_type, billions):
    """The class defaults are the real 0.3B, 21B-A3B and VL-28B-A3B."""
    import torch

    cls = real_class(FAMILIES[model_type])
    with torch.device("meta"):
        model = cls(cls.config_class())
    architecture = Architecture.from_config({"model_type": model_type})
    assert {t.name: t.shape for t in architecture.tensors} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert round(architecture.size / 1e9, 3) == billions


def test_an_untied_head_is_a_part_of_its_own():
    """300B-A47B unties it."""
    import torch

    cls = real_class("moe")
    config = {
        "model_type": "ernie4_5_moe",
        "tie_word_embeddings": False,
        "num_hidden_layers": 2,
        "moe_num_shared_experts": 0,
    }
    with torch.device("meta"):
        model = cls(cls.config_class(**{key: value for key, value in config.items() if key != "model_type"}))
    architecture = Architecture.from_config(config)
    assert {t.name: t.shape for t in architecture.tensors} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert [t.name for t in architecture.by_part["lm_head"]] == ["lm_head.weight"]
    assert "shared_experts" not in architecture.by_part


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "qwen2"}, "is not ERNIE 4.5"),
        ({"model_type": "ernie4_5_moe_vl", "auto_map": {}}, "remote code"),
        ({"model_type": "ernie"}, "is not ERNIE 4.5"),
        ({}, "is not ERNIE 4.5"),
    ],
)
def test_other_models_are_refused(config, says):
    with pytest.raises(ModelError, match=says):
        Architecture.from_config(config)


def test_a_scope_that_matches_nothing_is_an_error(checkpoints):
    architecture = {family: architecture_of(path) for family, path in checkpoints.items()}
    with pytest.raises(ModelError, match=r"this model \(moe\) has no vision_experts"):
        adapter_targets(architecture["moe"], AdapterBlock(scopes=["attention", "vision_experts"]))
    with pytest.raises(ModelError, match="tied to the embeddings"):
        tuned_parameters(architecture["dense"], TuneBlock(scopes=["lm_head"]))
    with pytest.raises(ModelError, match="choose from layers 1-3, which have vision_experts"):
        adapter_targets(architecture["vl_moe"], AdapterBlock(scopes=["vision_experts"], layers="0"))
    with pytest.raises(ModelError, match="the language model has layers 0-3"):
        adapter_targets(architecture["vl_moe"], AdapterBlock(scopes=["attention"], layers="2-9"))
    with pytest.raises(ModelError, match="resampler has no layers"):
        adapter_targets(architecture["vl_moe"], AdapterBlock(scopes={"resampler": PartAdapter(layers="0")}))


def test_layers_choose_by_the_parts_own_stack(checkpoints):
    architecture = architecture_of(checkpoints["vl_moe"])
    block = AdapterBlock(
        scopes={"vision_experts": None, "vision_tower": PartAdapter(layers=[1], rank=4)}, layers="2-3", rank=8
    )
    targets = adapter_targets(architecture, block)
    experts = [t for t in targets if t.tensor.part == "vision_experts"]
    tower = [t for t in targets if t.tensor.part == "vision_tower"]
    assert {t.tensor.layer for t in experts} == {2, 3} and {t.rank for t in experts} == {8}
    assert {t.tensor.layer for t in tower} == {1} and {t.rank for t in tower} == {4}
    assert all(t.tensor.kind in ("linear", "fused") for t in targets)


def test_tuning_leaves_the_correction_biases_alone(checkpoints, family):
    architecture = architecture_of(checkpoints[family])
    chosen = {tensor.name for tensor in tuned_parameters(architecture, TuneBlock())}
    left = [tensor for tensor in architecture.tensors if tensor.name not in chosen]
    assert all(tensor.kind == "frozen" for tensor in left)
    assert len(left) == {"dense": 0, "moe": 3, "vl_moe": 6}[family]
    norms = tuned_parameters(architecture, TuneBlock(scopes={"norms": PartTune(layers="1-2")}))
    assert len(norms) == 4 and {tensor.part for tensor in norms} == {"norms"}


def test_all_means_every_part_the_model_has(checkpoints, family):
    architecture = architecture_of(checkpoints[family])
    targets = adapter_targets(architecture, AdapterBlock(scopes="all"))
    assert {t.tensor.part for t in targets} == set(architecture.by_part) & set(ADAPTABLE)


def test_the_summary_counts_lora_parameters(checkpoints):
    """Rank 4 on attention of one layer: q, o (128 x 128), k, v (64 x 128); on experts 8 x (in + out)."""
    architecture = architecture_of(checkpoints["vl_moe"])
    block = AdapterBlock(scopes=["attention", "text_experts"], layers="1", rank=4)
    table = {row.part: row for row in parameter_summary(architecture, adapter_targets(architecture, block)).rows}
    assert table["attention"].trainable == 4 * (2 * (128 + 128) + 2 * (64 + 128))
    assert table["text_experts"].trainable == 4 * 8 * ((128 + 2 * 96) + (96 + 128))
    assert table["vision_experts"].trainable == 0 and table["text_experts"].trained_tensors == 2
