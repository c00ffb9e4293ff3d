"""The README says nothing that cannot be typed."""

from __future__ import annotations

import re
import shlex

import pytest
import typer.main

from ernie_align.cli import app
from ernie_align.runs import load_recipe
from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("ernie-align ")
]
# what the demo and `ernie-align tiny` make before these commands need it
MADE = ("runs/", "data/")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    """Its verb, options and files exist."""
    verb, *arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    context = group.commands[verb].make_context(verb, list(arguments), resilient_parsing=False)
    assert context.info_name == verb
    for argument in arguments:
        if "/" in argument and not argument.startswith(MADE) and "=" not in argument:
            assert (ROOT / argument).exists(), argument


def test_the_commands_of_the_issue_are_there():
    assert {command.split()[1] for command in COMMANDS} == {
        "tiny", "check", "plan", "sft", "lora", "dpo", "upo", "eval", "report", "generate", "export", "schema",
    }  # fmt: skip


@pytest.mark.parametrize("stage", ["lora", "dpo", "upo"])
def test_the_recipes_in_the_readme_are_sound(stage, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    (text,) = [block for language, block in BLOCKS if language == "yaml" and block.startswith(f"stage: {stage}")]
    recipe.write_text(text)
    assert load_recipe(recipe).stage == stage


def test_the_plan_in_the_readme_is_sound(tmp_path):
    from ernie_align.evaluation import load_plan

    (text,) = [block for language, block in BLOCKS if language == "yaml" and block.startswith("data:")]
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    assert [data.called for data in load_plan(plan).data] == ["test.jsonl", "mmbench.tsv"]


def test_the_python_in_the_readme_names_what_exists():
    import ernie_align

    (block,) = [block for language, block in BLOCKS if language == "python"]
    compile(block, "README.md", "exec")
    names = re.search(r"from ernie_align import (.*)", block).group(1).split(", ")
    assert all(hasattr(ernie_align, name) for name in names)


def test_makefile_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)`?", TEXT):
        assert f"\n{target}:" in makefile


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "make test" in TEXT
