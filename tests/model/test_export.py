"""An export answers as its source does, also in plain transformers and PEFT, and appears complete or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from ernie_align.errors import AlignError, ExportError, ModelError
from ernie_align.exporting import export, write
from ernie_align.exporting.parity import Outputs, compare
from ernie_align.exporting.write import merge
from ernie_align.models.adapters import attach_adapter
from ernie_align.models.load import load_model
from ernie_align.recipe import ADAPTABLE, AdapterBlock
from tests.support.runs import FAMILIES, ROOT, recipe_of, run_quietly, stir, tensors_of

VISION = ("vision_experts", "vision_router", "vision_tower", "resampler")
EVERY_PART = [
    *(("dense", part) for part in ("attention", "dense_mlp")),
    *(("moe", part) for part in ADAPTABLE if part not in VISION),
    *(("vl_moe", part) for part in ADAPTABLE),
]
# of the largest logit: sums in another order, which depends on the processor, change a float32 logit by a few parts in
# 10^6 of the largest one at most; a wrongly added adapter changes it by more than 10^-3
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """How an export is proved does not depend on how many prompts it is proved on."""
    monkeypatch.setattr("ernie_align.exporting.parity.PROMPTS_PER_KIND", 2)
    monkeypatch.setattr("ernie_align.exporting.parity.NEW_TOKENS", 4)


def inputs_of(bundle):
    """Text for all; two images in the middle for a model with vision."""
    torch.manual_seed(0)
    ids = torch.randint(300, 500, (2, 24))
    if bundle.modality is None:
        return {"input_ids": ids}
    ids[:, 4] = bundle.modality.image_start
    ids[:, 5:9] = bundle.modality.image
    ids[:, 9] = bundle.modality.image_end
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(2 * 16, 3 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def apart(one, other):
    """The largest difference of two tensors of logits, relative to the largest logit: the exporter's own measure."""
    return (one - other).abs().max() / other.abs().max().clamp(min=1)


def logits(bundle):
    bundle.model.eval()
    with torch.no_grad():
        return bundle.model(**inputs_of(bundle), use_cache=False).logits


@pytest.fixture(scope="module")
def adapters(checkpoints, tmp_path_factory):
    """family -> a stirred adapter on every part that takes one."""
    found = {}
    for family in FAMILIES:
        bundle = load_model(str(checkpoints[family]), dtype="float32")
        attach_adapter(bundle, AdapterBlock(scopes="all", rank=4, alpha=8))
        stir(bundle.model)
        found[family] = tmp_path_factory.mktemp("adapters") / family
        bundle.model.save_pretrained(found[family])
        bundle.save_processor(str(found[family]))
    return found


@pytest.fixture(scope="module")
def run(checkpoints, digits, tmp_path_factory):
    """A short run of lora on both pools, with images."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    scopes = {"scopes": ["attention", "text_experts", "vision_experts"]}
    recipe = recipe_of("lora", checkpoints["vl_moe"], digits / "val.jsonl", folder, adapter=scopes)
    recipe["training"] |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    recipe["data"]["eval"] = [{"path": str(digits / "test.jsonl"), "limit": 8}]
    run_quietly(recipe)
    return folder


@pytest.mark.parametrize(("family", "part"), EVERY_PART)
def test_merging_each_part_alone_is_the_adapter(checkpoints, family, part):
    bundle = load_model(str(checkpoints[family]), dtype="float32")
    base = logits(bundle)
    attach_adapter(bundle, AdapterBlock(scopes=[part], rank=4, alpha=8))
    stir(bundle.model)
    adapted = logits(bundle)
    bundle.model = merge(bundle.model)
    assert apart(adapted, base) > 100 * ROUNDING  # the adapter does something
    assert apart(logits(bundle), adapted) <= ROUNDING
    assert not [name for name, _ in bundle.model.named_parameters() if "lora" in name or "base_layer" in name]


def test_a_merged_export_is_the_adapter_in_plain_transformers(checkpoints, adapters, family, tmp_path):
    import transformers

    done = export(adapters[family], to=tmp_path / "merged", shard_size="2MB")
    assert done.difference.relative_difference <= ROUNDING
    assert done.difference.same_texts == done.difference.prompts == (4 if family == "vl_moe" else 2)
    assert len(list(done.folder.glob("*.safetensors"))) > 1
    base, merged = tensors_of(checkpoints[family]), tensors_of(done.folder)
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {
        name: (t.shape, t.dtype) for name, t in base.items()
    }  # the hub's own names
    adapted, bundle = logits(load_model(adapters[family])), load_model(done.folder)
    assert apart(logits(bundle), adapted) <= ROUNDING
    auto = transformers.AutoModelForImageTextToText if family == "vl_moe" else transformers.AutoModelForCausalLM
    plain = auto.from_pretrained(done.folder, dtype="auto").eval()
    text = inputs_of(bundle)["input_ids"].clamp(min=300)
    with torch.no_grad():
        assert plain(input_ids=text).logits.equal(bundle.model(input_ids=text).logits)
    assert transformers.GenerationConfig.from_pretrained(done.folder).eos_token_id == [2, 4]
    assert (done.folder / "chat_template.jinja").read_text() == (
        checkpoints[family] / "chat_template.jinja"
    ).read_text()


def test_an_adapter_export_is_the_adapter_in_plain_peft(checkpoints, adapters, family, tmp_path):
    from peft import PeftModel

    done = export(adapters[family], to=tmp_path / "adapter", what="adapter")
    assert done.difference.worst_difference == 0.0
    bundle = load_model(str(checkpoints[family]), dtype="float32")
    bundle.model = PeftModel.from_pretrained(bundle.model, done.folder)
    # plain PEFT sums W + BA of experts before x is multiplied, this toolkit x·W + x·A·B: equal up to float32 rounding
    assert apart(logits(bundle), logits(load_model(adapters[family]))) <= ROUNDING
    assert "license: apache-2.0" in (done.folder / "README.md").read_text()


def test_a_run_exports_with_what_is_known_of_it(run, tmp_path):
    said = []
    done = export(run, to=tmp_path / "merged", log=said.append)
    card = (done.folder / "README.md").read_text()
    facts = json.loads((done.folder / "export.json").read_text())
    assert facts["prompts"]["with_images"] == 2 and any("test.jsonl" in origin for origin in facts["prompts"])
    assert facts["difference"]["worst_difference"] == done.difference.worst_difference
    assert done.difference.relative_difference <= ROUNDING
    assert f"{done.difference.worst_difference:.3g}" in card and f"{done.difference.worst_difference:.3g}" in "".join(
        said
    )
    commands = ("vllm serve", "fastdeploy", "have not been run")
    for words in ("| vision_experts |", "val.jsonl", "eval_loss", "stage: lora", *commands):
        assert words in card, words
    step_1 = export(run / "checkpoint-1", to=tmp_path / "step-1")
    assert "eval_loss" not in (step_1.folder / "README.md").read_text()  # that figure is of the end
    # another step's weights: a merge that took the wrong ones would not have passed the comparison
    assert not tensors_of(step_1.folder)["model.layers.1.self_attn.q_proj.weight"].equal(
        tensors_of(done.folder)["model.layers.1.self_attn.q_proj.weight"]
    )


def test_a_model_without_adapter_is_copied_bit_for_bit(checkpoints, tmp_path):
    done = export(checkpoints["vl_moe"], to=tmp_path / "copy")
    assert done.difference.worst_difference == 0.0
    mine, theirs = tensors_of(checkpoints["vl_moe"]), tensors_of(done.folder)
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)


def test_a_merge_that_forgets_the_experts_is_refused(run, tmp_path, monkeypatch):
    def forgetful(model, *, accumulate):
        for name, weight in model.named_parameters():
            if ".experts." in name and "lora_B" in name:
                weight.data.zero_()
        return merge(model, accumulate=accumulate)

    monkeypatch.setattr(write, "merge", forgetful)
    with pytest.raises(ExportError, match="over the bound of 1e-05") as caught:
        export(run, to=tmp_path / "merged")
    assert "--what adapter" in caught.value.faults[0].fix
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_lost_a_tensor_is_refused(adapters, tmp_path):
    """And leaves nothing behind; tests/model/test_load.py has what else is refused."""
    from safetensors.torch import save_file

    copy = shutil.copytree(adapters["dense"], tmp_path / "adapter")
    weights = tensors_of(copy)
    save_file(dict(list(weights.items())[1:]), copy / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="1 tensors do not match the model"):
        export(copy, to=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == [copy]


def test_float32_accumulation_rounds_once(checkpoints):
    """Each merged bf16 weight is the exact sum, rounded; PEFT's own way rounds B·A first for bare parameters."""
    off = {}
    for accumulate in ("float32", "native"):
        bundle = load_model(str(checkpoints["moe"]), dtype="bfloat16")
        attach_adapter(bundle, AdapterBlock(scopes=["attention", "text_experts"], rank=4, alpha=8))
        stir(bundle.model)
        exact = {}
        for module in bundle.model.modules():
            if hasattr(module, "get_delta_weight"):
                base = module.get_base_layer()
                parameter = getattr(base, getattr(module, "parameter_name", "weight"))
                before, parameter.data = parameter.data, parameter.data.float()
                exact[parameter] = (before.float() + module.get_delta_weight("default")).bfloat16()
                parameter.data = before
        merge(bundle.model, accumulate=accumulate)
        off[accumulate] = sum(int((parameter != wanted).sum()) for parameter, wanted in exact.items())
    assert off["float32"] == 0 < off["native"]


def test_bfloat16_is_bounded_by_kl_and_float32_is_offered(run, tmp_path):
    """The tiny base is float32: rounded to bf16 it is another model, and the comparison says by how much."""
    with pytest.raises(ExportError, match=r"mean KL .* is over the bound of 0") as caught:
        export(run, to=tmp_path / "merged", dtype="bfloat16", bound=0.0)
    assert "--dtype float32" in caught.value.faults[0].fix
    done = export(run, to=tmp_path / "merged", dtype="bfloat16", bound=10.0)
    assert 0 < done.difference.mean_kl < 10 and done.dtype == "bfloat16"
    assert tensors_of(done.folder)["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors_of(done.folder)["model.layers.1.mlp.gate.weight"].dtype == torch.float32  # routers stay


def test_a_crash_leaves_nothing_that_looks_whole(adapters, tmp_path):
    """Killed between the last file and the rename; a rerun replaces what was left and finishes."""
    code = (
        "import os, sys\n"
        "from ernie_align.exporting import write\n"
        "write._flush = lambda folder: os._exit(9)\n"
        "write.export(sys.argv[1], to=sys.argv[2])\n"
    )
    target = tmp_path / "merged"
    done = subprocess.run([sys.executable, "-c", code, str(adapters["dense"]), str(target)], cwd=ROOT)
    assert done.returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [".merged.partial"]
    (tmp_path / ".merged.partial" / "stray").touch()
    export(adapters["dense"], to=target)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"] and not (target / "stray").exists()


def test_what_cannot_be_exported_says_why(checkpoints, adapters, run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "final")
    (unfinished / "checkpoint-2" / "complete.json").unlink()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for source, options, says in (
        (run, {"to": tmp_path / "here"}, "already exists"),
        (unfinished, {}, "has not finished"),
        (unfinished / "checkpoint-2", {}, "incomplete checkpoint"),
        (checkpoints["dense"], {"what": "adapter"}, "a model without an adapter"),
        (tmp_path / "here", {}, "has no config.json"),
        (run, {"push": "nobody"}, "invalid repository name 'nobody'"),
        (run, {"push": "a/b"}, "you are not logged in"),
    ):
        with pytest.raises(AlignError, match=says):
            export(source, **{"to": tmp_path / "new", **options})
    with pytest.raises(ExportError) as caught:
        export(unfinished, to=tmp_path / "new")
    assert str(unfinished / "checkpoint-1") in caught.value.faults[0].fix
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_a_failed_upload_leaves_the_export(adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="was not uploaded") as caught:
        export(adapters["dense"], to=tmp_path / "merged", push="owner/name")
    assert "hf upload owner/name" in caught.value.faults[0].fix
    assert load_model(tmp_path / "merged").architecture.family == "dense"


def test_a_difference_by_hand():
    """Two positions of two tokens: p = (1/2, 1/2) against (3/4, 1/4), and equal ones."""
    first = Outputs([torch.zeros(2, 2)], ["a"])
    second = Outputs([torch.tensor([[3.0, 1.0], [0.0, 0.0]]).log().nan_to_num(neginf=0.0)], ["b"])
    found = compare(first, second)
    # KL = 1/2 ln(2/3) + 1/2 ln 2 = 0.1438, and 0: half of it on average
    assert found.mean_kl == pytest.approx(0.1438 / 2, abs=1e-4)
    assert found.worst_difference == pytest.approx(1.0986, abs=1e-4)  # ln 3
    assert (found.same_texts, found.prompts, found.positions) == (0, 1, 2)
