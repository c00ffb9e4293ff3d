"""An adapter covers exactly its scope, in every family, and is saved in PEFT's own format."""

from __future__ import annotations

import pytest
import torch

from ernie_align.errors import ModelError
from ernie_align.models.adapters import adapted_tensors, attach_adapter, unfreeze, validate_adapter
from ernie_align.models.load import load_model
from ernie_align.models.trainable_parts import Target, adapter_targets, parameter_summary
from ernie_align.recipe import ADAPTABLE, AdapterBlock, PartAdapter, TuneBlock
from tests.support.runs import FAMILIES, relative_difference, stir

EVERY_PART = [(family, part) for family in FAMILIES for part in ADAPTABLE]


def load(checkpoints, family):
    return load_model(str(checkpoints[family]), dtype="float32")


def parts_of(checkpoints, family):
    return [part for part in ADAPTABLE if part in load(checkpoints, family).architecture.by_part]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def ids_with_an_image(bundle):
    torch.manual_seed(0)
    return torch.randint(300, 500, (2, 12))


@pytest.mark.parametrize(("family", "part"), EVERY_PART)
def test_each_part_alone_is_adapted_exactly(checkpoints, family, part):
    bundle = load(checkpoints, family)
    if part not in bundle.architecture.by_part:
        with pytest.raises(ModelError, match=rf"this model \({family}\) has no {part}"):
            attach_adapter(bundle, AdapterBlock(scopes=[part]))
        return
    targets = attach_adapter(bundle, AdapterBlock(scopes=[part], rank=4, alpha=8))
    expected = {t.name for t in bundle.architecture.by_part.get(part, []) if t.kind in ("linear", "fused", "router")}
    assert {target.tensor.name for target in targets} == expected == set(adapted_tensors(bundle.model))
    trained = sum(p.numel() for p in bundle.model.parameters() if p.requires_grad)
    assert trained == parameter_summary(bundle.architecture, targets).trainable


def test_gradients_reach_the_scope_and_nothing_else(checkpoints, family):
    bundle = load(checkpoints, family)
    attach_adapter(bundle, AdapterBlock(scopes="all", rank=4))
    stir(bundle.model)
    bundle.model(input_ids=ids_with_an_image(bundle), labels=ids_with_an_image(bundle)).loss.backward()
    touched = {name for name, p in bundle.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    lora = {name for name, _ in bundle.model.named_parameters() if ".lora_" in name}
    vision = {n for n in lora if any(word in n for word in ("vision_moe", "vision_tower", "resampler"))}
    assert touched == lora - vision  # text does not pass through vision parts


def test_layers_ranks_and_alphas_per_part(checkpoints):
    bundle = load(checkpoints, "vl_moe")
    scopes = {
        "attention": PartAdapter(rank=2, alpha=4.0),
        "vision_experts": PartAdapter(layers=[3]),
        "text_router": PartAdapter(rank=3),
    }
    attach_adapter(bundle, AdapterBlock(scopes=scopes, rank=8, alpha=16, layers="2-3"))
    settings = adapted_tensors(bundle.model)
    layer = "model.language_model.layers.{}."
    assert settings[layer.format(2) + "self_attn.q_proj.weight"] == (2, 4.0)
    assert settings[layer.format(3) + "mlp.vision_moe.experts.down_proj"] == (8, 16.0)
    assert settings[layer.format(2) + "mlp.text_moe.gate.weight"] == (3, 16.0)
    assert len(settings) == 2 * 4 + 2 + 2


def test_a_fresh_adapter_changes_nothing_and_off_is_the_base(checkpoints, family):
    bundle = load(checkpoints, family)
    ids = ids_with_an_image(bundle)
    base = logits(bundle.model, ids)
    attach_adapter(bundle, AdapterBlock(scopes="all", rank=4))
    bundle.model.eval()
    assert torch.equal(logits(bundle.model, ids), base)
    stir(bundle.model)
    assert not torch.equal(logits(bundle.model, ids), base)
    with bundle.model.disable_adapter():
        assert torch.equal(logits(bundle.model, ids), base)


@pytest.mark.parametrize("scope", ["experts", "all", "some layers"])
def test_an_adapter_saves_and_loads_in_plain_peft_with_equal_logits(checkpoints, family, scope, tmp_path):
    """Plain: transformers' class and peft.PeftModel, none of our code."""
    import transformers
    from peft import PeftModel

    bundle = load(checkpoints, family)
    names = parts_of(checkpoints, family)
    each = {n: PartAdapter(rank=2 + i, alpha=8.0 + i) for i, n in enumerate(names) if n != "dense_mlp"}
    block = {
        "all": AdapterBlock(scopes="all", rank=4),
        "experts": AdapterBlock(scopes=[n for n in names if "experts" in n or n == "dense_mlp"], rank=4),
        "some layers": AdapterBlock(scopes=each, layers="1,3"),
    }[scope]
    attach_adapter(bundle, block)
    stir(bundle.model)
    bundle.model.eval()
    ids = ids_with_an_image(bundle)
    bundle.model.save_pretrained(tmp_path)
    cls = getattr(transformers, type(bundle.model.get_base_model()).__name__)
    plain = PeftModel.from_pretrained(cls.from_pretrained(checkpoints[family], dtype=torch.float32), tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    ours = logits(bundle.model, ids)
    if family == "dense":
        assert torch.equal(logits(plain, ids), ours)
    # W + BA summed in float32 before x is multiplied, instead of x·W + x·A·B (in plain PEFT for experts, merged for all
    # weights): the same numbers up to some tens of float32 roundings, each relative to the largest logit
    assert relative_difference(logits(plain, ids), ours) <= 1e-5
    assert relative_difference(logits(plain.merge_and_unload(), ids), ours) <= 1e-5


def test_an_adapter_can_be_continued_only_with_its_own_scope(checkpoints, tmp_path):
    bundle = load(checkpoints, "vl_moe")
    block = AdapterBlock(scopes=["attention", "vision_experts"], rank=4, alpha=8)
    attach_adapter(bundle, block)
    stir(bundle.model)
    bundle.model.save_pretrained(tmp_path)
    ids = ids_with_an_image(bundle)
    bundle.model.eval()

    again = load(checkpoints, "vl_moe")
    attach_adapter(again, block.model_copy(update={"path": str(tmp_path)}))
    again.model.eval()
    assert torch.equal(logits(again.model, ids), logits(bundle.model, ids))
    assert any(parameter.requires_grad for parameter in again.model.parameters())
    for wrong in ({"scopes": ["attention"]}, {"rank": 8}, {"alpha": 16.0}):
        other = load(checkpoints, "vl_moe")
        with pytest.raises(ModelError, match="the adapter differs from the recipe in"):
            attach_adapter(other, block.model_copy(update={"path": str(tmp_path), **wrong}))
    with pytest.raises(ModelError, match="has no adapter"):
        attach_adapter(load(checkpoints, "vl_moe"), block.model_copy(update={"path": str(tmp_path / "none")}))


def test_validation_finds_what_peft_accepts(checkpoints):
    """A target without an adapter, and a base weight that is trained."""
    bundle = load(checkpoints, "vl_moe")
    targets = attach_adapter(bundle, AdapterBlock(scopes=["attention"], rank=4))
    missing = bundle.architecture.by_part["text_experts"][0]
    with pytest.raises(ModelError, match="the recipe has rank 4 and alpha 32, the adapter no LoRA"):
        validate_adapter(bundle.model, [*targets, Target(missing, 4, 32.0)], where="here")
    next(p for n, p in bundle.model.named_parameters() if "norm" in n).requires_grad_(True)
    with pytest.raises(ModelError, match="is trained but not in the adapter"):
        validate_adapter(bundle.model, targets, where="here")


def test_dropout_reaches_linear_layers_only(checkpoints):
    bundle = load(checkpoints, "dense")
    attach_adapter(bundle, AdapterBlock(scopes=["attention", "dense_mlp"], dropout=0.5))
    bundle.model.train()
    stir(bundle.model)
    ids = ids_with_an_image(bundle)
    assert not torch.equal(logits(bundle.model, ids), logits(bundle.model, ids))
    with pytest.raises(ModelError, match="bare parameters, where PEFT has no dropout"):
        attach_adapter(load(checkpoints, "moe"), AdapterBlock(scopes=["shared_experts"], dropout=0.1))


def test_tuning_unfreezes_the_scope_and_nothing_else(checkpoints, family):
    bundle = load(checkpoints, family)
    tensors = unfreeze(bundle, TuneBlock(scopes=["attention", "norms"], layers="1"))
    trained = {name for name, parameter in bundle.model.named_parameters() if parameter.requires_grad}
    assert trained == {tensor.name for tensor in tensors} and len(trained) == 6
    unfreeze(bundle, TuneBlock())
    frozen = [name for name, parameter in bundle.model.named_parameters() if not parameter.requires_grad]
    assert all(name.endswith("e_score_correction_bias") for name in frozen)


def test_targets_are_named_in_full(checkpoints):
    """Full names do not depend on how PEFT matches suffixes."""
    bundle = load(checkpoints, "vl_moe")
    targets = adapter_targets(bundle.architecture, AdapterBlock(scopes=["text_experts"], layers="2"))
    assert [target.tensor.name for target in targets] == [
        "model.language_model.layers.2.mlp.text_moe.experts.gate_up_proj",
        "model.language_model.layers.2.mlp.text_moe.experts.down_proj",
    ]
