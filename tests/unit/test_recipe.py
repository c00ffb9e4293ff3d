"""A recipe is validated as a whole before anything heavy happens, and every fault has its place."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from ernie_align.errors import RecipeError
from ernie_align.recipe import AdapterBlock, PartAdapter
from ernie_align.recipe.document import scalar
from ernie_align.recipe.schema import parse_layers
from ernie_align.recipe.schema_docs import json_schema
from ernie_align.runs import load_recipe
from ernie_align.stages import STAGES
from tests.support.runs import ROOT

RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "eval"
)  # those are evaluation configs

GOOD = """\
stage: lora
model: {name: a/b, dtype: float32}
adapter:
  scopes: [attention, vision_experts]
data:
  train: [{path: x.jsonl}]
training:
  learning_rate: 1e-4
run: {dir: runs/x}
"""


def load(tmp_path, text, *overrides, stage=None):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides=overrides, stage=stage)


def faults(tmp_path, text, *overrides, stage=None):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides, stage=stage)
    return [(fault.where.replace(f"{tmp_path}/", ""), fault) for fault in caught.value.faults]


def test_a_good_recipe_is_frozen_and_complete(tmp_path):
    recipe = load(tmp_path, GOOD)
    assert recipe.training == {"learning_rate": 1e-4}
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.data.max_length) == (16, 32, 4096)
    with pytest.raises(ValueError, match="frozen"):
        recipe.run.seed = 3


def test_all_faults_at_once_each_with_its_place(tmp_path):
    text = (
        GOOD.replace("attention,", "atention,")
        .replace("learning_rate: 1e-4", "lerning_rate: 1e-4\n  max_steps: many")
        .replace("path: x.jsonl", "path: x.jsonl, wieght: 2")
    )
    errors = faults(tmp_path, text)
    assert [where for where, _ in errors] == [
        "recipe.yaml:4:12  adapter.scopes[0]",
        "recipe.yaml:6:27  data.train[0].wieght",
        "recipe.yaml:8:3  training.lerning_rate",
        "recipe.yaml:9:14  training.max_steps",
    ]
    assert [fault.fix for _, fault in errors[:3]] == [
        "did you mean attention?",
        "did you mean weight?",
        "did you mean learning_rate?",
    ]
    assert errors[3][1].what == "expected a whole number, got 'many'"


def test_wrong_types_are_refused_not_converted(tmp_path):
    (where, fault), *rest = faults(
        tmp_path, GOOD.replace("scopes: [attention, vision_experts]", 'scopes: [attention]\n  rank: "8"')
    )
    assert (where, fault.what) == ("recipe.yaml:5:9  adapter.rank", "expected a whole number, got '8'") and not rest


def test_dropout_with_an_expert_scope(tmp_path):
    ((where, fault),) = faults(tmp_path, GOOD.replace("data:", "  dropout: 0.05\ndata:"))
    assert where == "recipe.yaml:5:12  adapter.dropout"
    assert "0.05 with scope vision_experts" in fault.what and "remove vision_experts" in fault.fix


@pytest.mark.parametrize("part", ["embeddings", "lm_head", "norms"])
def test_parts_that_cannot_be_adapted(tmp_path, part):
    ((where, fault),) = faults(tmp_path, GOOD.replace("vision_experts", part))
    assert where.endswith("adapter.scopes") and fault.what == f"{part} cannot be adapted"


def test_the_command_and_the_stage_must_agree(tmp_path):
    ((where, fault),) = faults(tmp_path, GOOD, stage="sft")
    assert where == "recipe.yaml:1:8  stage" and fault.fix == "run ernie-align lora, not sft"
    ((_, fault),) = faults(tmp_path, GOOD.replace("stage: lora", "stage: lroa"))
    assert fault.fix == "did you mean lora?"


def test_a_block_of_another_stage_is_explained(tmp_path):
    errors = dict(faults(tmp_path, GOOD.replace("stage: lora", "stage: sft")))
    assert errors["recipe.yaml:3:1  adapter"].fix == "adapters are trained by stage: lora; here write tune:"


def test_a_missing_block(tmp_path):
    errors = dict(faults(tmp_path, GOOD.replace("run: {dir: runs/x}\n", "")))
    assert errors["recipe.yaml:1:1  run"].what == "required key is missing"


@pytest.mark.parametrize(
    ("key", "home"), [("output_dir", "run.dir"), ("seed", "run.seed"), ("max_length", "data.max_length")]
)
def test_keys_that_are_set_elsewhere(tmp_path, key, home):
    ((where, fault),) = faults(tmp_path, GOOD.replace("learning_rate: 1e-4", f"{key}: 1"))
    assert where == f"recipe.yaml:8:3  training.{key}" and home in fault.fix


def test_values_of_an_enum_are_checked(tmp_path):
    ((_, fault),) = faults(tmp_path, GOOD.replace("learning_rate: 1e-4", "lr_scheduler_type: cosin"))
    assert fault.fix == "did you mean cosine?"


def test_overrides_are_validated_like_the_file(tmp_path):
    recipe = load(tmp_path, GOOD, "training.max_steps=300", "run.seed=7", "adapter.layers=2-3", "data.train.0.limit=5")
    assert (recipe.training["max_steps"], recipe.run.seed, recipe.data.train[0].limit) == (300, 7, 5)
    assert recipe.as_given.endswith("# command line: data.train.0.limit=5\n")
    errors = faults(tmp_path, GOOD, "training.max_stepz=300", "adapter.rank=no")
    assert sorted(where for where, _ in errors) == ["command line: adapter.rank", "command line: training.max_stepz"]
    ((where, fault),) = faults(tmp_path, GOOD, "max_steps")
    assert where == "command line" and fault.fix == "write key=value"
    ((where, _),) = faults(tmp_path, GOOD, "data.train.3.path=y")
    assert where == "command line: data.train[3].path"


def test_layers(tmp_path):
    assert parse_layers("all") is None
    assert parse_layers("8-10") == [8, 9, 10]
    assert parse_layers("1,4-5") == [1, 4, 5]
    for wrong in ("8-", "x", "5-2", "-1"):
        ((where, _),) = faults(tmp_path, GOOD.replace("data:", f'  layers: "{wrong}"\ndata:'))
        assert where == "recipe.yaml:5:11  adapter.layers"


def test_settings_of_a_part_override_those_of_the_block():
    block = AdapterBlock(scopes={"attention": None, "text_experts": PartAdapter(rank=4, layers=[1])}, rank=8, alpha=16)
    assert {part: (own.rank, own.alpha, own.layers) for part, own in block.parts.items()} == {
        "attention": (8, 16, None),
        "text_experts": (4, 16, [1]),
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("no", "no"),
        ("off", "off"),
        ("010", 10),
        ("0x10", 16),
        ("true", True),
        ("~", None),
        ("1_0", "1_0"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert scalar(text) == value and type(scalar(text)) is type(value)


def test_quoted_scalars_are_text(tmp_path):
    ((_, fault),) = faults(tmp_path, GOOD.replace("1e-4", "'1e-4'"))
    assert fault.what == "expected a number, got '1e-4'"


def test_a_recipe_is_plain_data(tmp_path):
    ((where, fault),) = faults(tmp_path, GOOD.replace("x.jsonl", "!!python/object:os.system x"))
    assert where == "recipe.yaml:6:18  data.train[0].path" and fault.what.startswith("the YAML tag ")


def test_a_repeated_key_is_refused(tmp_path):
    ((where, fault),) = faults(tmp_path, GOOD + "run: {dir: runs/y}\n")
    assert where == "recipe.yaml:10:1  run" and fault.what == "duplicate key"


def test_broken_yaml_and_missing_files_have_a_place(tmp_path):
    ((where, fault),) = faults(tmp_path, "stage: [lora\n")
    assert where.startswith("recipe.yaml:2:1") and fault.what.startswith("invalid YAML")
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    ((where, _),) = faults(tmp_path, "- a\n")
    assert where == "recipe.yaml:1:1"


def test_a_mapping_is_validated_like_a_file():
    values = yaml.safe_load(GOOD.replace("1e-4", "1.0e-4"))
    assert load_recipe(values).adapter.scopes == ["attention", "vision_experts"]
    with pytest.raises(RecipeError, match=re.escape("recipe  adapter.rnk: unknown key")):
        load_recipe({**values, "adapter": {"scopes": ["attention"], "rnk": 1}})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(path):
    recipe = load_recipe(path)
    first, *head = path.read_text().splitlines()
    depth = "../" * (len(path.relative_to(ROOT / "recipes").parts) - 1)
    assert first == f"# yaml-language-server: $schema={depth}schema.json"
    comments = "\n".join(line for line in head if line.startswith("#"))
    assert f"ernie-align {recipe.stage} {path.relative_to(ROOT)}" in comments
    assert "Measured on" in comments or "Not run" in comments


def test_the_schema_for_editors_is_up_to_date():
    stored = json.loads((ROOT / "recipes" / "schema.json").read_text())
    assert stored == json_schema({name: stage.recipe for name, stage in STAGES.items()}), (
        "run ernie-align schema > recipes/schema.json"
    )
