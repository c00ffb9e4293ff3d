"""The walkthroughs as they are stored: whole, in order, small, and on public names. tests/examples executes them."""

from __future__ import annotations

import ast
import importlib
import json
import re

import pytest

from tests.support.notebooks import unexpected_stderr
from tests.support.runs import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
STANDARD = {"__future__", "json", "os", "pathlib", "sys"}
OTHERS = {"torch", "PIL", "transformers"}  # 201 looks at the stock class


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(path):
    if path.suffix == ".py":
        return path.read_text()
    return "\n".join("".join(cell["source"]) for cell in cells(path))


def outputs(path):
    return [output for cell in cells(path) for output in cell["outputs"]]


def test_they_are_all_there():
    names = {path.name for path in (*NOTEBOOKS, *SCRIPTS)}
    assert names == {
        "101_first_sft.ipynb", "201_see_the_routing.ipynb", "202_scopes.ipynb", "301_dpo_on_images.ipynb",
        "401_upo.ipynb", "501_evaluate_and_export.py",
    }  # fmt: skip


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SCRIPTS], ids=lambda path: path.stem)
def test_only_public_names_are_called(path):
    """Names that a room lists in __all__, and the errors; no private attribute, no helper beside the notebook."""
    tree = ast.parse(source(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= STANDARD | OTHERS
        elif isinstance(node, ast.ImportFrom):
            top = node.module.split(".")[0]
            assert top in STANDARD | OTHERS | {"ernie_align"}, node.module
            if top == "ernie_align" and node.module != "ernie_align.errors":
                public = importlib.import_module(node.module).__all__
                assert {alias.name for alias in node.names} <= set(public), node.module
        elif isinstance(node, ast.Attribute):
            assert not re.match(r"_[^_]", node.attr), node.attr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_run_from_top_to_bottom_without_a_stumble(path):
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    assert not [output for output in outputs(path) if output["output_type"] == "error"]
    assert not unexpected_stderr(outputs(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_shows_pictures_and_stays_small(path):
    """Every picture is one that the notebook's reader sees; nothing tells where it was run."""
    pictures = [output for output in outputs(path) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3 and path.stat().st_size < 500_000
    assert not re.search(r"/(tmp|home|root|work|Users)/", path.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_it_claims_is_asserted(path):
    """Figures are claimed with `assert` beside them, and the last part says what changes for the real model."""
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source(path)))) >= 5
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    assert "the real 28B model" in text and "ERNIE-4.5-VL-28B-A3B-PT" in text
