"""Routing follows from input_ids for every caller, and a run in which it does not is stopped."""

from __future__ import annotations

import copy

import pytest
import torch

from ernie_align.errors import ModelError
from ernie_align.models.load import load_model
from ernie_align.models.routing import ModalityTokens, derive_token_types, mm_token_type_ids, moe_mm_token_type_ids
from ernie_align.models.token_dispatch import check_routing, count_routed_tokens, find_expert_pools
from tests.support.runs import batch_with_images

TOKENS = ModalityTokens(image=7, image_start=8, image_end=9, video=10, video_start=11, video_end=12)


@pytest.fixture
def bundle(checkpoints):
    return load_model(str(checkpoints["vl_moe"]), dtype="float32")


@pytest.fixture
def batch(bundle, digits):
    return batch_with_images(bundle, digits)


def forward(model, batch, **more):
    inputs = {key: value for key, value in batch.items() if key not in ("vision_tokens", "labels")}
    with torch.no_grad():
        return model(**inputs, **more, use_cache=False).logits


def test_token_types():
    ids = torch.tensor([[1, 8, 7, 7, 9, 2], [11, 10, 12, 5, 0, 0]])
    assert moe_mm_token_type_ids(ids, TOKENS).tolist() == [[0, 1, 1, 1, 1, 0], [2, 2, 2, 0, 0, 0]]
    assert mm_token_type_ids(ids, TOKENS).tolist() == [[0, 0, 1, 1, 0, 0], [0, 2, 0, 0, 0, 0]]


def test_routing_ignores_token_types_of_the_caller(bundle, batch):
    """Token types that are missing, stale or of a wrong shape do not change the logits."""
    expected = forward(bundle.model, batch)
    stale = torch.zeros_like(batch["input_ids"])
    assert torch.equal(forward(bundle.model, batch, moe_mm_token_type_ids=stale), expected)
    short = {"moe_mm_token_type_ids": stale[:, :3], "mm_token_type_ids": stale}
    assert torch.equal(forward(bundle.model, batch, **short), expected)
    bare = copy.deepcopy(bundle.model)
    bare.model._forward_pre_hooks.clear()
    without = forward(bare, batch, mm_token_type_ids=mm_token_type_ids(batch["input_ids"], bundle.modality))
    assert not torch.allclose(without, expected)


def test_the_derived_routing_is_the_processors(bundle, batch):
    """The processor's own tensor, passed to a model without the hook, gives bit-equal logits."""
    bare = copy.deepcopy(bundle.model)
    bare.model._forward_pre_hooks.clear()
    ids, modality = batch["input_ids"], bundle.modality
    types = {
        "mm_token_type_ids": mm_token_type_ids(ids, modality),
        "moe_mm_token_type_ids": torch.tensor(bundle.processor.create_moe_mm_token_type_ids(ids.numpy())),
    }
    assert torch.equal(forward(bare, batch, **types), forward(bundle.model, batch))


def test_copies_and_adapters_route_too(bundle, batch):
    """A reference model is a copy of the policy; a policy is often a PeftModel."""
    from ernie_align.models.adapters import attach_adapter
    from ernie_align.recipe import AdapterBlock

    expected = forward(bundle.model, batch)
    twin = copy.deepcopy(bundle.model)
    assert torch.equal(forward(twin, batch), expected)
    twin.model.config.image_start_token_id = 3  # the copy's hook reads the copy's config
    assert not torch.equal(forward(twin, batch), expected)
    attach_adapter(bundle, AdapterBlock(scopes=["attention"]))
    assert torch.equal(forward(bundle.model, batch), expected)


def test_the_hook_is_installed_once(bundle):
    from ernie_align.models.routing import install_routing

    install_routing(bundle.model.model)
    assert list(bundle.model.model._forward_pre_hooks.values()).count(derive_token_types) == 1


def test_embeddings_without_ids_are_refused(bundle):
    embeddings = torch.zeros(1, 4, 128)
    with pytest.raises(ModelError, match="inputs_embeds without input_ids"):
        bundle.model(inputs_embeds=embeddings)
    types = torch.zeros(1, 4, dtype=torch.long)
    assert bundle.model(inputs_embeds=embeddings, moe_mm_token_type_ids=types).logits.shape[:2] == (1, 4)


def test_the_counters_see_every_token_in_every_layer(bundle, batch):
    with count_routed_tokens(find_expert_pools(bundle.model)) as seen:
        forward(bundle.model, batch)
    vision, total = int(batch["vision_tokens"]), batch["input_ids"].numel()
    assert vision == 3 * (4 + 2)
    assert set(seen.vision.values()) == {vision} and set(seen.text.values()) == {total - vision}
    assert len(seen.vision) == 3
    check_routing(seen, vision_tokens=vision, tokens=total)
    forward(bundle.model, batch)  # counting has ended
    assert set(seen.vision.values()) == {vision}


def test_the_check_fails_for_a_model_without_routing(bundle, batch):
    bundle.model.model._forward_pre_hooks.clear()
    with count_routed_tokens(find_expert_pools(bundle.model)) as seen:
        forward(bundle.model, batch, mm_token_type_ids=mm_token_type_ids(batch["input_ids"], bundle.modality))
    with pytest.raises(ModelError, match="18 vision tokens, but 0 reached the vision experts"):
        check_routing(seen, vision_tokens=int(batch["vision_tokens"]), tokens=batch["input_ids"].numel())


def test_a_run_with_wrong_routing_stops_at_its_first_batch(checkpoints, digits, tmp_path, monkeypatch):
    """A model that sets image positions but not the expert pool of image tokens, as plain TRL does."""
    import ernie_align.models.load
    from tests.support.runs import recipe_of, run_quietly

    modality = load_model(str(checkpoints["vl_moe"])).modality

    def forgetful(module, args, kwargs):
        return args, {**kwargs, "mm_token_type_ids": mm_token_type_ids(kwargs["input_ids"], modality)}

    monkeypatch.setattr(
        ernie_align.models.load,
        "install_routing",
        lambda backbone: backbone.register_forward_pre_hook(forgetful, with_kwargs=True),
    )
    recipe = recipe_of("sft", checkpoints["vl_moe"], digits / "inverted_val.jsonl", tmp_path / "run")
    with pytest.raises(ModelError, match="24 vision tokens, but 0 reached the vision experts"):
        run_quietly(recipe)
    assert not (tmp_path / "run" / "final").exists()


def test_generation_routes_every_step(bundle, batch):
    prompts = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    with count_routed_tokens(find_expert_pools(bundle.model)) as seen, torch.no_grad():
        bundle.model.generate(**prompts, max_new_tokens=3, do_sample=False, suppress_tokens=sorted(bundle.modality.ids))
    assert set(seen.vision.values()) == {int(batch["vision_tokens"])}
    assert set(seen.text.values()) == {batch["input_ids"].numel() - 18 + 2 * 3}  # two decode steps of three rows
