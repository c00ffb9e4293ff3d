"""The house rules, read from the source: imports go down only, third parties have entry points, imports do nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.runs import ROOT, recipe_of

PACKAGE = ROOT / "ernie_align"
FILES = sorted(PACKAGE.rglob("*.py"))

# room -> floor; a file imports only from rooms on lower floors, and from its own
FLOORS = {
    "errors": -1,  # every room may raise
    "recipe": 0,
    "losses": 0,
    "checkpoints": 0,
    "models": 1,
    "data": 1,
    "rewards": 1,
    "tiny": 1,
    "stages": 2,
    "evaluation": 2,
    "dataset_report": 2,
    "runs": 3,
    "exporting": 3,
    "planning": 3,
    "report": 3,
    "cli": 4,
    "__main__": 5,
    "__init__": 4,
}
# third party -> rooms that may import it
ENTRY_POINTS = {
    "trl": ("stages",),
    "peft": ("models", "exporting"),
    "pydantic": ("recipe", "stages"),
    "pydantic_core": ("recipe", "stages"),
    "ruamel": ("recipe",),
    "yaml": (),  # YAML 1.1; recipes are 1.2
    "typer": ("cli",),
    "rich": ("cli", "report"),
    "matplotlib": ("report",),
    "jinja2": ("report", "exporting"),
    "lm_eval": ("evaluation",),
    "scipy": ("evaluation",),
    "math_verify": ("rewards",),
    "jsonschema": ("rewards",),
    "openai": ("rewards",),
    "pebble": ("rewards",),
    "filelock": ("runs",),
}
STAGES = {"sft", "lora", "dpo", "kto", "upo"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def documented(scope: ast.AST, name: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield (dotted name, node) of public classes and functions, and of public methods except Trainer's callbacks."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(("_", "on_")):
            dotted = f"{name}.{node.name}".lstrip(".")
            yield dotted, node
            if isinstance(node, ast.ClassDef):
                yield from documented(node, dotted)


def test_imports_go_down_only():
    wrong = [
        f"{name_of(path)} (floor {FLOORS[room(path)]}) imports {name} (floor {FLOORS[other]})"
        for path in FILES
        for name in imports(path)
        if name.startswith("ernie_align.")
        and (other := name.split(".")[1]) in FLOORS
        and other != room(path)
        and FLOORS[other] >= FLOORS[room(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_third_parties_have_entry_points():
    wrong = [
        f"{name_of(path)} imports {name}: only {', '.join(rooms) or 'nothing'} may"
        for path in FILES
        for name in imports(path)
        if (rooms := ENTRY_POINTS.get(name.split(".")[0])) is not None and room(path) not in rooms
    ]
    assert not wrong, "\n".join(wrong)


def test_every_public_name_has_a_docstring():
    """A method that overrides one of ours may leave it to the base class."""
    nodes = [(path, name, node) for path in FILES for name, node in documented(parsed(path))]
    described = {node.name for _, name, node in nodes if "." in name and ast.get_docstring(node)}
    derived = {(path, name) for path, name, node in nodes if isinstance(node, ast.ClassDef) and node.bases}
    wrong = [name_of(path) for path in FILES if not ast.get_docstring(parsed(path))]
    wrong += [
        f"{name_of(path)}: {name}"
        for path, name, node in nodes
        if not ast.get_docstring(node) and not (node.name in described and (path, name.rpartition(".")[0]) in derived)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_docstring_begins_with_a_question_word():
    """It says what the thing does: `Return the newest checkpoint`, not `Where to go on` or `Of a run`."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    wrong = [
        f"{name_of(path)}:{getattr(node, 'lineno', 1)}: {docstring.splitlines()[0]}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, kinds)
        and re.match(
            r"(Of|What|Whether|Where|Who|How|See|None of|That which)\b", docstring := ast.get_docstring(node) or ""
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} <= FLOORS.keys()


def test_stages_do_not_know_each_other():
    wrong = []
    for path in (PACKAGE / "stages").rglob("*.py"):
        own = path.relative_to(PACKAGE / "stages").parts[0].removesuffix(".py").split("_")[0]
        known = {name.split(".")[2].split("_")[0] for name in imports(path) if name.startswith("ernie_align.stages.")}
        if own != "" and (others := (STAGES - {own}) & known):
            wrong.append(f"{name_of(path)} imports {', '.join(sorted(others))}")
    assert not wrong, "\n".join(wrong)


def test_stage_names_are_compared_in_stages_only():
    """A stage owns its limits: what it can plan, launch and shard."""
    wrong = [
        f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in FILES
        if room(path) != "stages"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Compare)
        and any(isinstance(one, ast.Constant) and one.value in STAGES for one in ast.walk(node))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cupboards():
    """Files are named for what they own."""
    names = {path.stem for path in FILES}
    assert not names & {"utils", "helpers", "common", "constants", "misc", "mixins"}


def test_the_command_line_and_recipes_import_no_torch():
    code = (
        "import sys, ernie_align.cli, ernie_align.recipe\n"
        "print(*(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


def test_checking_a_recipe_imports_no_torch(checkpoints, digits, tmp_path):
    import yaml

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("sft", checkpoints["vl_moe"], digits / "val.jsonl", tmp_path / "run")))
    code = (
        "import sys\n"
        f"sys.argv = ['ernie-align', 'check', {str(recipe)!r}]\n"
        "from ernie_align.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
