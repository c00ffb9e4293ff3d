"""KTO on labeled completions: the reference is where the policy began, images are seen by both, and TRL's numbers."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from ernie_align.errors import RecipeError
from ernie_align.runs import load_recipe, set_up
from tests.support.runs import (
    BOTH_POOLS,
    beside,
    logged,
    long_run,
    recipe_of,
    run_quietly,
    stopped_after,
    tensors_of,
    trainer_of,
    write_rows,
)

MODES = {
    "fresh adapter": {"adapter": BOTH_POOLS},
    "continued adapter": {"adapter": {**BOTH_POOLS, "path": "ADAPTER"}},
    "full": {"adapter": None, "tune": {"scopes": "all"}},
}


def labeled(question, answer, label):
    turns = {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
    return {**turns, "label": label}


@pytest.fixture
def text_rows(tmp_path):
    """Text alone, true and false, completions of different lengths."""
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = [labeled(f"What is {numbers[n]}?", " plus ".join(numbers[: 1 + n % 3]), n % 2 == 0) for n in range(8)]
    return write_rows(tmp_path / "text-labeled.jsonl", rows)


@pytest.fixture
def mixed_rows(digits, tmp_path):
    """Two rows with an image, one true and one false, and two of text alone."""
    pairs = [json.loads(line) for line in (digits / "preferences-val.jsonl").read_text().splitlines()[:2]]
    rows = [
        {
            "prompt": row["prompt"],
            "completion": row[side],
            "images": beside(tmp_path, digits, row["images"]),
            "label": to,
        }
        for row, side, to in zip(pairs, ("chosen", "rejected"), (True, False), strict=True)
    ]
    rows += [labeled("What is two plus three?", "five", True), labeled("one plus one?", "It is nine.", False)]
    return write_rows(tmp_path / "mixed-labeled.jsonl", rows)


@pytest.fixture(scope="module")
def adapter(checkpoints, digits, tmp_path_factory):
    """An adapter that has learned something, so that leaving it out shows."""
    run = tmp_path_factory.mktemp("adapter") / "run"
    training = {"learning_rate": 1e-2, "max_steps": 2}
    rows = digits / "val.jsonl"
    run_quietly(recipe_of("lora", checkpoints["vl_moe"], rows, run, adapter=BOTH_POOLS, training=training))
    return run / "final"


def recipe_in_mode(mode, checkpoints, rows, run_dir, adapter, **blocks):
    recipe = recipe_of("kto", checkpoints["vl_moe"], rows, run_dir, **blocks)
    recipe |= json.loads(json.dumps(MODES[mode]).replace("ADAPTER", str(adapter)))
    return {name: block for name, block in recipe.items() if block is not None}


@pytest.mark.parametrize(("dtype", "checkpointing"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("mode", MODES)
def test_at_step_zero_the_policy_is_its_reference(
    mode, dtype, checkpointing, checkpoints, mixed_rows, adapter, tmp_path, monkeypatch
):
    """Every log-ratio is exactly 0, of matched and of KL completions, so the loss is 1 - sigmoid(0). Both models are
    asked twice, and see two images of 4 placeholders with start and end each time."""
    from ernie_align.stages import trainer as trainer_module
    from ernie_align.stages.kto_trainer import UnpairedTrainer

    ratios, counted = [], []
    check, compute = trainer_module.check_routing, UnpairedTrainer._unpaired_loss

    def spy_on_routing(seen, *, vision_tokens, tokens):
        counted.append({*seen.vision.values()})
        check(seen, vision_tokens=vision_tokens, tokens=tokens)

    def spy_on_loss(trainer, outputs, inputs):
        ratios.extend((outputs.log_probs.sum(dim=1) - inputs["ref_logps"]).tolist())
        ratios.extend((inputs["KL_logps"] - inputs["ref_KL_logps"]).tolist())
        return compute(trainer, outputs, inputs)

    monkeypatch.setattr(trainer_module, "check_routing", spy_on_routing)
    monkeypatch.setattr(UnpairedTrainer, "_unpaired_loss", spy_on_loss)
    training = {"max_steps": 1, "learning_rate": 0.0, "gradient_checkpointing": checkpointing}
    recipe = recipe_in_mode(mode, checkpoints, mixed_rows, tmp_path / "run", adapter, training=training)
    recipe["model"]["dtype"] = dtype
    run_quietly(recipe)
    assert ratios == [0.0] * 8
    assert counted == [{2 * 6}] * 4
    assert logged(tmp_path / "run") == [0.5]
    assert logged(tmp_path / "run", "kl") == [0.0]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_loss_gradients_and_metrics_are_trls_own(loss_type, checkpoints, text_rows, tmp_path):
    """One batch of text, full weights, a policy that has left its reference: what stock TRL computes from the same
    tokens. 1e-5: sums of float32 in another order."""
    from datasets import Dataset
    from trl import KTOTrainer

    from ernie_align.models.load import load_model

    class Stock(KTOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    block = {"loss_type": loss_type, "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    recipe = recipe_of("kto", checkpoints["moe"], text_rows, tmp_path / "run", tune={"scopes": "all"}, kto=block)
    del recipe["adapter"]
    ours = trainer_of(recipe)
    examples = list(ours.train_dataset)
    for example in examples:  # as TRL prepares them: the completion of the row before
        example["KL_completion_ids"] = examples[examples.index(example) - 1]["completion_ids"]
    config = ours.args
    config.train_sampling_strategy = "sequential"
    reference = load_model(str(checkpoints["moe"]), dtype="float32").model
    model = load_model(str(checkpoints["moe"]), dtype="float32").model
    model.load_state_dict(ours.model.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ours.model.get_parameter(name).requires_grad)
    stock = Stock(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=ours.processing_class,
    )
    stock.model.train()
    found = []
    for trainer in (stock, ours):
        collated = trainer.data_collator(examples)
        if trainer is stock and loss_type == "apo_zero_unpaired":
            collated = {name: value for name, value in collated.items() if not name.startswith("KL_")}
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(collated))
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients, {name: value[0] for name, value in trainer._metrics["train"].items()}))
    (loss, gradients, metrics), (our_loss, our_gradients, our_metrics) = found
    assert our_loss == pytest.approx(loss, abs=1e-5) and metrics["rewards/margins"] != 0
    assert our_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).abs().max() <= 1e-5 * max(gradient.abs().max(), 1e-3), name


def test_each_image_is_encoded_once_for_all_four_forwards(checkpoints, mixed_rows, tmp_path):
    recipe = recipe_of("kto", checkpoints["vl_moe"], mixed_rows, tmp_path / "run", adapter=BOTH_POOLS)
    trainer = trainer_of(recipe)
    (tower,) = (module for name, module in trainer.model.named_modules() if name.endswith("vision_tower"))
    asked = []
    tower.register_forward_pre_hook(lambda module, args: asked.append(len(args[1])))
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    trainer.compute_loss(trainer.model, batch).backward()
    assert asked == [2]


@pytest.mark.parametrize("mode", ["continued adapter", "full"])
def test_resumed_is_never_stopped(mode, checkpoints, mixed_rows, adapter, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"

    def recipe(folder):
        given = long_run("kto", checkpoints, "vl_moe", mixed_rows, folder)
        given["training"]["per_device_train_batch_size"] = 2
        given |= json.loads(json.dumps(MODES[mode]).replace("ADAPTER", str(adapter)))
        return {name: block for name, block in given.items() if block is not None}

    run_quietly(recipe(whole))
    stopped_after(3, whole, again)
    run_quietly(recipe(again), resume=True)
    for key in ("loss", "grad_norm", "kl"):
        assert logged(again, key) == logged(whole, key)
    expected, found = tensors_of(whole / "final"), tensors_of(again / "final")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not (whole / "final" / "ref").exists()


def test_evaluation_counts_rows_whatever_the_batches(checkpoints, mixed_rows, text_rows, tmp_path):
    values = []
    for size in (3, 12):
        run = tmp_path / str(size)
        recipe = recipe_of("kto", checkpoints["vl_moe"], mixed_rows, run, adapter=BOTH_POOLS)
        recipe["kto"] = {"loss_type": "apo_zero_unpaired"}  # the KL term of a batch is of that batch
        recipe["data"]["eval"] = [{"path": str(text_rows)}, {"path": str(mixed_rows)}]
        recipe["training"] |= {"per_device_eval_batch_size": size, "learning_rate": 1e-2}
        values.append(run_quietly(recipe).metrics)
    for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/chosen", "eval_logps/rejected", "eval_entropy"):
        assert values[0][key] == pytest.approx(values[1][key], rel=1e-4), key  # padding of other widths
    assert values[0]["eval_rewards/margins"] != 0


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"adapter": None}, "nothing says what is trained"),
        ({"kto": {"loss_type": "ktoo"}}, "did you mean kto?"),
        ({"training": {"beta": 0.1}}, "set kto.beta"),
        ({"training": {"per_device_train_batch_size": 1}}, "set per_device_train_batch_size: 2 or more"),
        ({"training": {"train_sampling_strategy": "sequential"}}, "rows are shuffled by run.seed"),
    ],
)
def test_bad_recipes(blocks, message, checkpoints, text_rows, tmp_path):
    recipe = recipe_of("kto", checkpoints["moe"], text_rows, tmp_path / "run")
    for name, block in blocks.items():
        recipe[name] = {**recipe.get(name, {}), **block} if block is not None else None
    recipe = {name: block for name, block in recipe.items() if block is not None}
    with pytest.raises(RecipeError) as error:
        set_up(load_recipe(recipe))
    assert message in str(error.value)


def test_labels_out_of_balance_are_said(checkpoints, tmp_path, caplog):
    """Three true rows to one false one: both sides weigh the same with a third of the weight."""
    rows = [labeled("one?", answer, answer != "four") for answer in ("one", "two", "three", "four")]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        trainer_of(recipe_of("kto", checkpoints["moe"], file, tmp_path / "run"))
        assert "set kto.desirable_weight between 0.333 and 0.444" in caplog.text
        caplog.clear()
        trainer_of(recipe_of("kto", checkpoints["moe"], file, tmp_path / "run", kto={"desirable_weight": 0.4}))
        assert "desirable_weight" not in caplog.text
