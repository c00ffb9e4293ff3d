"""Training weighs every trained token alike, moves the scope and nothing else, and stops at numbers that are none."""

from __future__ import annotations

import json

import pytest
import torch

from ernie_align.errors import RunError
from ernie_align.models.load import load_model
from tests.support.runs import beside, logged, recipe_of, run_quietly, tensors_of, write_rows

# Sums of float32 in another order: relative errors of about 1e-7 per term, at losses of about 6.
SUMMED_OTHERWISE = 1e-5


@pytest.fixture
def mixed_rows(digits, tmp_path):
    """Images, two images and text alone, with answers of different length, in one file."""
    lines = [json.loads(line) for line in (digits / "train.jsonl").read_text().splitlines()]
    chosen = [next(row for row in lines if row["kind"] == kind) for kind in ("name", "sum", "compare", "sum", "name")]
    for number, row in enumerate(chosen):
        row["messages"][1]["content"] = " plus ".join([row["answer"]] * (1 + number))
        row["images"] = beside(tmp_path, digits, row.get("images", []))
    return write_rows(tmp_path / "mixed.jsonl", [*chosen[:4]])


def test_four_batches_of_one_are_one_batch_of_four(checkpoints, mixed_rows, tmp_path):
    """Gradient accumulation weighs tokens, not batches: answers here are 2 to 11 tokens long."""
    results = {}
    for size, steps in ((4, 1), (1, 4)):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        recipe = recipe_of("sft", checkpoints["vl_moe"], mixed_rows, tmp_path / f"{size}", training=training)
        run_quietly(recipe)
        results[size] = (logged(tmp_path / f"{size}"), logged(tmp_path / f"{size}", "grad_norm"))
    for key in (0, 1):
        assert results[1][key] == pytest.approx(results[4][key], rel=SUMMED_OTHERWISE)


def test_the_loss_is_the_mean_over_trained_tokens(checkpoints, mixed_rows, tmp_path):
    """The first logged loss against cross-entropy of the model's own logits, token by token; no auxiliary loss."""
    from ernie_align.data.collate import Collator, RowEncoder
    from ernie_align.data.load import encode_sample
    from ernie_align.data.sources import Source
    from ernie_align.evaluation.generate import renderer_of
    from ernie_align.recipe import DataBlock, SourceBlock

    run_quietly(recipe_of("sft", checkpoints["vl_moe"], mixed_rows, tmp_path / "run", training={"max_steps": 1}))
    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    block = SourceBlock(path=str(mixed_rows))
    examples, _ = encode_sample(
        Source(block, DataBlock(train=[block])), RowEncoder(renderer_of(bundle), max_length=256)
    )
    nll, tokens = 0.0, 0
    for example in examples:
        batch = Collator(0, image_processor=bundle.image_processor)([example | {"rows": [0, 0]}])
        labels = batch.pop("labels")[:, 1:]
        batch = {key: value for key, value in batch.items() if key not in ("rows", "vision_tokens")}
        with torch.no_grad():
            logits = bundle.model(**batch, use_cache=False).logits[:, :-1]
        nll += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        tokens += (labels != -100).sum().item()
    assert logged(tmp_path / "run")[0] == pytest.approx(nll / tokens, rel=SUMMED_OTHERWISE)


def test_evaluation_weighs_tokens_whatever_the_batch(checkpoints, mixed_rows, tmp_path):
    losses = {}
    for size in (1, 3):
        recipe = recipe_of(
            "sft",
            checkpoints["vl_moe"],
            mixed_rows,
            tmp_path / f"{size}",
            data={"eval": [{"path": str(mixed_rows)}]},
            training={"max_steps": 1, "per_device_eval_batch_size": size},
        )
        losses[size] = run_quietly(recipe).metrics
    for key in ("eval_loss", "eval_mean_token_accuracy"):
        assert losses[1][key] == pytest.approx(losses[3][key], rel=SUMMED_OTHERWISE)


@pytest.mark.parametrize("scopes", [["vision_experts"], ["text_experts", "text_router"], ["resampler", "norms"]])
def test_full_tuning_moves_the_scope_and_nothing_else(checkpoints, digits, tmp_path, scopes):
    recipe = recipe_of(
        "sft", checkpoints["vl_moe"], digits / "parity_val.jsonl", tmp_path / "run", tune={"scopes": scopes}
    )
    result = run_quietly(recipe)
    before = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    after = load_model(str(result.final), dtype="float32").model.state_dict()
    in_scope = {tensor.name for part in scopes for tensor in before.architecture.of(part) if tensor.kind != "frozen"}
    # behind the last layer nobody attends to image tokens: what its vision experts say reaches no trained token
    in_scope = {name for name in in_scope if "layers.3.mlp.vision_moe" not in name}
    moved = {name for name, value in before.model.named_parameters() if not torch.equal(value, after[name])}
    assert moved == in_scope


def test_lora_saves_the_adapter_alone_and_the_base_stays(checkpoints, digits, tmp_path, family):
    rows = digits / "val.jsonl" if family == "vl_moe" else None
    if rows is None:
        text = {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "one"}]}
        rows = write_rows(tmp_path / "text.jsonl", [text] * 16)
    before = tensors_of(checkpoints[family])
    result = run_quietly(recipe_of("lora", checkpoints[family], rows, tmp_path / "run", adapter={"scopes": "all"}))
    assert all(".lora_" in name for name in tensors_of(result.final))
    assert {path.name for path in result.final.iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    assert not list(result.final.glob("*.bin"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(checkpoints[family]).items())
    assert logged(tmp_path / "run")[-1] < logged(tmp_path / "run")[0]


def test_the_seed_is_the_run(checkpoints, text_rows, tmp_path):
    """Order of rows and the draw of a fresh adapter: the same seed, the same run; another, another."""
    losses = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = {"dir": str(tmp_path / name), "seed": seed}
        torch.rand(3)  # whatever happened before in this process
        run_quietly(recipe_of("lora", checkpoints["moe"], text_rows, tmp_path / name, run=run))
        losses[name] = logged(tmp_path / name)
    assert losses["a"] == losses["b"] != losses["c"]


def test_what_sft_leaves_loads_in_plain_transformers(checkpoints, digits, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    recipe = recipe_of("sft", checkpoints["vl_moe"], digits / "val.jsonl", tmp_path / "run", training={"max_steps": 1})
    result = run_quietly(recipe)
    plain = AutoModelForImageTextToText.from_pretrained(result.final)
    ours = load_model(str(result.final), dtype="float32")
    ids = AutoTokenizer.from_pretrained(result.final)("What is two plus three?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours.model(input_ids=ids).logits)


def test_the_run_directory_tells_the_run(checkpoints, digits, tmp_path):
    recipe = recipe_of("sft", checkpoints["vl_moe"], digits / "val.jsonl", tmp_path / "run")
    recipe["training"] |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    run_quietly(recipe)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"checkpoint-4", "final"}
    assert json.loads((run / "run.json").read_text())["environment"]["pixels_by"] in ("pil", "torchvision")
    assert json.loads((run / "data.json").read_text())[0]["kept"] == 140
    coverage = {row["part"]: row for row in json.loads((run / "coverage.json").read_text())}
    assert coverage["text_experts"]["trainable"] == coverage["text_experts"]["parameters"]
    assert "<|IMAGE_PLACEHOLDER|>" in (run / "preview.txt").read_text()
    assert "stage: sft" in (run / "recipe.yaml").read_text()
    assert "overlong: drop" in (run / "recipe.resolved.yaml").read_text()
    assert len(logged(run)) == 4 and not (run / "final.partial").exists()
    assert not list((run / "final").glob("*.bin"))
    # checkpoints load by themselves, too
    assert load_model(str(run / "checkpoint-4"), dtype="float32").modality is not None


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_rows(checkpoints, text_rows, tmp_path):
    recipe = recipe_of("sft", checkpoints["dense"], text_rows, tmp_path / "run")
    recipe["training"] |= {"learning_rate": 1e30, "max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 1}
    recipe["training"]["max_steps"] = 8
    with pytest.raises(RunError, match=r"step \d: the (loss|gradient) is (nan|inf)") as caught:
        run_quietly(recipe)
    assert f"{text_rows}:" in str(caught.value) and "--resume" in str(caught.value)
    assert not (tmp_path / "run" / "final").exists()
    step = int(caught.value.faults[0].where.removeprefix("step "))
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept and kept[-1] == f"checkpoint-{step - 1}"
    # the weights that are kept are those from before the number was lost
    assert load_model(str(tmp_path / "run" / kept[0]), dtype="float32")


def test_a_gradient_that_is_no_number_never_reaches_the_weights(checkpoints, text_rows, tmp_path):
    """The loss is finite; the weights would not be, and the next checkpoint would hold them."""
    from ernie_align.runs import load_recipe, prepare_data, set_up

    setup = set_up(load_recipe(recipe_of("sft", checkpoints["dense"], text_rows, tmp_path / "run")))
    data = prepare_data(setup)
    bundle = load_model(str(checkpoints["dense"]), dtype="float32")
    setup.stage.prepare_model(setup.recipe, bundle)
    config = setup.stage.configure(setup.recipe, str(tmp_path / "run"))
    trainer = setup.stage.build_trainer(setup.recipe, config, bundle, data, [])
    bundle.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    with pytest.raises(RunError, match="step 1: the gradient is"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())


def test_images_that_break_while_training_name_their_row(checkpoints, digits, tmp_path):
    """Found while judging, before a step is taken."""
    from ernie_align.errors import DataError

    (tmp_path / "a.png").write_bytes((digits / "images" / "0000.png").read_bytes()[:200])
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], "images": ["a.png"]}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*a\.png"):
        run_quietly(recipe_of("sft", checkpoints["vl_moe"], path, tmp_path / "run"))


def test_a_batch_that_teaches_nothing_in_scope_is_no_accident(checkpoints, text_rows, tmp_path):
    """Vision parts in scope, a batch of text alone: no gradient, no crash, and the adapter stays no change at all."""
    recipe = recipe_of(
        "lora", checkpoints["vl_moe"], text_rows, tmp_path / "run", adapter={"scopes": ["vision_experts"]}
    )
    result = run_quietly(recipe)
    assert result.text_unchanged is True
    assert all(not tensor.any() for name, tensor in tensors_of(result.final).items() if "lora_B" in name)
    assert json.loads((tmp_path / "run" / "data.json").read_text())[0]["without_images"] == 24


def test_training_on_a_stream(checkpoints, digits, tmp_path):
    recipe = recipe_of("sft", checkpoints["vl_moe"], digits / "train.jsonl", tmp_path / "run", data={"streaming": True})
    run_quietly(recipe)
    assert len(logged(tmp_path / "run")) == 4
    assert json.loads((tmp_path / "run" / "data.json").read_text())[0]["kept"] >= 16
    from ernie_align.errors import RecipeError

    del recipe["training"]["max_steps"]
    with pytest.raises(RecipeError, match="streaming without a number of steps"):
        run_quietly({**recipe, "run": {"dir": str(tmp_path / "other")}})


@pytest.mark.parametrize(("scopes", "learns"), [(["attention", "vision_experts"], False), (["vision_tower"], True)])
def test_no_gradient_passes_a_tower_that_learns_nothing(checkpoints, digits, tmp_path, scopes, learns):
    """Checkpointing makes input embeddings require gradients, those of the tower too."""
    seen = []

    def note(module, args, output):
        if type(module).__name__ == "Ernie4_5_VLMoeVisionBlock":
            seen.append(output.requires_grad)

    training = {"gradient_checkpointing": True, "max_steps": 1}
    recipe = recipe_of("lora", checkpoints["vl_moe"], digits / "train.jsonl", tmp_path / "run", training=training)
    recipe["adapter"]["scopes"] = scopes
    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        run_quietly(recipe)
    finally:
        handle.remove()
    assert seen and set(seen) == {learns}
