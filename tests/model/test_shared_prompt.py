"""A prompt that both answers share is the prompt that each has to itself: losses, gradients, metrics and routing."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from ernie_align.errors import RecipeError
from ernie_align.models.image_cache import ImageFeatureCache, deduplicate_images, is_vision_frozen
from ernie_align.models.load import load_model
from ernie_align.runs import load_recipe
from tests.support.runs import BOTH_POOLS, batch_with_images, beside, preference, recipe_of, trainer_of, write_rows

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
    """Two images in one prompt, one in another, none in two; answers that differ in length. Beside it text alone, with
    an empty prompt."""
    rows = [json.loads(line) for line in (digits / "preferences-val.jsonl").read_text().splitlines()]
    shown = {count: next(row for row in rows if len(row.get("images", [])) == count) for count in (1, 2)}
    text = [preference("two plus three?", "five", "It is six."), preference("one plus one?", "two", "nine")]
    folder = tmp_path_factory.mktemp("pairs")
    for row in shown.values():
        beside(folder, digits, row["images"])
    write_rows(folder / "text.jsonl", [*text, {"prompt": "", "chosen": "two three", "rejected": "one"}])
    return write_rows(folder / "mixed.jsonl", [shown[2], text[0], shown[1], text[1]])


@pytest.fixture(scope="module")
def adapter(checkpoints, digits, tmp_path_factory):
    """An adapter that has learned something."""
    from tests.support.runs import run_quietly

    run = tmp_path_factory.mktemp("adapter") / "run"
    training = {"learning_rate": 1e-2, "max_steps": 2}
    run_quietly(
        recipe_of("lora", checkpoints["vl_moe"], digits / "val.jsonl", run, adapter=BOTH_POOLS, training=training)
    )
    return run / "final"


def one_step(recipe):
    """Loss, gradients and metrics of one batch that holds all pairs. One has a turn of the user's in its answer."""
    trainer = trainer_of(recipe)
    examples = list(trainer.train_dataset)
    examples[0]["rejected_mask"][1:3] = 0, 0
    batch = trainer.data_collator(examples)
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_shared_prompt_changes_nothing_but_the_work(way, checkpoints, pairs, adapter, tmp_path):
    """Losses are about 1 and their gradients, each against the greatest of its tensor, sums of float32 in another
    order: 1e-5."""
    family, attention, blocks, training = WAYS[way]
    rows = pairs if family == "vl_moe" else pairs.with_name("text.jsonl")
    found = []
    for shared in (False, True):
        recipe = recipe_of("dpo", checkpoints[family], rows, tmp_path / f"run-{shared}", training=training)
        recipe["model"]["attention"] = attention
        recipe |= json.loads(json.dumps(blocks).replace("ADAPTER", str(adapter)))
        recipe["dpo"] = {**recipe.get("dpo", {}), "shared_prompt": shared}
        found.append(one_step({name: block for name, block in recipe.items() if block is not None}))
    (loss, gradients, metrics), (shared_loss, shared_gradients, shared_metrics) = found
    assert shared_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert shared_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        off, size = (shared_gradients[name] - gradient).abs().max(), gradient.abs().max()
        assert off <= 1e-5 * size, name
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    assert shared_metrics.keys() == metrics.keys()
    for name in metrics.keys() - {"num_tokens"}:
        assert shared_metrics[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-5), name
    assert shared_metrics["num_tokens"] < metrics["num_tokens"]


def towers(trainer):
    """How often the tower of each model is asked from here on, and for how many images."""
    asked = {"policy": [], "reference": []}

    def note(name):
        return lambda module, args: asked[name].append(len(args[1]))

    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        for path, module in model.named_modules() if model is not None else ():
            if path.endswith("vision_tower"):
                module.register_forward_pre_hook(note(name))
    return asked


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
    """Three images, for both sides; for both models too where the tower stays as it is. And the guard, which counts
    the same vision tokens in both, is content."""
    recipe = recipe_of("dpo", checkpoints["vl_moe"], pairs, tmp_path / "run", training={"gradient_checkpointing": True})
    recipe |= {**blocks, "dpo": {"shared_prompt": shared}}
    trainer = trainer_of({name: block for name, block in recipe.items() if block is not None})
    asked = towers(trainer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert len(batch["image_grid_thw"]) == 3
    assert batch["vision_tokens"] == 3 * 6 * (1 if shared else 2)
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
    assert asked == {"policy": policy, "reference": reference}


@pytest.mark.parametrize("trained", [False, True])
def test_features_are_those_of_images_that_are_shown_twice(trained, checkpoints, digits):
    """The stock forward on all pixels twice, and the rows of a batch twice: outputs, and gradients of the tower."""
    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    model = bundle.model.requires_grad_(trained)
    assert is_vision_frozen(model) is not trained
    batch = {name: values for name, values in batch_with_images(bundle, digits).items() if name != "vision_tokens"}
    twice = {name: torch.cat([values, values]) for name, values in batch.items() if name != "labels"}
    once = {**twice, "pixel_values": batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"]}
    found = []
    for inputs, context in (
        (twice, nullcontext()),
        (once, ImageFeatureCache(frozen=not trained).use(model, times=2)),
    ):
        model.zero_grad()
        with context:
            logits = model(**inputs, use_cache=False).logits
        if trained:
            logits.logsumexp(dim=-1).mean().backward()
        found.append((logits.detach(), model.model.vision_tower.patch_embed.proj.weight.grad))
    (logits, gradient), (once_logits, once_gradient) = found
    # the tower's products are of other heights, and gradients of both sides are added at the image
    assert torch.allclose(once_logits, logits, atol=1e-5)
    if trained:
        assert gradient.abs().max() > 0 and (once_gradient - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_no_image_is_taken_for_another(checkpoints, digits):
    """Features are kept for the very same pixels and grids alone, and a hook is gone with its context."""
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


def test_an_image_that_comes_again_is_encoded_once(checkpoints, digits):
    """As the completions of one prompt bring it: logits are those of encoding each, to the height of a product."""
    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    batch = {name: values for name, values in batch_with_images(bundle, digits).items() if name != "vision_tokens"}
    order = torch.tensor([1, 0, 1, 1])  # rows of one image, two, one, one
    patches = batch["pixel_values"].split(16)
    places = [2, 0, 1, 2, 2]
    again = {name: batch[name][order] for name in ("input_ids", "attention_mask")}
    again |= {
        "pixel_values": torch.cat([patches[place] for place in places]),
        "image_grid_thw": batch["image_grid_thw"][places],
    }
    asked = []
    patches_seen = bundle.model.model.vision_tower.patch_embed
    patches_seen.register_forward_pre_hook(lambda module, args: asked.append(len(args[0]) // 16))
    with torch.no_grad():
        plain = bundle.model(**again, use_cache=False).logits
        with ImageFeatureCache(frozen=True).use(bundle.model):
            once = bundle.model(**again, use_cache=False).logits
        with deduplicate_images(bundle.model):
            hooked = bundle.model(**again, use_cache=False).logits
    assert asked == [5, 3, 3]
    assert torch.allclose(once, plain, atol=1e-5)
    assert torch.equal(hooked, once)


def test_flash_attention_is_refused(checkpoints, pairs, tmp_path):
    recipe = recipe_of("dpo", checkpoints["dense"], pairs, tmp_path / "run", dpo={"shared_prompt": True})
    recipe["model"]["attention"] = "flash_attention_2"
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    (fault,) = caught.value.faults
    assert fault.what == "shared_prompt with attention flash_attention_2"
    assert fault.fix == "set model.attention: sdpa, or dpo.shared_prompt: false"
