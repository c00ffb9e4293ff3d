"""A shared prompt gives the losses, gradients, metrics and routing of separate rows."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from ernie_align.errors import RecipeError
from ernie_align.models.image_cache import ImageFeatureCache, deduplicate_images, is_vision_frozen
from ernie_align.models.load import load_model
from ernie_align.runs import load_recipe
from tests.support.runs import (
    BOTH_POOLS,
    batch_with_images,
    beside,
    preference,
    recipe_of,
    relative_difference,
    trainer_of,
    write_rows,
)

VISION_TOO = {"scopes": ["attention", "vision_experts", "resampler", "vision_tower"], "rank": 4, "alpha": 8}
ALL_LOSSES = ["sigmoid", "hinge", "ipo", "aot", "apo_down", "sft", "simpo", "dpop"]

WAYS = {
    "adapter, checkpointing": ("vl_moe", "sdpa", {"adapter": BOTH_POOLS}, {"gradient_checkpointing": True}),
    "adapter on the tower": ("vl_moe", "eager", {"adapter": VISION_TOO}, {}),
    "continued adapter, precomputed": (
        "vl_moe",
        "sdpa",
        {"adapter": {**BOTH_POOLS, "path": "ADAPTER"}, "dpo": {"reference": "precomputed"}},
        {},
    ),
    "full, checkpointing": (
        "vl_moe",
        "sdpa",
        {"adapter": None, "tune": {"scopes": "all"}},
        {"gradient_checkpointing": True},
    ),
    "all losses": ("moe", "sdpa", {"dpo": {"loss_type": ALL_LOSSES, "sft_weight": 0.5}}, {}),
    "scaled by length": ("dense", "eager", {"dpo": {"length_normalize": True}}, {}),
    "weighed by token": ("dense", "sdpa", {"dpo": {"use_weighting": True, "ld_alpha": 0.5}}, {}),
}


@pytest.fixture(scope="module")
def pairs(digits, tmp_path_factory):
    """Pairs with two images, one and none, answers of different lengths; also text pairs, one without prompt."""
    rows = [json.loads(line) for line in (digits / "preferences-val.jsonl").read_text().splitlines()]
    by_images = {count: next(row for row in rows if len(row.get("images", [])) == count) for count in (1, 2)}
    text = [preference("two plus three?", "five", "It is six."), preference("one plus one?", "two", "nine")]
    folder = tmp_path_factory.mktemp("pairs")
    for row in by_images.values():
        beside(folder, digits, row["images"])
    write_rows(folder / "text.jsonl", [*text, {"prompt": "", "chosen": "two three", "rejected": "one"}])
    return write_rows(folder / "mixed.jsonl", [by_images[2], text[0], by_images[1], text[1]])


@pytest.fixture(scope="module")
def adapter(checkpoints, digits, tmp_path_factory):
    """A trained adapter."""
    from tests.support.runs import run_quietly

    run = tmp_path_factory.mktemp("adapter") / "run"
    training = {"learning_rate": 1e-2, "max_steps": 2}
    run_quietly(
        recipe_of("lora", checkpoints["vl_moe"], digits / "val.jsonl", run, adapter=BOTH_POOLS, training=training)
    )
    return run / "final"


def one_step(recipe):
    """Return loss, gradients and metrics of one batch of all pairs. One answer contains a turn of the user."""
    trainer = trainer_of(recipe)
    examples = list(trainer.train_dataset)
    examples[0]["rejected_mask"][1:3] = 0, 0
    batch = trainer.data_collator(examples)
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_shared_prompt_equals_separate_rows(way, checkpoints, pairs, adapter, tmp_path):
    """Within 1e-5: losses of about 1, and gradients relative to the largest in their tensor (order of summation)."""
    family, attention, blocks, training = WAYS[way]
    rows = pairs if family == "vl_moe" else pairs.with_name("text.jsonl")
    steps = []
    for shared in (False, True):
        recipe = recipe_of("dpo", checkpoints[family], rows, tmp_path / f"run-{shared}", training=training)
        recipe["model"]["attention"] = attention
        recipe |= json.loads(json.dumps(blocks).replace("ADAPTER", str(adapter)))
        recipe["dpo"] = {**recipe.get("dpo", {}), "shared_prompt": shared}
        steps.append(one_step({name: block for name, block in recipe.items() if block is not None}))
    (loss, gradients, metrics), (shared_loss, shared_gradients, shared_metrics) = steps
    assert shared_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert shared_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference, size = (shared_gradients[name] - gradient).abs().max(), gradient.abs().max()
        assert difference <= 1e-5 * size, name
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    assert shared_metrics.keys() == metrics.keys()
    for name in metrics.keys() - {"num_tokens"}:
        assert shared_metrics[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-5), name
    assert shared_metrics["num_tokens"] < metrics["num_tokens"]


def record_tower_calls(trainer):
    """Record from now on the number of images in each call of each model's vision tower."""
    calls = {"policy": [], "reference": []}

    def record(name):
        return lambda module, args: calls[name].append(len(args[1]))

    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        for path, module in model.named_modules() if model is not None else ():
            if path.endswith("vision_tower"):
                module.register_forward_pre_hook(record(name))
    return calls


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("blocks", "policy", "reference"),
    [
        ({"adapter": BOTH_POOLS}, [3], []),
        ({"adapter": VISION_TOO}, [3, 3], []),  # the same tower with its adapters on, then off
        ({"adapter": None, "tune": {"scopes": ["attention"]}}, [3], []),
        ({"adapter": None, "tune": {"scopes": "all"}}, [3], [3]),
    ],
)
def test_an_image_is_encoded_once(shared, blocks, policy, reference, checkpoints, pairs, tmp_path):
    """Three images, once for both sides, and for both models if the tower is frozen. The routing check still passes."""
    recipe = recipe_of("dpo", checkpoints["vl_moe"], pairs, tmp_path / "run", training={"gradient_checkpointing": True})
    recipe |= {**blocks, "dpo": {"shared_prompt": shared}}
    trainer = trainer_of({name: block for name, block in recipe.items() if block is not None})
    calls = record_tower_calls(trainer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert len(batch["image_grid_thw"]) == 3
    assert batch["vision_tokens"] == 3 * 6 * (1 if shared else 2)
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
    assert calls == {"policy": policy, "reference": reference}


@pytest.mark.parametrize("trained", [False, True])
def test_cached_features_equal_those_of_repeated_images(trained, checkpoints, digits):
    """Outputs and tower gradients of repeated rows equal those with repeated pixels."""
    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    model = bundle.model.requires_grad_(trained)
    assert is_vision_frozen(model) is not trained
    batch = {name: values for name, values in batch_with_images(bundle, digits).items() if name != "vision_tokens"}
    twice = {name: torch.cat([values, values]) for name, values in batch.items() if name != "labels"}
    once = {**twice, "pixel_values": batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"]}
    results = []
    for inputs, context in (
        (twice, nullcontext()),
        (once, ImageFeatureCache(frozen=not trained).use(model, times=2)),
    ):
        model.zero_grad()
        with context:
            logits = model(**inputs, use_cache=False).logits
        if trained:
            logits.logsumexp(dim=-1).mean().backward()
        results.append((logits.detach(), model.model.vision_tower.patch_embed.proj.weight.grad))
    (logits, gradient), (once_logits, once_gradient) = results
    # the tower's products have other heights, and gradients of both sides are summed at the image
    assert relative_difference(once_logits, logits) <= 1e-5
    if trained:
        assert gradient.abs().max() > 0 and (once_gradient - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_other_pixels_are_not_served_from_the_cache(checkpoints, digits):
    """Features are cached for equal pixels and grids only, and the hook is removed with its context."""
    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    batch = {name: values for name, values in batch_with_images(bundle, digits).items() if name != "vision_tokens"}
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    images = ImageFeatureCache(frozen=True)
    with torch.no_grad():
        plain = [bundle.model(**inputs, use_cache=False).logits for inputs in (batch, other, batch)]
        for inputs, expected in zip((batch, other, batch), plain, strict=True):
            with images.use(bundle.model):
                assert torch.equal(bundle.model(**inputs, use_cache=False).logits, expected)
        assert torch.equal(bundle.model(**other, use_cache=False).logits, plain[1])
    assert not torch.equal(plain[0], plain[1])


def test_a_repeated_image_is_encoded_once(checkpoints, digits):
    """As with several completions of one prompt. Logits equal those of encoding each, up to rounding."""
    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    batch = {name: values for name, values in batch_with_images(bundle, digits).items() if name != "vision_tokens"}
    order = torch.tensor([1, 0, 1, 1])  # rows of one image, two, one, one
    patches = batch["pixel_values"].split(16)
    images = [2, 0, 1, 2, 2]
    again = {name: batch[name][order] for name in ("input_ids", "attention_mask")}
    again |= {
        "pixel_values": torch.cat([patches[index] for index in images]),
        "image_grid_thw": batch["image_grid_thw"][images],
    }
    calls = []
    patches_seen = bundle.model.model.vision_tower.patch_embed
    patches_seen.register_forward_pre_hook(lambda module, args: calls.append(len(args[0]) // 16))
    with torch.no_grad():
        plain = bundle.model(**again, use_cache=False).logits
        with ImageFeatureCache(frozen=True).use(bundle.model):
            once = bundle.model(**again, use_cache=False).logits
        with deduplicate_images(bundle.model):
            hooked = bundle.model(**again, use_cache=False).logits
    assert calls == [5, 3, 3]
    assert relative_difference(once, plain) <= 1e-5
    assert torch.equal(hooked, once)


def test_flash_attention_is_refused(checkpoints, pairs, tmp_path):
    recipe = recipe_of("dpo", checkpoints["dense"], pairs, tmp_path / "run", dpo={"shared_prompt": True})
    recipe["model"]["attention"] = "flash_attention_2"
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    (fault,) = caught.value.faults
    assert fault.what == "shared_prompt with attention flash_attention_2"
    assert fault.fix == "set model.attention: sdpa, or dpo.shared_prompt: false"
