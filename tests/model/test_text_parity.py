"""Training only vision parts leaves logits on text bit-equal, and the run reports it."""

from __future__ import annotations

import json

import pytest
import torch

from ernie_align.models.adapters import attach_adapter
from ernie_align.models.load import load_model
from ernie_align.models.text_parity import probe_text
from ernie_align.recipe import AdapterBlock
from tests.support.runs import recipe_of, run_quietly

VISION = ["vision_experts", "vision_router", "vision_tower", "resampler"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["lora", "sft"])
def test_vision_training_leaves_text_unchanged(checkpoints, digits, tmp_path, stage, dtype):
    block = {"adapter": {"scopes": VISION}} if stage == "lora" else {"tune": {"scopes": VISION}}
    recipe = recipe_of(stage, checkpoints["vl_moe"], digits / "inverted_val.jsonl", tmp_path / "run", **block)
    recipe["model"]["dtype"] = dtype
    result = run_quietly(recipe)
    assert result.text_unchanged is True
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["text_unchanged"] is True
    # the same comparison, made from the two folders: base and result
    before = load_model(str(checkpoints["vl_moe"]), dtype=dtype)
    after = load_model(str(result.final), dtype=dtype)
    assert probe_text(before).digest == probe_text(after).digest == facts["text_logits"]["digest"]


def test_text_parity_is_not_checked_if_text_parts_are_trained(checkpoints, digits, tmp_path):
    block = {"adapter": {"scopes": ["vision_experts", "attention"]}}
    recipe = recipe_of("lora", checkpoints["vl_moe"], digits / "inverted_val.jsonl", tmp_path / "run", **block)
    assert run_quietly(recipe).text_unchanged is None


def test_the_digest_changes_with_the_last_bit_of_a_weight(checkpoints):
    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    first = probe_text(bundle)
    assert probe_text(bundle) == first and first.tokens == 512
    weight = bundle.model.model.language_model.norm.weight
    with torch.no_grad():
        weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    assert probe_text(bundle).digest != first.digest


def test_an_adapter_on_text_changes_the_digest(checkpoints):
    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    first = probe_text(bundle)
    attach_adapter(bundle, AdapterBlock(scopes=["text_experts"]))
    assert probe_text(bundle).digest == first.digest  # fresh: no change yet
    for name, parameter in bundle.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.01)
    assert probe_text(bundle).digest != first.digest
