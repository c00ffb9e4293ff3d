"""`rewards:` in a recipe: every fault has its place, and a function of the user's is judged before it is run."""

from __future__ import annotations

import json

import pytest
import yaml

from ernie_align.errors import RecipeError, RunError
from ernie_align.recipe import Recipe, RewardBlock, load_recipe, to_yaml
from ernie_align.recipe.rewards import REWARDS, CustomReward
from ernie_align.recipe.schema import Block
from ernie_align.recipe.schema_docs import json_schema
from ernie_align.rewards import build_rewards
from ernie_align.rewards.builtin import SCORERS


class NoTraining(Block):
    """A trainer with nothing to set."""


class Paid(Recipe):
    """A recipe with rewards and little else."""

    rewards: list[RewardBlock]

    @classmethod
    def training_model(cls):
        """No keys."""
        return NoTraining


HEAD = """\
stage: paid
model: {name: a/b}
data: {train: [{path: x.jsonl}]}
run: {dir: runs/x}
rewards:
"""

BREVITY = """\
SCALE = 10

def brevity(prompts, completions, scale=SCALE, **kwargs):
    return [1 - len(completion) / scale for completion in completions]

def by_kind(prompts, completions, kind, *, table, completion_ids=None, **kwargs):
    return [table[one] for one in kind]

def hasty(prompts, completions):
    return []

async def later(prompts, completions, **kwargs):
    return []
"""


def load(tmp_path, *rewards):
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD + "".join(f"  - {reward}\n" for reward in rewards))
    return load_recipe(path, stages={"paid": Paid})


def faults(tmp_path, *rewards):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *rewards)
    return [(fault.where.replace(f"{tmp_path}/", ""), fault) for fault in caught.value.faults]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a file of rewards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(BREVITY)
    return tmp_path


def test_a_recipe_keeps_its_rewards_through_yaml(here):
    recipe = load(
        here,
        "{name: exact_match, column: answer, weight: 1.0}",
        '{name: format, pattern: "^[a-z]+$", weight: 0.1}',
        "{name: my_rewards.py:brevity, weight: 0.1, args: {scale: 4}}",
        "{name: checklist, criteria: [{name: contains, text: so}, {name: my_rewards.py:brevity}]}",
    )
    assert [reward.name for reward in build_rewards(recipe.rewards)] == [
        "exact_match",
        "format",
        "brevity",
        "checklist",
    ]
    again = load_recipe(yaml.safe_load(to_yaml(recipe)), stages={"paid": Paid})
    assert to_yaml(again) == to_yaml(recipe)


def test_all_faults_at_once_each_with_its_place(tmp_path):
    found = faults(
        tmp_path,
        "{name: exakt_match}",
        "{name: format, patern: x}",
        '{name: format, pattern: "(", weight: heavy}',
        "{name: length, length: 5, min: 3}",
        "{name: length, unit: lines, max: 3}",
        "{weight: 1.0}",
        "exact_match",
        "{name: checklist, criteria: [{name: contains}, {name: checklist, criteria: []}, {name: numeric, colum: x}]}",
    )
    assert [where for where, _ in found] == [
        "recipe.yaml:6:12  rewards[0].name",
        "recipe.yaml:7:5  rewards[1].pattern",
        "recipe.yaml:7:28  rewards[1].patern",
        "recipe.yaml:8:29  rewards[2].pattern",
        "recipe.yaml:8:42  rewards[2].weight",
        "recipe.yaml:9:28  rewards[3].length",
        "recipe.yaml:10:26  rewards[4].unit",
        "recipe.yaml:11:5  rewards[5]",
        "recipe.yaml:12:5  rewards[6]",
        "recipe.yaml:13:34  rewards[7].criteria[0]",
        "recipe.yaml:13:59  rewards[7].criteria[1].name",
        "recipe.yaml:13:108  rewards[7].criteria[2].colum",
    ]
    by_place = dict(found)
    name = by_place["recipe.yaml:6:12  rewards[0].name"]
    assert name.fix == "did you mean exact_match?" and "repetition, judge, checklist" in name.why
    assert by_place["recipe.yaml:7:28  rewards[1].patern"].fix == "did you mean pattern?"
    assert "at character 1" in by_place["recipe.yaml:8:29  rewards[2].pattern"].what
    assert by_place["recipe.yaml:13:108  rewards[7].criteria[2].colum"].fix == "did you mean column?"


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        ("{name: contains, text: a, column: b}", "both column and text are given"),
        ("{name: maths}", "the reward 'maths' is now called 'math'"),
        ("{name: length}", "no bound is given"),
        ("{name: length, target: 3, max: 4}", "target and max are both given"),
        ("{name: thinking, min: 5, max: 4}", "min 5 is larger than max 4"),
        ("{name: json_schema, against: none.json}", "none.json cannot be read: No such file or directory"),
        ("{name: judge, url: 'http://x', model: m, rubric: r, max_score: 0.0}", "0.0 is not larger than min_score 0.0"),
        ("{name: checklist, criteria: [{name: thinking, weight: 0.0}]}", "criterion thinking has weight 0.0"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path, reward, what):
    ((where, fault),) = faults(tmp_path, reward)
    assert where.startswith("recipe.yaml:6:") and fault.what == what


@pytest.mark.parametrize(
    ("reward", "place", "what"),
    [
        ("{name: mine.py:brevity}", "6:12  rewards[0].name", "mine.py cannot be read: No such file or directory"),
        ("{name: my_rewards.py:brevitty}", "6:12  rewards[0].name", "my_rewards.py has no function brevitty"),
        ("{name: my_rewards.py:hasty}", "6:12  rewards[0].name", "hasty does not accept **kwargs (my_rewards.py:9)"),
        ("{name: my_rewards.py:later}", "6:12  rewards[0].name", "later is async (my_rewards.py:12)"),
        (
            "{name: broken.py:f}",
            "6:12  rewards[0].name",
            "broken.py is not valid Python: '(' was never closed (broken.py, line 1)",
        ),
        (
            "{name: my_rewards.py:brevity, args: {sale: 3}}",
            "6:41  rewards[0].args",
            "brevity has no parameter 'sale'",
        ),
    ],
)
def test_a_function_is_judged_without_running_its_file(here, reward, place, what):
    (here / "broken.py").write_text("def f(")
    (here / "my_rewards.py").write_text(BREVITY + "\nraise SystemExit\n")
    ((where, fault),) = faults(here, reward)
    assert (where, fault.what) == (f"recipe.yaml:{place}", what) and fault.fix


def test_the_old_name_of_math_says_the_new_one(tmp_path):
    for reward in ("{name: maths}", "{name: checklist, criteria: [{name: maths}]}"):
        ((where, fault),) = faults(tmp_path, reward)
        assert where.startswith("recipe.yaml:6:") and where.endswith("name")
        assert fault.what == "the reward 'maths' is now called 'math'" and "math" in fault.fix


def test_a_function_is_called_as_trl_calls_it(here):
    brevity, by_kind = build_rewards(
        [
            CustomReward(name="my_rewards.py:brevity", args={"scale": 4}),
            CustomReward(name="my_rewards.py:by_kind", args={"table": {"sum": 0.5, "name": None}}),
        ]
    )
    assert brevity(["?", "?"], ["a", "bb"], completion_ids=[[1], [2]], trainer_state=None) == [0.75, 0.5]
    assert by_kind.columns == ("kind",)
    assert by_kind(["?", "?"], ["a", "b"], kind=["sum", "name"], completion_ids=[[1], [2]]) == [0.5, None]
    with pytest.raises(RunError) as caught:
        by_kind(["one?", "two?"], ["a", "b"], kind=["sum", "odd"], completion_ids=[[1], [2]])
    (fault,) = caught.value.faults
    assert fault.where == f"{here / 'my_rewards.py'}:7" and fault.what == "reward by_kind: KeyError: 'odd'"
    assert "prompt: 'two?'" in fault.why


def test_a_file_that_cannot_be_imported_is_a_fault_of_the_recipe(here):
    (here / "sad.py").write_text("import no_such_library\n\ndef f(prompts, completions, **kwargs):\n    return []\n")
    recipe = load(here, "{name: sad.py:f}")
    with pytest.raises(RecipeError) as caught:
        build_rewards(recipe.rewards)
    (fault,) = caught.value.faults
    assert fault.where.endswith("recipe.yaml:6:12  rewards[0].name") and fault.why.endswith("sad.py:1")
    assert "ModuleNotFoundError: No module named 'no_such_library'" in fault.what


def test_missing_columns_stand_where_the_reward_does(here):
    from ernie_align.rewards import missing_columns

    recipe = load(here, "{name: numeric, column: sum}")
    (fault,) = missing_columns(build_rewards(recipe.rewards), {"answer"})
    assert fault.where.endswith("recipe.yaml:6:5  rewards[0]") and "'sum'" in fault.what


def test_every_block_has_its_scorer_and_every_key_its_place_in_the_schema():
    assert {*SCORERS, "judge", "checklist"} == REWARDS.keys()
    schema = json_schema({"paid": Paid})
    items = schema["$defs"]["Paid"]["properties"]["rewards"]["items"]
    refs = [item["$ref"].rpartition("/")[2] for item in items["anyOf"]]
    names = [schema["$defs"][ref]["properties"]["name"].get("const", "custom") for ref in refs]
    assert sorted(names) == sorted([*REWARDS, "custom"])
    assert all("name" in schema["$defs"][ref]["required"] for ref in refs)
    json.dumps(schema)
