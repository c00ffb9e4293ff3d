"""Training weighs every trained token alike, changes the scope and nothing else, and stops at NaN and infinity."""

from __future__ import annotations

import json

import pytest
import torch

from ernie_align.errors import RunError
from ernie_align.models.load import load_model
from tests.support.callbacks import At, RecordingReporter
from tests.support.runs import beside, logged, recipe_of, run_quietly, tensors_of, write_rows

# Sums of float32 in another order: relative errors of about 1e-7 per term, at losses of about 6.
SUM_ERROR = 1e-5


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
        # Adam divides a gradient by its own size: without this, one that is mostly rounding moves its weight as far as
        # any other, and the second step depends on the order in which this machine sums.
        training["adam_epsilon"] = 1e-5
        recipe = recipe_of("sft", checkpoints["vl_moe"], mixed_rows, tmp_path / f"{size}", training=training)
        run_quietly(recipe)
        results[size] = (logged(tmp_path / f"{size}"), logged(tmp_path / f"{size}", "grad_norm"))
    for key in (0, 1):
        assert results[1][key] == pytest.approx(results[4][key], rel=SUM_ERROR)


def test_the_loss_is_the_mean_over_trained_tokens(checkpoints, mixed_rows, tmp_path):
    """The first logged loss against cross-entropy of the model's own logits, token by token; no auxiliary loss."""
    from ernie_align.data.collate import Collator, RowEncoder
    from ernie_align.data.load import encode_sample
    from ernie_align.data.render import renderer_of
    from ernie_align.data.sources import Source
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
    assert logged(tmp_path / "run")[0] == pytest.approx(nll / tokens, rel=SUM_ERROR)


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
        assert losses[1][key] == pytest.approx(losses[3][key], rel=SUM_ERROR)


@pytest.mark.parametrize("scopes", [["vision_experts"], ["text_experts", "text_router"], ["resampler", "norms"]])
def test_full_tuning_changes_the_scope_and_nothing_else(checkpoints, digits, tmp_path, scopes):
    recipe = recipe_of(
        "sft", checkpoints["vl_moe"], digits / "parity_val.jsonl", tmp_path / "run", tune={"scopes": scopes}
    )
    recipe["training"]["max_steps"] = 2
    result = run_quietly(recipe)
    before = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    after = load_model(str(result.final), dtype="float32").model.state_dict()
    parts = [before.architecture.by_part.get(part, []) for part in scopes]
    in_scope = {tensor.name for part in parts for tensor in part if tensor.kind != "frozen"}
    # after the last layer nothing attends to image tokens: the output of its vision experts reaches no trained token
    in_scope = {name for name in in_scope if "layers.3.mlp.vision_moe" not in name}
    moved = {name for name, value in before.model.named_parameters() if not torch.equal(value, after[name])}
    assert moved == in_scope


def test_lora_saves_the_adapter_only_and_keeps_the_base(checkpoints, digits, tmp_path, family):
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


def test_the_seed_determines_the_run(checkpoints, text_rows, tmp_path):
    """Order of rows and initialization of a new adapter: the same seed, the same run; another seed, another run."""
    losses = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = {"dir": str(tmp_path / name), "seed": seed}
        torch.rand(3)  # random numbers drawn before in this process
        run_quietly(recipe_of("lora", checkpoints["moe"], text_rows, tmp_path / name, run=run))
        losses[name] = logged(tmp_path / name)
    assert losses["a"] == losses["b"] != losses["c"]


@pytest.fixture(scope="module")
def sft_run(checkpoints, digits, tmp_path_factory):
    """A finished run of four steps, which has saved every two and kept one checkpoint."""
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    recipe = recipe_of("sft", checkpoints["vl_moe"], digits / "val.jsonl", run_dir)
    recipe["training"] |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    run_quietly(recipe)
    return run_dir


def test_the_result_of_sft_loads_in_plain_transformers(sft_run):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    plain = AutoModelForImageTextToText.from_pretrained(sft_run / "final")
    ours = load_model(str(sft_run / "final"), dtype="float32")
    ids = AutoTokenizer.from_pretrained(sft_run / "final")("What is two plus three?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours.model(input_ids=ids).logits)


def test_the_run_directory_describes_the_run(sft_run):
    assert {path.name for path in sft_run.iterdir() if path.is_dir()} == {"checkpoint-4", "final"}
    assert json.loads((sft_run / "run.json").read_text())["environment"]["pixels_by"] in ("pil", "torchvision")
    assert json.loads((sft_run / "data.json").read_text())[0]["kept"] == 140
    coverage = {row["part"]: row for row in json.loads((sft_run / "coverage.json").read_text())}
    assert coverage["text_experts"]["trainable"] == coverage["text_experts"]["parameters"]
    assert "<|IMAGE_PLACEHOLDER|>" in (sft_run / "preview.txt").read_text()
    assert "stage: sft" in (sft_run / "recipe.yaml").read_text()
    assert "overlong: drop" in (sft_run / "recipe.resolved.yaml").read_text()
    assert len(logged(sft_run)) == 4 and not (sft_run / "final.partial").exists()
    assert not list((sft_run / "final").glob("*.bin"))
    # checkpoints load without the rest of the run, too
    assert load_model(str(sft_run / "checkpoint-4"), dtype="float32").modality is not None


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(checkpoints, text_rows, tmp_path):
    """And the checkpoint to resume from, whose weights are those from before."""
    from ernie_align.runs import load_recipe, run

    def spoil(model=None, **_):  # after the checkpoint of step 1
        model.model.norm.weight.data[0] = float("nan")

    recipe = recipe_of("sft", checkpoints["dense"], text_rows, tmp_path / "run")
    recipe["training"] |= {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(RunError, match="step 2: the loss is nan") as caught:
        run(load_recipe(recipe), reporter=RecordingReporter(At(1, spoil)))
    assert f"{text_rows}:" in str(caught.value)
    assert "--resume continues from checkpoint-1" in str(caught.value)
    assert not (tmp_path / "run" / "final").exists()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    saved = load_model(str(tmp_path / "run" / "checkpoint-1"), dtype="float32").model
    assert all(weight.isfinite().all() for weight in saved.state_dict().values())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(checkpoints, text_rows, tmp_path):
    """The loss is finite; the weights would not be, and the next checkpoint would hold them."""
    from ernie_align.runs import load_recipe, prepare_data, set_up
    from ernie_align.runs.prepare import load_for_training

    setup = set_up(load_recipe(recipe_of("sft", checkpoints["dense"], text_rows, tmp_path / "run")))
    data = prepare_data(setup)
    bundle = load_for_training(setup)
    config = setup.stage.configure(setup.recipe, str(tmp_path / "run"))
    trainer = setup.stage.build_trainer(setup.recipe, config, bundle, data, [])
    bundle.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    with pytest.raises(RunError, match="step 1: the gradient is"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())


def test_broken_images_name_their_row(checkpoints, digits, tmp_path):
    """Before the first step."""
    from ernie_align.errors import DataError

    (tmp_path / "a.png").write_bytes((digits / "images" / "0000.png").read_bytes()[:200])
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], "images": ["a.png"]}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*a\.png"):
        run_quietly(recipe_of("sft", checkpoints["vl_moe"], path, tmp_path / "run"))


def test_a_batch_without_anything_in_scope_trains_nothing(checkpoints, text_rows, tmp_path):
    """Vision parts in scope, a batch of text only: no gradient, no crash, and the adapter still changes nothing."""
    recipe = recipe_of(
        "lora", checkpoints["vl_moe"], text_rows, tmp_path / "run", adapter={"scopes": ["vision_experts"]}
    )
    result = run_quietly(recipe)
    assert result.text_unchanged is True
    assert all(not tensor.any() for name, tensor in tensors_of(result.final).items() if "lora_B" in name)
    assert json.loads((tmp_path / "run" / "data.json").read_text())[0]["without_images"] == 24


def test_training_on_a_stream(checkpoints, digits, tmp_path):
    recipe = recipe_of("sft", checkpoints["vl_moe"], digits / "val.jsonl", tmp_path / "run", data={"streaming": True})
    run_quietly(recipe)
    assert len(logged(tmp_path / "run")) == 4
    assert json.loads((tmp_path / "run" / "data.json").read_text())[0]["kept"] >= 16
    from ernie_align.errors import RecipeError

    del recipe["training"]["max_steps"]
    with pytest.raises(RecipeError, match="streaming without a number of steps"):
        run_quietly({**recipe, "run": {"dir": str(tmp_path / "other")}})


@pytest.mark.parametrize(("scopes", "learns"), [(["attention", "vision_experts"], False), (["vision_tower"], True)])
def test_no_gradient_flows_through_a_frozen_tower(checkpoints, digits, tmp_path, scopes, learns):
    """Checkpointing makes input embeddings require gradients, those of the tower too."""
    seen = []

    def record(module, args, output):
        if type(module).__name__ == "Ernie4_5_VLMoeVisionBlock":
            seen.append(output.requires_grad)

    training = {"gradient_checkpointing": True, "max_steps": 1}
    recipe = recipe_of("lora", checkpoints["vl_moe"], digits / "val.jsonl", tmp_path / "run", training=training)
    recipe["adapter"]["scopes"] = scopes
    handle = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        run_quietly(recipe)
    finally:
        handle.remove()
    assert seen and set(seen) == {learns}
