"""A recipe holds no secret: it is copied into the run directory as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ernie_align.errors import Fault, RecipeError
from ernie_align.recipe.document import Document, Path
from ernie_align.redact import is_secret_key, secret_in

_WHY = "a recipe is copied into the run directory, and from there to wherever runs are shared"
_FIX = "drop it, and withdraw it where it is valid; a judge's key is named by api_key_env, the hub's is HF_TOKEN"


def refuse_secrets(document: Document) -> None:
    """Raises RecipeError with the place of each secret in values and comments, and shows none of them."""
    faults = []
    for path, key, value in _leaves(document.values, (), ""):
        if not isinstance(value, str) or not value:
            continue
        what = secret_in(value) or ("a secret, by the name of its key" if is_secret_key(key) else None)
        if what is not None:
            faults.append(Fault(document.address(path), what, why=_WHY, fix=_FIX))
    for number, line in enumerate(document.text.splitlines(), start=1):
        if "#" in line and (what := secret_in(line[line.index("#") :])):
            faults.append(Fault(f"{document.name}:{number}", f"{what}, in a comment", why=_WHY, fix=_FIX))
    if faults:
        raise RecipeError(*faults)


def _leaves(value: Any, path: Path, key: str) -> Iterator[tuple[Path, str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, (*path, name), str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*path, number), key)
    else:
        yield path, key, value
