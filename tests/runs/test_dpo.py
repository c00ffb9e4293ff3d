"""Preference training: the reference is where the policy began, in every mode, and images are seen by both."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from ernie_align.errors import RecipeError, RunError
from ernie_align.models.architecture import Architecture
from ernie_align.models.load import load_model
from ernie_align.runs import load_recipe, set_up
from ernie_align.runs.run_dir import RunDirectory
from tests.support.runs import (
    BOTH_POOLS,
    beside,
    logged,
    long_run,
    preference,
    recipe_of,
    run_quietly,
    stopped_after,
    tensors_of,
    write_rows,
)


@pytest.fixture
def text_pairs(tmp_path):
    """Text alone, with answers of different length on both sides."""
    from ernie_align.tiny.tokenizer import NUMBERS

    rows = [
        preference(f"What is {NUMBERS[n % 19]}?", " plus ".join(NUMBERS[: 1 + n % 3]), " ".join(NUMBERS[n % 4 : 6]))
        for n in range(24)
    ]
    return write_rows(tmp_path / "text-pairs.jsonl", rows)


@pytest.fixture
def mixed_pairs(digits, tmp_path):
    """Two pairs with an image, two of text alone."""
    rows = [json.loads(line) for line in (digits / "preferences-val.jsonl").read_text().splitlines()[:2]]
    for row in rows:
        row["images"] = beside(tmp_path, digits, row["images"])
    rows += [preference("What is two plus three?", "five", "It is six."), preference("one plus one?", "two", "nine")]
    return write_rows(tmp_path / "mixed-pairs.jsonl", rows)


@pytest.fixture
def adapter(checkpoints, digits, tmp_path):
    """An adapter that has learned something, so that leaving it out shows."""
    run = tmp_path / "adapter-run"
    rows = digits / "val.jsonl"
    recipe = recipe_of("lora", checkpoints["vl_moe"], rows, run, adapter=BOTH_POOLS, training={"learning_rate": 1e-2})
    run_quietly(recipe)
    return run


MODES = {
    "fresh adapter": {"adapter": BOTH_POOLS},
    "continued adapter": {"adapter": {**BOTH_POOLS, "path": "ADAPTER"}},
    "full": {"adapter": None, "tune": {"scopes": "all"}},
    "fresh adapter, shared prompt": {"adapter": BOTH_POOLS, "dpo": {"shared_prompt": True}},
    "fresh adapter, precomputed": {"adapter": BOTH_POOLS, "dpo": {"reference": "precomputed"}},
    "continued adapter, precomputed": {
        "adapter": {**BOTH_POOLS, "path": "ADAPTER"},
        "dpo": {"reference": "precomputed"},
    },
    "full, precomputed": {"adapter": None, "tune": {"scopes": "all"}, "dpo": {"reference": "precomputed"}},
}


def recipe_in_mode(mode, checkpoints, rows, run_dir, adapter, **blocks):
    recipe = recipe_of("dpo", checkpoints["vl_moe"], rows, run_dir, **blocks)
    recipe |= json.loads(json.dumps(MODES[mode]).replace("ADAPTER", str(adapter / "final")))
    return {name: block for name, block in recipe.items() if block is not None}


@pytest.mark.parametrize(("dtype", "checkpointing"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("mode", MODES)
def test_at_step_zero_the_policy_is_its_reference(
    mode, dtype, checkpointing, checkpoints, mixed_pairs, adapter, tmp_path
):
    """Margin exactly 0 and loss log 2, images and text in one batch: a reference that saw no image would differ."""
    training = {"max_steps": 1, "learning_rate": 0.0, "gradient_checkpointing": checkpointing}
    recipe = recipe_in_mode(mode, checkpoints, mixed_pairs, tmp_path / "run", adapter, training=training)
    recipe["model"]["dtype"] = dtype
    run_quietly(recipe)
    assert logged(tmp_path / "run") == [pytest.approx(math.log(2), abs=1e-6)]
    assert logged(tmp_path / "run", "rewards/margins") == [0.0]
    assert logged(tmp_path / "run", "rewards/chosen") == logged(tmp_path / "run", "rewards/rejected") == [0.0]


@pytest.mark.parametrize("mode", ["fresh adapter", "fresh adapter, shared prompt", "continued adapter", "full"])
def test_the_guard_counts_the_same_vision_tokens_in_both_models(
    mode, checkpoints, mixed_pairs, adapter, tmp_path, monkeypatch
):
    from ernie_align.stages import trainer

    counted = []
    check = trainer.check_routing

    def spy(seen, *, vision_tokens, tokens):
        counted.append({*seen.vision.values()})
        check(seen, vision_tokens=vision_tokens, tokens=tokens)

    monkeypatch.setattr(trainer, "check_routing", spy)
    training = {"max_steps": 1}
    run_quietly(recipe_in_mode(mode, checkpoints, mixed_pairs, tmp_path / "run", adapter, training=training))
    sides = 1 if "shared" in mode else 2
    assert counted == [{sides * 2 * 6}] * 2  # two images of 4 placeholders with start and end, on both sides


def stock_trainer(model, tokenizer, rows, config):
    """TRL's own DPOTrainer on the same tokens: its tokenizer would not put them where generation sees them."""
    from datasets import Dataset
    from trl import DPOTrainer

    class Stock(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    return Stock(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def test_ten_steps_are_those_of_trls_own_trainer(checkpoints, text_pairs, tmp_path):
    """Full fine-tuning of a text model, where stock TRL is right: losses and gradients agree.

    1e-5: sums of float32 in the same order but for padding, at losses of about 1.
    """
    from trl import DPOConfig

    from ernie_align.data.load import encode_sample
    from ernie_align.data.pairs import PairEncoder
    from ernie_align.data.render import renderer_of
    from ernie_align.data.sources import Source
    from ernie_align.recipe import DataBlock, SourceBlock

    training = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-4}
    blocks = {"tune": {"scopes": "all"}, "training": training}
    recipe = recipe_of("dpo", checkpoints["moe"], text_pairs, tmp_path / "run", **blocks)
    del recipe["adapter"]
    run_quietly(recipe)

    bundle = load_model(str(checkpoints["moe"]), dtype="float32")
    block = SourceBlock(path=str(text_pairs))
    examples, _ = encode_sample(
        Source(block, DataBlock(train=[block])), PairEncoder(renderer_of(bundle), max_length=256)
    )
    config = DPOConfig(
        str(tmp_path / "stock"), loss_type=["sigmoid"], router_aux_loss_coef=0.0, seed=0, data_seed=0, bf16=False,
        use_cpu=True, save_strategy="no", report_to="none", logging_steps=1, max_length=None,
        gradient_checkpointing=False, remove_unused_columns=False, disable_tqdm=True, **training,
    )  # fmt: skip
    trainer = stock_trainer(bundle.model, bundle.tokenizer, examples, config)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert logged(tmp_path / "run", key) == pytest.approx([entry[key] for entry in history], abs=1e-5, rel=1e-5)
    assert len(history) == 10 and history[0]["loss"] != history[9]["loss"]


def first_loss(recipe, run_dir):
    """Of a model that has moved away from its reference: the second step of a large learning rate."""
    recipe["training"] |= {"max_steps": 2, "learning_rate": 5e-3, "warmup_steps": 0}
    recipe["run"] = {"dir": str(run_dir)}
    run_quietly(recipe)
    return logged(run_dir)[1], {key: logged(run_dir, key)[1] for key in ("logps/chosen", "logps/rejected")}


def test_losses_are_the_pure_functions_on_trls_batch(checkpoints, mixed_pairs, tmp_path):
    """The same step under each loss; what TRL computes and what losses.py computes from the same log-ratios."""
    from trl import DPOTrainer

    from ernie_align import losses

    seen = []
    compute = DPOTrainer._compute_loss

    class Spy:
        def __get__(self, trainer, owner):
            def spy(model, inputs, return_outputs):
                outputs = model()
                loss = compute(trainer, lambda **_: outputs, inputs, return_outputs)
                sums = outputs.log_probs.sum(dim=1).detach().chunk(2)
                lengths = inputs["completion_mask"][:, 1:].sum(dim=1).chunk(2)
                ratios = [s - inputs[f"ref_{side}_logps"] for s, side in zip(sums, ("chosen", "rejected"), strict=True)]
                seen.append((loss.detach(), ratios, lengths))
                return loss

            return spy

    for loss_type in ("sigmoid", "hinge", "ipo"):
        recipe = recipe_of("dpo", checkpoints["vl_moe"], mixed_pairs, tmp_path, dpo={"loss_type": [loss_type]})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DPOTrainer, "_compute_loss", Spy())
            first_loss(recipe, tmp_path / loss_type)
    pure = {
        "sigmoid": lambda ratios, lengths: losses.dpo_sigmoid(*ratios, beta=0.1),
        "hinge": lambda ratios, lengths: torch.relu(1 - 0.1 * (ratios[0] - ratios[1])),
    }
    for number, name in ((1, "sigmoid"), (3, "hinge")):
        loss, ratios, lengths = seen[number]
        assert ratios[0].abs().max() > 0
        assert loss.item() == pytest.approx(pure[name](ratios, lengths).mean().item(), rel=1e-6)
    loss, (chosen, rejected), lengths = seen[5]
    ipo = (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * 0.1)) ** 2  # Azar et al. (2023), eq. 17, per token
    assert loss.item() == pytest.approx(ipo.mean().item(), rel=1e-6)


def test_length_normalize_and_our_own_losses_by_hand(checkpoints, text_pairs, tmp_path):
    """At step 0 the ratios are 0 however they are scaled; simpo and the SFT term are what the log-probabilities say."""
    from ernie_align.data.load import encode_sample
    from ernie_align.data.pairs import PairCollator, PairEncoder
    from ernie_align.data.render import renderer_of
    from ernie_align.data.sources import Source
    from ernie_align.losses import token_logps
    from ernie_align.recipe import DataBlock, SourceBlock

    training = {"max_steps": 1, "per_device_train_batch_size": 24}
    settings = {
        "scaled": {"length_normalize": True},
        "dpop": {"loss_type": ["dpop"]},
        "simpo": {"loss_type": ["simpo"], "beta": 2.0},
        "sft": {"sft_weight": 0.5},
        "mixed": {"loss_type": ["sigmoid", "simpo"], "loss_weights": [0.25, 2.0], "beta": 2.0},
    }
    found = {}
    for name, block in settings.items():
        run_quietly(recipe_of("dpo", checkpoints["moe"], text_pairs, tmp_path / name, dpo=block, training=training))
        (found[name],) = logged(tmp_path / name)
    bundle = load_model(str(checkpoints["moe"]), dtype="float32")
    block = SourceBlock(path=str(text_pairs))
    examples, _ = encode_sample(
        Source(block, DataBlock(train=[block])), PairEncoder(renderer_of(bundle), max_length=256)
    )
    batch = PairCollator(0)([example | {"rows": [0, 0]} for example in examples])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        logits = bundle.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    sums = token_logps(logits, labels).sum(dim=1)
    counts = batch["completion_mask"].sum(dim=1)
    means = (sums / counts).chunk(2)
    simpo = torch.nn.functional.softplus(0.5 - 2.0 * (means[0] - means[1])).mean().item()
    nll = -(sums.chunk(2)[0].sum() / counts.chunk(2)[0].sum()).item()
    assert [found["scaled"], found["dpop"]] == [pytest.approx(math.log(2), abs=1e-6)] * 2
    # sums of float32 in another order
    assert found["simpo"] == pytest.approx(simpo, rel=1e-5)
    assert found["sft"] == pytest.approx(math.log(2) + 0.5 * nll, rel=1e-5)
    assert found["mixed"] == pytest.approx(0.25 * math.log(2) + 2.0 * simpo, rel=1e-5)


def test_length_normalize_scales_both_sides(checkpoints, text_pairs, tmp_path):
    """What is compared is log π(y) · L / |y|: seen on one pair of the same untrained policy."""
    first = {}
    for scaled in (False, True):
        recipe = recipe_of("dpo", checkpoints["moe"], text_pairs, tmp_path, dpo={"length_normalize": scaled})
        recipe["training"] |= {"per_device_train_batch_size": 1, "max_steps": 1}
        recipe["run"] = {"dir": str(tmp_path / str(scaled))}
        run_quietly(recipe)
        first[scaled] = {key: logged(tmp_path / str(scaled), key)[0] for key in ("logps/chosen", "logps/rejected")}
    mean = {side: first[True][f"logps/{side}"] / first[False][f"logps/{side}"] for side in ("chosen", "rejected")}
    # L / |y_w| and L / |y_l|: their harmonic mean is 1, whatever the lengths
    assert 2 / (1 / mean["chosen"] + 1 / mean["rejected"]) == pytest.approx(1, rel=1e-5)
    assert mean["chosen"] != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("family", ["vl_moe", "moe", "dense"])
def test_the_scope_moves_and_nothing_else(family, checkpoints, mixed_pairs, text_pairs, tmp_path):
    """Of both pools, where there are two."""
    scopes = {"vl_moe": ["text_experts", "vision_experts"], "moe": ["text_experts"], "dense": ["dense_mlp"]}[family]
    rows = mixed_pairs if family == "vl_moe" else text_pairs
    recipe = recipe_of("dpo", checkpoints[family], rows, tmp_path / "run", tune={"scopes": scopes})
    del recipe["adapter"]
    run_quietly(recipe)
    before, after = (
        load_model(str(folder), dtype="float32") for folder in (checkpoints[family], tmp_path / "run/final")
    )
    old, new = (dict(bundle.model.named_parameters()) for bundle in (before, after))
    parts = {tensor.name: tensor.part for tensor in before.architecture.tensors}
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert {parts[name] for name in moved} == set(scopes)
    # nothing attends to image tokens after the last layer, so its vision experts get no gradient from an answer
    still = {name for name, part in parts.items() if part in scopes} - moved
    last = f"layers.{before.architecture.num_layers - 1}."
    assert all(last in name and "vision_moe" in name for name in still)


@pytest.mark.parametrize(
    "mode", ["fresh adapter", "fresh adapter, shared prompt", "continued adapter", "full", "full, precomputed"]
)
def test_resumed_is_never_stopped(mode, checkpoints, digits, adapter, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    rows = digits / "preferences-val.jsonl"
    blocks = {"data": {"train": [{"path": str(rows), "limit": 24}]}}
    blocks |= json.loads(json.dumps(MODES[mode]).replace("ADAPTER", str(adapter / "final")))

    def recipe(folder):
        given = long_run("dpo", checkpoints, "vl_moe", rows, folder, **{k: v for k, v in blocks.items() if v})
        return {name: block for name, block in given.items() if blocks.get(name, True) is not None}

    run_quietly(recipe(whole))
    stopped_after(3, whole, again)
    run_quietly(recipe(again), resume=True)
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert logged(again, key) == logged(whole, key)
    expected, found = tensors_of(whole / "final"), tensors_of(again / "final")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not (whole / "final" / "ref").exists()


def test_precomputed_log_probabilities_are_reused_or_refused(checkpoints, mixed_pairs, tmp_path):
    """Kept with a fingerprint; a policy that has moved may not pass for its reference."""
    run = tmp_path / "run"

    def recipe():
        given = long_run("dpo", checkpoints, "vl_moe", mixed_pairs, run, tune={"scopes": ["attention"]})
        del given["adapter"]
        given["dpo"] = {"reference": "precomputed"}
        return given

    run_quietly(recipe())
    kept = run / "reference" / "train.safetensors"
    written = kept.stat().st_mtime_ns
    shutil.rmtree(run / "final")
    run_quietly(recipe(), resume=True)
    assert kept.stat().st_mtime_ns == written
    shutil.rmtree(run / "final")
    kept.unlink()
    with pytest.raises(RunError, match="holds no log-probabilities"):
        run_quietly(recipe(), resume=True)


def test_evaluation_counts_pairs_and_expert_flips(checkpoints, digits, tmp_path):
    """Means over pairs, whatever the batches; a policy that has not moved flips no expert."""
    values = {}
    for size, rate, shared in ((3, 1e-2, False), (5, 1e-2, True), (5, 0.0, True)):
        run = tmp_path / f"{size}-{rate}"
        recipe = recipe_of("dpo", checkpoints["vl_moe"], digits / "preferences-val.jsonl", run, adapter=BOTH_POOLS)
        recipe["dpo"] = {"shared_prompt": shared}
        recipe["data"]["train"][0]["limit"] = 8
        recipe["data"]["eval"] = [{"path": str(digits / "preferences-test.jsonl"), "limit": 8}]
        recipe["training"] |= {"per_device_eval_batch_size": size, "learning_rate": rate}
        values[size, rate] = run_quietly(recipe).metrics
    for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert values[3, 1e-2][key] == pytest.approx(
            values[5, 1e-2][key], rel=1e-4
        )  # padding of other widths, and two layouts
    for pool in ("text", "vision"):
        assert values[5, 0.0][f"eval_routing/flips_{pool}"] == 0
        assert 0 < values[5, 1e-2][f"eval_routing/flips_{pool}"] < 1


def test_a_run_continues_from_an_earlier_run(checkpoints, digits, adapter, tmp_path):
    """model.name: a run directory. Base, adapter and scope are found and reported."""
    recipe = recipe_of("dpo", adapter, digits / "preferences-val.jsonl", tmp_path / "run")
    recipe["data"]["train"][0]["limit"] = 8
    del recipe["adapter"]
    setup = set_up(load_recipe(recipe))
    assert setup.recipe.model.name == str(checkpoints["vl_moe"])
    assert setup.recipe.adapter.path == str(adapter / "final")
    assert setup.parameter_summary == set_up(load_recipe({**recipe, "adapter": BOTH_POOLS})).parameter_summary
    assert any("is an adapter: training continues with it" in note for note in setup.notes)
    run_quietly(recipe | {"training": recipe["training"] | {"max_steps": 1}})
    assert RunDirectory(tmp_path / "run").final.exists()
    assert logged(tmp_path / "run", "rewards/margins") == [0.0]


def test_a_run_that_cannot_be_continued_is_an_error(checkpoints, text_rows, adapter, tmp_path):
    with pytest.raises(RecipeError, match="is an adapter, not a model"):
        set_up(load_recipe(recipe_of("sft", adapter, text_rows, tmp_path / "run")))
    other = recipe_of("dpo", adapter, text_rows, tmp_path / "run", adapter={"path": str(tmp_path)})
    with pytest.raises(RecipeError, match=r"adapter\.path names another"):
        set_up(load_recipe(other))
    shutil.rmtree(adapter / "final")
    with pytest.raises(RecipeError, match="is an unfinished run"):
        set_up(load_recipe(recipe_of("lora", adapter, text_rows, tmp_path / "run")))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"tune": {"scopes": "all"}}, "both adapter and tune"),
        ({"adapter": None}, "nothing says what is trained"),
        ({"dpo": {"beta": 0}}, "greater than 0"),
        ({"dpo": {"loss_type": ["sigmoyd"]}}, "did you mean sigmoid?"),
        ({"dpo": {"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]}}, "2 weights for 1 loss types"),
        ({"dpo": {"loss_type": ["ipo"], "length_normalize": True}}, "already normalizes by length"),
        ({"dpo": {"loss_type": ["simpo"], "ld_alpha": 0.5}}, "simpo with"),
        ({"training": {"beta": 0.1}}, "set dpo.beta"),
        ({"data": {"streaming": True}, "dpo": {"reference": "precomputed"}}, "with data.streaming"),
    ],
)
def test_bad_recipes(blocks, message, checkpoints, text_pairs, tmp_path):
    recipe = recipe_of("dpo", checkpoints["moe"], text_pairs, tmp_path / "run")
    for name, block in blocks.items():
        recipe[name] = {**recipe.get(name, {}), **block} if block is not None else None
    recipe = {name: block for name, block in recipe.items() if block is not None}
    with pytest.raises(RecipeError) as error:
        set_up(load_recipe(recipe))
    assert message in str(error.value)


def test_bad_pairs_are_named(checkpoints, tmp_path):
    rows = [preference("one?", "two", "three"), preference("one?", "two", "two"), preference("one?", "two", " ")]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    recipe = recipe_of("dpo", checkpoints["moe"], file, tmp_path / "run", dpo={"bad_pairs": "drop"})
    run_quietly(recipe)
    (count,) = json.loads((tmp_path / "run" / "data.json").read_text())
    assert count["kept"] == 1
    assert count["dropped_rows"] == {
        "chosen equals rejected": [f"{file}:2"],
        "rejected: an empty answer": [f"{file}:3"],
    }


def test_anatomy_of_an_adapter_is_read_back(checkpoints, adapter):
    """adapter_block is the inverse of lora_config."""
    from ernie_align.models.trainable_parts import adapter_block_from_config, adapter_targets
    from ernie_align.recipe import AdapterBlock

    architecture = Architecture.from_config(json.loads((checkpoints["vl_moe"] / "config.json").read_text()))
    block = adapter_block_from_config(
        json.loads((adapter / "final" / "adapter_config.json").read_text()), architecture, where=""
    )
    assert adapter_targets(architecture, block) == adapter_targets(architecture, AdapterBlock(**BOTH_POOLS))
