"""Answers that must be JSON of a given shape."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from ernie_align.errors import RecipeError

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)


def json_verifier(schema: dict[str, Any], *, fenced: bool, where: str) -> Callable[[str], float]:
    """schema -> answer -> 1 if the answer is JSON valid against it, else 0.

    fenced: the answer may be one ```json fence. Strictly JSON: NaN and Infinity are not. A $ref out of the schema is
    never fetched. Raises RecipeError at `where` if the schema itself is none.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError:
        fix = "pip install 'ernie-align[rewards]'"
        raise RecipeError.at(where, "reward json_schema needs jsonschema, which is not installed", fix=fix) from None
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
        validator = kind(schema, registry=Registry())
        validator.is_valid({})
    except SchemaError as error:
        raise RecipeError.at(where, f"no JSON schema: {error.message}", why=error.json_path, fix="mend it") from None
    except Unresolvable as error:
        raise RecipeError.at(where, f"$ref {error.ref!r} is not in the schema", fix="move it into $defs") from None

    def verify(answer: str) -> float:
        fence = _FENCE.fullmatch(answer.strip()) if fenced else None
        try:
            value = json.loads(fence[1] if fence else answer, parse_constant=_refuse)
            return float(validator.is_valid(value))
        except (ValueError, RecursionError):  # no JSON, a number too long, brackets too deep
            return 0.0

    return verify


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
