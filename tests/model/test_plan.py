"""A plan counts a model's real parameters and what autograd really saves, and names a change with which a run fits."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import ernie_align
from ernie_align.errors import ModelError, RecipeError
from ernie_align.models.adapters import attach_adapter, unfreeze
from ernie_align.models.architecture import Architecture
from ernie_align.models.load import load_model
from ernie_align.models.packed_attention import use_per_document_attention
from ernie_align.models.trainable_parts import adapter_targets, tuned_parameters
from ernie_align.planning.activations import saved_activations
from ernie_align.planning.compute import parse_gpu, step_cost
from ernie_align.planning.memory import estimate_memory
from ernie_align.planning.workload import PRESETS, ModelShape, Workload, load_config
from ernie_align.recipe import AdapterBlock, TuneBlock
from tests.support.runs import ROOT, recipe_of

REAL = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if not {"demo", "eval"} & {*path.parts})
VL_28B = str(ROOT / "recipes" / "lora" / "vl_28b.yaml")
B, T = 2, 256
IMAGE_TOKENS = 64 + 2  # of each row: 16 x 16 patches, a start and an end


def test_presets_are_the_class_defaults():
    """The sizes that transformers' own classes are built with are those of the published A3B and 0.3B models."""
    import transformers

    for name, cls in (
        ("ERNIE-4.5-0.3B", transformers.Ernie4_5Config),
        ("ERNIE-4.5-21B-A3B", transformers.Ernie4_5_MoeConfig),
        ("ERNIE-4.5-VL-28B-A3B", transformers.Ernie4_5_VLMoeConfig),
    ):
        defaults = cls().to_dict()
        assert Architecture.from_config(PRESETS[name]) == Architecture.from_config(defaults), name
        text = defaults.get("text_config", defaults)
        assert ModelShape.of(Architecture.from_config(PRESETS[name]), PRESETS[name]).top_k == text.get("moe_k", 6)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ERNIE-4.5-0.3B", 0.35e9, 0.37e9),
        ("ERNIE-4.5-21B-A3B", 21.5e9, 22.1e9),
        ("ERNIE-4.5-VL-28B-A3B", 29.39e9, 29.7e9),  # both pools, tower and resampler
        ("ERNIE-4.5-300B-A47B", 295e9, 305e9),
    ],
)
def test_family_members_have_their_size(name, low, high):
    config, said = load_config(f"baidu/{name}-PT")
    assert low < Architecture.from_config(config).size < high and "built-in" in said


def test_a_model_that_is_known_nowhere_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        load_config("baidu/ERNIE-4.5-VL-424B-A47B-PT")
    assert "config.json" in caught.value.faults[0].fix


# -- activations ------------------------------------------------------------------------------------------------------


def saved_by_autograd(bundle, dtype: torch.dtype, *, flat: bool = False) -> int:
    """Bytes that a forward of (B, T) leaves for its backward, weights not counted, each storage once.

    flat: the rows are laid end to end.
    """
    model = bundle.model
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # an address that is free again would be counted once for two
        return tensor

    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(300, 500, (B, T))}
    if bundle.modality is not None:
        ids = inputs["input_ids"]
        ids[:, 4], ids[:, 5:69], ids[:, 69] = (
            bundle.modality.image_start,
            bundle.modality.image,
            bundle.modality.image_end,
        )
        inputs |= {"pixel_values": torch.randn(B * 256, 588), "image_grid_thw": torch.tensor([[1, 16, 16]] * B)}
    if flat:
        inputs |= {"input_ids": inputs["input_ids"].view(1, -1), "position_ids": torch.arange(T).repeat(B)[None]}
    else:
        inputs["attention_mask"] = torch.ones(B, T, dtype=torch.long)
    half = torch.autocast("cpu", dtype=dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed), half:
        output = base.model(**inputs, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "scopes"),
    [
        ("dense", None),
        ("dense", ["attention"]),
        ("moe", None),
        ("moe", ["attention", "text_experts"]),
        ("vl_moe", None),
        ("vl_moe", ["attention"]),
        ("vl_moe", ["attention", "shared_experts"]),
        ("vl_moe", ["attention", "text_experts", "vision_experts"]),
        ("vl_moe", ["vision_experts", "resampler", "vision_tower"]),
    ],
)
def test_activations_are_what_autograd_keeps(checkpoints, family, scopes, dtype):
    """Within 8 %: of the tower and of a layer's odds and ends the formulas take round figures."""
    config = json.loads((checkpoints[family] / "config.json").read_text())
    architecture = Architecture.from_config(config)
    bundle = load_model(str(checkpoints[family]), dtype=dtype)
    if scopes is None:
        unfreeze(bundle, TuneBlock())
        targets, parts = None, {tensor.part for tensor in tuned_parameters(architecture, TuneBlock())}
    else:
        block = AdapterBlock(scopes=scopes, rank=16)
        attach_adapter(bundle, block)
        targets = tuple(adapter_targets(architecture, block))
        parts = {target.tensor.part for target in targets}
    workload = Workload(
        stage="sft",
        bytes_each=4 if dtype == "float32" else 2,
        rows=B,
        tokens=T,
        accumulation=1,
        checkpointing=False,
        eager=False,
        optimizer="adamw_torch",
        trained=dict.fromkeys(parts, 1),
        targets=targets,
        vision=IMAGE_TOKENS / T if family == "vl_moe" else 0.0,
        device="cpu",
        padded=False,
    )
    shape = ModelShape.of(architecture, config)
    found = saved_activations(workload, shape).after_forward(checkpointing=False)
    assert found == pytest.approx(saved_by_autograd(bundle, getattr(torch, dtype)), rel=0.08)
    use_per_document_attention(bundle.model)
    found = saved_activations(replace(workload, flat=True), shape).after_forward(checkpointing=False)
    assert found == pytest.approx(saved_by_autograd(bundle, getattr(torch, dtype), flat=True), rel=0.08)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_by_hand():
    """LoRA on VL-28B: 2 bytes a weight and 4 a router's, adapters in float32 with two values of AdamW beside each."""
    plan = ernie_align.plan(VL_28B)
    routers = sum(row.parameters for row in plan.parameter_summary.rows if row.part.endswith("router"))
    assert plan.memory.weights == 2 * plan.parameter_summary.parameters + 2 * routers
    assert plan.memory.adapters == plan.memory.gradients == 4 * plan.parameter_summary.trainable
    assert plan.memory.optimizer == 8 * plan.parameter_summary.trainable
    assert plan.memory.loaded < plan.memory.peak < sum(plan.memory.parts().values())


def test_full_fine_tuning_keeps_all_in_the_dtype_of_the_weights(checkpoints, tmp_path):
    recipe = recipe_of("sft", checkpoints["dense"], tmp_path / "rows.jsonl", tmp_path / "run")
    plan = ernie_align.plan(recipe)
    size = plan.parameter_summary.parameters
    assert (plan.memory.weights, plan.memory.gradients, plan.memory.optimizer) == (4 * size, 4 * size, 8 * size)


def test_rows_laid_end_to_end_need_no_mask(checkpoints, tmp_path):
    """And are no more tokens than packs can hold; eager attention scores the whole sequence against itself."""
    recipe = recipe_of("lora", checkpoints["vl_moe"], tmp_path / "rows.jsonl", tmp_path / "run")
    for training in ({"packing": True}, {"padding_free": True}):
        given = {**recipe, "training": {**recipe["training"], **training}}
        flat, padded = ernie_align.plan(given), ernie_align.plan(recipe)
        assert padded.workload.masked and not flat.workload.masked and flat.memory.peak < padded.memory.peak
        assert flat.workload.positions == padded.workload.positions == 4 * 256
        eager = ernie_align.plan({**given, "model": {**recipe["model"], "attention": "eager"}})
        assert (eager.workload.rows, eager.workload.tokens) == (1, 4 * 256) and eager.memory.peak > padded.memory.peak


def test_references_and_rollouts_are_counted():
    dpo = ernie_align.plan(ROOT / "recipes" / "dpo" / "0.3b.yaml")
    assert dpo.memory.reference == dpo.memory.weights  # full fine-tuning holds the frozen model too
    assert dpo.workload.rows == 2  # a batch of one pair
    free = ernie_align.plan(ROOT / "recipes" / "dpo" / "0.3b.yaml", overrides=["dpo.reference=precomputed"])
    assert free.memory.reference == 0
    vl, half = ROOT / "recipes" / "dpo" / "vl_28b.yaml", 4096 // 2
    apart, shared = (ernie_align.plan(vl, overrides=[f"dpo.shared_prompt={on}"]) for on in ("false", "true"))
    assert (apart.workload.rows, apart.workload.positions) == (2, 4 * half)
    assert (shared.workload.rows, shared.workload.positions) == (
        1,
        3 * half,
    )  # half of a row: shared images
    assert shared.workload.vision * shared.workload.positions == pytest.approx(half)
    assert shared.memory.peak < apart.memory.peak and shared.work.seconds < apart.work.seconds
    upo = ernie_align.plan(ROOT / "recipes" / "upo" / "vl_28b.yaml")
    assert upo.workload.drawn == 8 and upo.workload.tokens == 1024 + 512
    assert upo.memory.rollout > 2 * 28 * 512 * 2 * upo.workload.drawn * upo.workload.tokens  # keys and values alone


def test_what_several_gpus_share():
    def of(strategy, gpus):
        return ernie_align.plan(VL_28B, strategy=strategy, gpus=gpus).memory

    one, ddp, zero2, fsdp = of("ddp", 1), of("ddp", 4), of("zero2", 4), of("fsdp", 4)
    assert (ddp.weights, ddp.optimizer, ddp.gradients) == (one.weights, one.optimizer, 2 * one.gradients)
    assert (zero2.weights, zero2.optimizer) == (one.weights, one.optimizer / 4)
    assert one.weights / 4 < fsdp.weights < one.weights / 3 and fsdp.adapters == one.adapters / 4
    assert of("zero3", 4) == fsdp
    ep = of("ep", 4)
    assert one.weights / 4 < ep.weights < fsdp.weights  # no experts are gathered
    quarter = [part / 4 for part in (one.adapters, one.optimizer, one.gradients)]
    assert [ep.adapters, ep.optimizer, ep.gradients] == quarter == [fsdp.adapters, fsdp.optimizer, fsdp.gradients]


def test_bits_and_context_by_hand():
    """28 layers, 4 heads of 128 for keys and as many for values, 2 bytes; 16-bit scales for each 64 weights."""
    plan = ernie_align.plan(VL_28B)
    rows = {(row.bits, row.context): row for row in plan.calculator}
    assert rows[16, 131072].cache == 131072 * 28 * 2 * 512 * 2
    assert rows[16, 4096].training == pytest.approx(plan.memory.peak)
    assert rows[16, 4096].weights > 3.5 * rows[4, 4096].weights > 3.5 * rows[2, 4096].weights
    assert sorted({bits for bits, _ in rows}) == [2, 4, 8, 16]
    experts = sum(row.parameters for row in plan.parameter_summary.rows if row.part.endswith("_experts"))
    assert rows[8, 4096].weights - rows[4, 4096].weights >= experts / 2


def hardware(options):
    """["--gpus", "2", ...] -> settings of a plan."""
    named = dict(zip(options[::2], options[1::2], strict=True))
    return {"gpus": int(named.get("--gpus", 1)), "strategy": named.get("--strategy", "ddp")}


@pytest.mark.parametrize("gpu", ["48GB", "80GB"])
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("sft/0.3b.yaml", ["training.per_device_train_batch_size=64", "training.gradient_checkpointing=false"]),
        ("dpo/21b.yaml", ["training.per_device_train_batch_size=8"]),
        ("dpo/vl_28b.yaml", ["training.per_device_train_batch_size=16"]),
        ("upo/vl_28b.yaml", ["training.per_device_train_batch_size=64"]),
    ],
)
def test_the_change_that_is_named_does_fit(recipe, overrides, gpu):
    """Typed as described, the change gives the peak that it names."""
    path = ROOT / "recipes" / recipe
    plan = ernie_align.plan(path, overrides=overrides, gpu=gpu)
    assert not plan.fits and plan.change is not None and plan.change.peak <= plan.gpu.memory < plan.memory.peak
    words = shlex.split(plan.change.description.replace(",", " ").replace("(training is not supported yet)", ""))
    keys = [word for word in words if "=" in word]
    settings = hardware([word for word in words if "=" not in word])
    again = ernie_align.plan(path, overrides=[*overrides, *keys], gpu=gpu, **settings)
    assert again.memory.peak == pytest.approx(plan.change.peak) and again.fits


def test_operations_by_hand(checkpoints, tmp_path):
    """A dense model: two a weight but for the embeddings, which are the head once, and causal attention."""
    recipe = recipe_of("sft", checkpoints["dense"], tmp_path / "rows.jsonl", tmp_path / "run")
    plan = ernie_align.plan(recipe, gpu="H100", efficiency=0.5)
    parts = {row.part: row.parameters for row in plan.parameter_summary.rows}
    weights = parts["attention"] + parts["dense_mlp"] + parts["embeddings"]
    assert plan.work.forward == 2 * weights + 2 * 4 * 128 * 256  # 4 layers, 128 wide queries, 256 tokens
    assert plan.work.step == plan.work.forward * 4 * 256 * 3
    assert plan.work.seconds == pytest.approx(plan.work.step / (0.5 * 989e12))
    held = replace(plan.workload, checkpointing=True)
    config = json.loads((checkpoints["dense"] / "config.json").read_text())
    architecture = Architecture.from_config(config)
    again = step_cost(held, architecture, ModelShape.of(architecture, config), plan.gpu)
    assert again.step == pytest.approx(plan.work.step * 4 / 3)
    assert estimate_memory(held, architecture, ModelShape.of(architecture, config)).peak < plan.memory.peak


def test_gpus_by_size_and_by_name():
    assert (
        parse_gpu("80GB").name == "A100-80GB" and parse_gpu("h200").memory == 141e9 and parse_gpu("32").memory == 32e9
    )
    with pytest.raises(RecipeError, match="unknown GPU"):
        parse_gpu("big")


# -- recipes and the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", REAL, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_memory_in_a_recipes_head_is_the_plans(path):
    head = path.read_text()
    size, gpus, command = re.search(
        r"# Planned: ([\d.]+) GB on (one GPU|each of \d+ GPUs, \w+)\n#   ernie-align plan (.*)\n", head
    ).groups()
    name, *options = shlex.split(command)
    assert name == str(path.relative_to(ROOT))
    settings = hardware(options)
    assert gpus == ("each of {gpus} GPUs, {strategy}".format(**settings) if options else "one GPU")
    plan = ernie_align.plan(path, **settings)
    assert plan.memory.peak / 1e9 == pytest.approx(float(size), abs=0.06) and plan.fits
    assert plan.workload.steps


def test_every_stage_has_a_recipe_for_each_real_model():
    stages = {"sft", "lora", "dpo", "kto", "upo"}
    assert {(path.parent.name, path.stem) for path in REAL} >= {
        (stage, model) for stage in stages for model in ("0.3b", "21b", "vl_28b")
    }


def ask(*arguments):
    code = (
        f"import sys\nsys.argv = ['ernie-align', 'plan', {', '.join(map(repr, arguments))}]\n"
        "from ernie_align.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_command_line_imports_no_torch_and_says_what_fits():
    said = ask(VL_28B, "--gpu", "40GB")
    assert "Does not fit" in said and "smallest change that fits:" in said and "29,399,294,336" in said
    swept = ask(VL_28B, "--sweep", "training.per_device_train_batch_size=1,2", "--gpu", "H200", "--json")
    one, two = json.loads(swept).values()
    assert one["memory"]["peak"] < two["memory"]["peak"] and one["fits"]
    assert one["parameters"]["all"] == 29399294336 and len(one["calculator"]) == 12
