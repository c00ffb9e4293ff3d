"""Checkpoints in the hub's layout and in ours load completely, or raise an error."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_align.errors import ModelError
from ernie_align.models.checkpoint_files import CheckpointFiles
from ernie_align.models.load import load_model
from tests.support.runs import tensors_of


@pytest.fixture
def copy_of(checkpoints, tmp_path):
    def copy(family):
        return shutil.copytree(checkpoints[family], tmp_path / family)

    return copy


def test_the_hub_layout_loads_bit_for_bit(copy_of):
    """Unfused experts 0-15 (text first), weight_1 and a stacked bias reach the right parameters."""
    folder = copy_of("vl_moe")
    file = folder / "model.safetensors"
    weights = load_file(file)
    torch.manual_seed(0)
    layer = "model.layers.2.mlp."
    marks = {
        f"{layer}experts.3.up_proj.weight": torch.randn(96, 128),
        f"{layer}experts.11.up_proj.weight": torch.randn(64, 128),
        f"{layer}gate.weight": torch.randn(128, 8),
        f"{layer}gate.weight_1": torch.randn(128, 8),
        f"{layer}moe_statics.e_score_correction_bias": torch.randn(2, 8),
        "vision_model.blocks.1.attn.qkv.weight": torch.randn(192, 64),
        "model.resampler_model.spatial_linear.2.weight": torch.randn(256, 256),
    }
    assert all(weights[name].shape == mark.shape for name, mark in marks.items())
    save_file({**weights, **marks}, file, metadata={"format": "pt"})

    loaded = dict(load_model(str(folder), dtype="float32").model.named_parameters())
    block = "model.language_model.layers.2.mlp."
    text, vision = f"{block}text_moe.", f"{block}vision_moe."
    bias = marks[f"{layer}moe_statics.e_score_correction_bias"]
    for parameter, mark in (
        (loaded[f"{text}experts.gate_up_proj"][3, 96:], marks[f"{layer}experts.3.up_proj.weight"]),
        (loaded[f"{vision}experts.gate_up_proj"][3, 64:], marks[f"{layer}experts.11.up_proj.weight"]),
        (loaded[f"{text}gate.weight"], marks[f"{layer}gate.weight"].T),
        (loaded[f"{vision}gate.weight"], marks[f"{layer}gate.weight_1"].T),
        (loaded[f"{text}gate.moe_statics.e_score_correction_bias"], bias[:1]),
        (loaded[f"{vision}gate.moe_statics.e_score_correction_bias"], bias[1:]),
        (loaded["model.vision_tower.blocks.1.attn.qkv.weight"], marks["vision_model.blocks.1.attn.qkv.weight"]),
        (
            loaded["model.resampler_model.spatial_linear.fc2.weight"],
            marks["model.resampler_model.spatial_linear.2.weight"],
        ),
    ):
        assert torch.equal(parameter, mark)


def test_a_saved_checkpoint_loads_bit_for_bit(checkpoints, family, tmp_path):
    first = load_model(str(checkpoints[family]), dtype="float32")
    first.model.save_pretrained(tmp_path)
    first.save_processor(str(tmp_path))
    again = load_model(str(tmp_path), dtype="float32")
    before, after = first.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (checkpoints[family] / name).read_bytes()


def test_the_tiny_checkpoint_has_the_names_of_the_hub(checkpoints):
    names = set(tensors_of(checkpoints["vl_moe"]))
    assert "vision_model.blocks.0.attn.qkv.weight" in names and "model.layers.1.mlp.experts.15.up_proj.weight" in names
    assert {"model.layers.1.mlp.gate.weight_1", "model.layers.1.mlp.moe_statics.e_score_correction_bias"} <= names
    assert not any("vision_tower" in name or "text_moe" in name for name in names)


def test_routers_stay_in_float32_and_biases_stay_frozen(checkpoints, family):
    model = load_model(str(checkpoints[family]), dtype="bfloat16").model
    for name, parameter in model.named_parameters():
        routes = "gate.weight" in name or name.endswith("e_score_correction_bias")
        assert parameter.dtype == (torch.float32 if routes else torch.bfloat16), name
        assert parameter.requires_grad != name.endswith("e_score_correction_bias"), name


def test_a_checkpoint_with_a_missing_weight_is_refused(copy_of):
    """transformers would initialize it randomly and continue."""
    folder = copy_of("moe")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.shared_experts.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*layers.2.mlp.shared_experts.up_proj"):
        load_model(str(folder), dtype="float32")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "is not ERNIE 4.5"),
        (lambda folder: (folder / "model.safetensors").unlink(), "the weights could not be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 20), "the weights could not be loaded"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer could be loaded"),
    ],
)
def test_damaged_checkpoints_raise_a_clear_error(copy_of, damage, message):
    folder = copy_of("dense")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), dtype="float32", where="recipe.yaml:2:3  model.name")


def test_pickles_are_never_loaded(copy_of):
    folder = copy_of("dense")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="the weights could not be loaded"):
        load_model(str(folder), dtype="float32")


def test_pickled_and_truncated_adapters_are_refused(checkpoints, tmp_path):
    """PEFT would load adapter_model.bin otherwise."""
    from ernie_align.models.adapters import attach_adapter
    from ernie_align.recipe import AdapterBlock

    bundle = load_model(str(checkpoints["dense"]), dtype="float32")
    attach_adapter(bundle, AdapterBlock(scopes=["attention"], rank=2))
    bundle.model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(tmp_path), dtype="float32")
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        load_model(str(tmp_path), dtype="float32")


@pytest.fixture(scope="module")
def saved_adapter(checkpoints, tmp_path_factory):
    """An adapter on both pools, attention and the dense MLP: on parameters and on modules."""
    from ernie_align.models.adapters import attach_adapter
    from ernie_align.recipe import AdapterBlock

    folder = tmp_path_factory.mktemp("adapter")
    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    attach_adapter(bundle, AdapterBlock(scopes=["attention", "dense_mlp", "text_experts", "vision_experts"], rank=2))
    bundle.model.save_pretrained(folder)
    return folder


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def with_unknown(tensors, name):
    return {**tensors, name.replace("layers.2", "layers.9"): tensors[name].clone()}


def renamed(tensors, name):
    return {**without(tensors, name), name.replace("layers.2", "layers.9"): tensors[name]}


def with_longer(tensors, name):
    return {**tensors, name: torch.cat([tensors[name]] * 2).contiguous()}


@pytest.mark.parametrize(
    "part", ["self_attn.q_proj.lora_A", "text_moe.experts.lora_B", "vision_moe.experts.base_layer"]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "1 tensors do not match the model, for example .*layers.2"),
        (with_unknown, "1 tensors do not match the model, for example .*layers.9"),
        (renamed, "2 tensors do not match the model, for example .*layers.2"),
        (with_longer, "1 tensors have another shape: .*layers.2"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change, message, part, saved_adapter, tmp_path):
    """PEFT only warns about missing tensors, initializes them randomly, and ignores unknown ones."""
    folder = shutil.copytree(saved_adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.2" in name and part in name)
    save_file(change(tensors, name), folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(folder), dtype="float32")
    assert str(folder) in caught.value.faults[0].where and "restore the folder" in caught.value.faults[0].fix
    assert ".default." not in caught.value.faults[0].what or change is with_longer


def test_every_tensor_of_an_adapter_file_is_compared(saved_adapter):
    """Bit for bit, so that a tensor loaded in the wrong place is found."""
    from ernie_align.models.expert_lora import validate_loaded_adapter

    bundle = load_model(str(saved_adapter), dtype="float32")
    assert validate_loaded_adapter(bundle.model, saved_adapter) == len(
        load_file(saved_adapter / "adapter_model.safetensors")
    )
    with torch.no_grad():
        next(p for name, p in bundle.model.named_parameters() if "lora_A" in name).add_(1)
    with pytest.raises(ModelError, match="1 tensors"):
        validate_loaded_adapter(bundle.model, saved_adapter)


def test_an_adapter_of_an_older_layout_loads_completely(checkpoints, tmp_path):
    """One LoRA per matrix of each expert, as in transformers 4: PEFT fuses them, with no tensor left over."""
    bundle = load_model(str(checkpoints["moe"]), dtype="float32")
    tensors = {}
    for layer, module in bundle.model.named_modules():
        if layer.endswith(".experts"):
            experts, width, hidden = (
                *module.gate_up_proj.shape[:1],
                module.down_proj.shape[2],
                module.down_proj.shape[1],
            )
            for expert in range(experts):
                sizes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
                for matrix, (ins, outs) in sizes.items():
                    name = f"base_model.model.{layer}.{expert}.{matrix}"
                    tensors[f"{name}.lora_A.weight"] = torch.randn(2, ins)
                    tensors[f"{name}.lora_B.weight"] = torch.randn(outs, 2)
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": targets}
    config["base_model_name_or_path"] = str(checkpoints["moe"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = load_model(str(tmp_path), dtype="float32").model
    assert sum(".lora_" in name for name, _ in loaded.named_parameters()) > 0
    save_file(without(tensors, next(iter(tensors))), tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(tmp_path), dtype="float32")


def test_an_adapter_loads_with_its_base_model(checkpoints, tmp_path):
    from ernie_align.models.adapters import attach_adapter
    from ernie_align.recipe import AdapterBlock

    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    attach_adapter(bundle, AdapterBlock(scopes=["vision_experts"]))
    bundle.model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), dtype="float32").modality is not None
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    with pytest.raises(ModelError, match=r"no model at './gone', the base of this adapter"):
        load_model(str(tmp_path), dtype="float32")


def test_a_local_path_is_never_a_hub_id(tmp_path, monkeypatch):
    """A missing run folder is not requested from the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    folders = ("runs/none", "./a", "/a/b", "a/b/c", "~/x")
    assert all(CheckpointFiles(name).is_folder for name in folders)
    assert not any(CheckpointFiles(name).is_folder for name in ("baidu/ERNIE-4.5-0.3B-PT", "gpt2"))


def test_the_processor_returns_no_routing_tensor(checkpoints, digits):
    """Prompts of different lengths, with and without images, on which the upstream processor fails."""
    from PIL import Image

    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    image = Image.open(digits / "images" / "0000.png")
    one = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    out = bundle.processor(images=[image], text=[f"{one}Which digit?", "one"], padding=True, return_tensors="pt")
    assert "moe_mm_token_type_ids" not in out and "moe_mm_token_type_ids" not in bundle.processor.model_input_names
    assert (out["input_ids"] == bundle.modality.image).sum() == 4
    assert out["mm_token_type_ids"].sum() == 4 and out["pixel_values"].shape == (16, 588)


def test_image_settings_are_read_from_either_file(copy_of):
    """transformers 5 nests them in processor_config.json; the published checkpoints have a separate file."""
    folder = copy_of("vl_moe")
    files = CheckpointFiles(str(folder))
    assert files.image_settings()["size"]["shortest_edge"] == 56 * 56
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"size": {"shortest_edge": 784}}}))
    assert files.image_settings()["size"]["shortest_edge"] == 784
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"has no preprocessor_config.json"):
        files.image_settings()


def test_the_processor_saves_under_transformers_own_name(checkpoints, tmp_path):
    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    bundle.processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "Ernie4_5_VLMoeProcessor"
