"""The documentation says nothing that cannot be typed, opened or read in the source."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

import ernie_align
from ernie_align.cli import app
from ernie_align.data.formats import FORMAT_COLUMNS, canonicalize, detect_format
from ernie_align.errors import RecipeError
from ernie_align.evaluation import load_eval_config
from ernie_align.recipe.schema_docs import json_schema, reference_page
from ernie_align.runs import load_recipe
from ernie_align.stages import STAGES
from tests.support.runs import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
BLOCKS = [
    (page, language, text)
    for page in PAGES
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
]
# Other toolkits' settings and programs stand beside ours, under their name.
FOREIGN = ("# LLaMA-Factory\n", "# axolotl\n", "# TRL\n", "# ERNIEKit\n")


def blocks(language: str) -> list:
    """(page, text) of every block in a language, as parameters."""
    found = [(page, text) for page, other, text in BLOCKS if other == language]
    return [pytest.param(page, text, id=f"{page.name}-{number}") for number, (page, text) in enumerate(found)]


def commands() -> list:
    """Every command line of ours, with what is continued on the next line."""
    found = []
    for page, language, text in BLOCKS:
        if language in ("", "bash", "sh"):
            lines = text.replace("\\\n", " ").splitlines()
            found += [pytest.param(line, id=f"{page.name}: {line[:60]}") for line in lines if _is_ours(line)]
    return found


def _is_ours(line: str) -> bool:
    return line.strip().startswith(("ernie-align ", "accelerate launch -m ernie_align "))


# -- commands, recipes, programs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(line):
    """Its verb, options and files exist, and overrides of a shipped recipe pass the judge."""
    words = shlex.split(re.sub(r" > \S+", "", line), comments=True)
    verb, *arguments = words[words.index("ernie_align" if words[0] == "accelerate" else "ernie-align") + 1 :]
    command = typer.main.get_command(app).commands[verb]
    context = command.make_context(verb, list(arguments), resilient_parsing=False)
    recipe = context.params.get("recipe")
    if recipe is not None and str(recipe).startswith("recipes/"):
        load_recipe(ROOT / recipe, overrides=context.params["overrides"] or (), stage=verb if verb in STAGES else None)
    for argument in arguments:
        if argument.startswith(("recipes/", "examples/", "docs/")):
            assert (ROOT / argument).exists(), argument


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_every_recipe_is_sound(page, text, tmp_path, monkeypatch):
    if text.startswith(FOREIGN):
        assert isinstance(yaml.safe_load(text), dict)
        return
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(_own_reward())
    written = yaml.safe_load(text)
    if "model" not in written and "metrics" not in written:  # a part of a recipe
        whole = ROOT / "recipes" / written.get("stage", "upo") / "vl_28b.yaml"
        text = yaml.safe_dump(yaml.safe_load(whole.read_text()) | written)
    path = tmp_path / "written.yaml"
    path.write_text(text)
    if "metrics" in written:
        assert load_eval_config(path).metrics
    else:
        assert load_recipe(path).stage in STAGES


def test_a_faulty_recipe_is_told_off_as_the_page_says(tmp_path, monkeypatch):
    recipe, told = [text for page, language, text in BLOCKS if page.name == "recipes.md" and language == "text"]
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe)
    with pytest.raises(RecipeError) as error:
        load_recipe("recipe.yaml")
    assert str(error.value) == told.rstrip("\n")


def _own_reward() -> str:
    (text,) = [text for page, language, text in BLOCKS if page.name == "rewards.md" and language == "python"]
    return text


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_every_program_names_what_exists(page, text):
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ernie_align"):
            module = __import__(node.module, fromlist=["_"])
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_reward_of_ones_own_earns_what_the_page_says():
    exec(compile(_own_reward(), "docs/train/rewards.md", "exec"), {})


# -- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if not re.match(r"https?://|mailto:", target):
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(there), f"{page.name}: {target}"


def _anchors(page: Path) -> set[str]:
    from markdown.extensions.toc import slugify

    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {slugify(title.replace("`", ""), "-") for title in titles}


def test_every_page_is_in_the_navigation():
    """Or waits there, commented out, for its page to be written."""
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"[\w-]+\.md", "\n".join(line for line in text.splitlines() if "# -" not in line)))
    waiting = set(re.findall(r"# - .*?([\w-]+\.md)", text))
    there = {page.name for page in DOCS.rglob("*.md")}
    assert named <= there <= named | waiting


def test_files_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:examples|recipes|tests|benchmarks|docs)/[\w./-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


# -- what is generated or quoted from the source ----------------------------------------------------------------------


def test_the_reference_is_up_to_date():
    """ernie-align schema --markdown > docs/reference/recipe-keys.md"""
    assert (DOCS / "reference" / "recipe-keys.md").read_text() == reference_page(recipes()) + "\n"


def test_every_key_says_what_it_is():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|(.*)\|$", reference_page(recipes()), re.MULTILINE)
    assert len(rows) > 150
    assert [key for key, _, _, about in rows if not about.strip()] == []


def recipes():
    return {name: stage.recipe for name, stage in STAGES.items()}


def test_every_key_of_every_block_is_on_the_page():
    text = reference_page(recipes())
    for name, block in json_schema(recipes())["$defs"].items():
        for key in block.get("properties", {}):
            assert f"| `{key}` |" in text, (name, key)


def test_a_row_of_each_format_goes_through_the_reader():
    text = (DOCS / "data" / "formats.md").read_text()
    rows = dict(re.findall(r"^### (\w+)\n.*?```json\n(.*?)\n```", text, re.DOTALL | re.MULTILINE))
    assert rows.keys() == FORMAT_COLUMNS.keys()
    for name, written in rows.items():
        row = json.loads(written)
        assert detect_format(row) == name
        read = canonicalize(row, name, Path("media"))
        assert read.messages and len(read.images) == ("0007.png" in written)


def test_the_table_of_parts_is_what_the_planner_computes():
    text = (DOCS / "train" / "scopes.md").read_text()
    for place, model in enumerate(("0.3b", "21b", "vl_28b")):
        parameter_summary = ernie_align.plan(ROOT / f"recipes/lora/{model}.yaml").parameter_summary
        told = {
            part: cells.split("|")[1 + place].strip()
            for part, cells in re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
        }
        assert {part: n for part, n in told.items() if n != "-"} == {
            row.part: f"{row.parameters:,}" for row in parameter_summary.rows
        }


def test_every_message_under_troubleshooting_is_raised_somewhere():
    source = "\n".join(path.read_text() for path in (ROOT / "ernie_align").rglob("*.py"))
    text = (DOCS / "reference" / "troubleshooting.md").read_text()
    tables = text[text.index("## RecipeError") : text.index("## Expected behavior")]
    first_cells = re.findall(r"^\| ([^|]*) \|", tables, re.MULTILINE)
    messages = [message for cell in first_cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 30
    for message in messages:
        for piece in filter(None, map(str.strip, message.split("..."))):
            assert piece in source, message


def test_errors_and_exit_codes_are_all_told():
    text = (DOCS / "reference" / "troubleshooting.md").read_text()
    from ernie_align import errors

    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.AlignError) and kind is not errors.AlignError:
            assert f"## {name}\n" in text
