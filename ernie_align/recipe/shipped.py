"""The recipes that come with the package: list them, or copy one into the user's folder."""

from __future__ import annotations

from pathlib import Path

from ernie_align.errors import Fault, RecipeError, did_you_mean

_FOLDER = Path(__file__).parent.parent / "shipped_recipes"  # in a checkout a link to recipes/
_SCHEMA_LINE = "# yaml-language-server: $schema="


def shipped_recipes() -> dict[str, tuple[Path, str]]:
    """Return name -> (path, description) of every shipped recipe and evaluation config, such as `lora/vl_28b`."""
    recipes = {}
    for path in sorted(_FOLDER.glob("*/*.yaml")):
        if path.parent.name != "accelerate":  # launch profiles
            lines = path.read_text(encoding="utf-8").splitlines()
            description = next(line for line in lines if not line.startswith(_SCHEMA_LINE))
            recipes[f"{path.parent.name}/{path.stem}"] = (path, description.removeprefix("# "))
    return recipes


def copy_recipe(name: str, target: Path) -> list[Path]:
    """Copy a shipped recipe, and the JSON schema next to it for editors. Return the paths that were written.

    Comments in the copy name its own path. Raises RecipeError if the name is unknown or a file exists already.
    """
    recipes = shipped_recipes()
    name = name.removeprefix("recipes/").removesuffix(".yaml")
    if name not in recipes:
        raise RecipeError.at("recipes copy", f"no shipped recipe {name!r}", fix=did_you_mean(name, recipes))
    text = recipes[name][0].read_text(encoding="utf-8").replace(f"recipes/{name}.yaml", str(target))
    contents = {target: text}
    if text.startswith(_SCHEMA_LINE):
        contents[target] = text.replace("$schema=../schema.json", "$schema=schema.json", 1)
        schema = (_FOLDER / "schema.json").read_text(encoding="utf-8")
        if not _has_text(target.parent / "schema.json", schema):
            contents[target.parent / "schema.json"] = schema
    existing = [path for path in contents if path.exists()]
    if existing:
        fix = "choose another name or folder: no file is overwritten"
        raise RecipeError(*(Fault(str(path), "the file exists already", fix=fix) for path in existing))
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return list(contents)


def _has_text(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()
