"""The README fits on one screen, and its figures are those of the planner and of the demo."""

from __future__ import annotations

import re

import pytest
import typer.main

import ernie_align
from ernie_align.cli import app
from tests.support.runs import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_it_stands_on_one_screen():
    assert len(TEXT.splitlines()) <= 80


def test_every_verb_is_shown_somewhere():
    """Here or in the pages that this one leads to."""
    pages = [TEXT, *(page.read_text() for page in (ROOT / "docs").rglob("*.md"))]
    verbs = {verb for page in pages for verb in re.findall(r"^ernie-align (\w+)", page, re.MULTILINE)}
    assert verbs >= set(typer.main.get_command(app).commands)


def test_the_memory_it_names_is_the_planners():
    """Of each model and stage: the peak of the shipped recipe, on the hardware in the recipe's head."""
    for stage, cells in re.findall(r"^\| \[(\w+)\]\(docs/[\w/-]+\.md\).*? \|(.*)\|$", TEXT, re.MULTILINE):
        for model, cell in zip(("0.3b", "21b", "vl_28b"), cells.split("|"), strict=True):
            size, gpus = re.fullmatch(r" ([\d.]+)(?: on each of (\d+))? ", cell).groups()
            several = {"gpus": int(gpus), "strategy": "fsdp"} if gpus else {}
            plan = ernie_align.plan(ROOT / f"recipes/{stage}/{model}.yaml", **several)
            assert plan.memory.peak / 1e9 == pytest.approx(float(size), abs=0.06) and plan.fits, (stage, model)


def test_it_names_a_memory_for_every_stage():
    stages = re.findall(r"^\| \[(\w+)\]\(docs/[\w/-]+\.md\)", TEXT, re.MULTILINE)
    assert stages == ["sft", "lora", "dpo", "kto", "upo"]


def test_its_figures_of_the_demo_are_those_of_the_page():
    """Nothing is claimed here that the table of the demo does not hold."""
    (share, interval, count) = re.search(r"to ([\d.]+ %) (\[.*?\]) of (\d+) held-out digits", TEXT).groups()
    table = (ROOT / "docs" / "train" / "sft-and-lora.md").read_text()
    assert f"| | name | {count} |" in table and f"**{share}** {interval}" in table


def test_its_picture_is_there_and_small():
    (picture,) = re.findall(r"!\[.+?\]\((.+?)\)", TEXT)
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG") and (ROOT / picture).stat().st_size < 200_000


def test_makefile_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)`?", TEXT):
        assert f"\n{target}:" in makefile


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "make test" in TEXT
