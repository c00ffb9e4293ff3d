"""Requirements on an evaluation's results, such as exact_match>=0.9: parsed before it, checked after it."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_align.errors import Fault, RecipeError, did_you_mean
from ernie_align.evaluation.runner import Figure

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}
_GRAMMAR = re.compile(
    r"\s*(?P<metric>[^\s@/<>=]+)(?:@(?P<data>[^\s@/<>=]+))?(?:/(?P<kind>[^@<>=]+?))?\s*"
    r"(?P<op>>=|<=|==|>|<)\s*(?P<bound>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
)
# Names for the comparison with the baseline: (part of a report's checkpoint, its key).
DRIFT = {
    "text_retention": ("text", "agreement"),
    "text_kl": ("text", "kl"),
    "routing_flips_text": ("routing", "text"),
    "routing_flips_vision": ("routing", "vision"),
}


@dataclass(frozen=True)
class Requirement:
    """`metric[@data][/kind] op bound`. Without data it applies to every data set, without kind to all rows together."""

    text: str
    metric: str
    data: str | None
    kind: str | None
    op: str
    bound: float


def parse_requirements(
    texts: Iterable[str], *, metrics: Sequence[str], kinds: Mapping[str, Sequence[str]], several: bool, where: str
) -> list[Requirement]:
    """Parse requirements. Raises RecipeError with every fault.

    metrics: names in the config; kinds: data set -> its kinds; several: more than one checkpoint is evaluated; where:
    place of the requirements, for errors.
    """
    faults, requirements = [], []
    for text in texts:
        match = _GRAMMAR.fullmatch(text)
        if match is None:
            fix = "write metric[@data][/kind] op number, such as exact_match@test.jsonl/sum>=0.9"
            faults.append(Fault(where, f"{text!r} is not a valid requirement", fix=fix))
            continue
        one = Requirement(text.strip(), **{**match.groupdict(), "bound": float(match["bound"])})
        if problem := _problem(one, metrics, kinds, several):
            what, fix = problem
            faults.append(Fault(where, f"{one.text}: {what}", fix=fix))
        requirements.append(one)
    if faults:
        raise RecipeError(*faults)
    return requirements


def _problem(
    one: Requirement, metrics: Sequence[str], kinds: Mapping[str, Sequence[str]], several: bool
) -> tuple[str, str] | None:
    """Return what is wrong with a requirement and the fix, or None."""
    if one.metric in DRIFT and one.metric not in metrics:
        if not several:
            what = f"{one.metric} compares a checkpoint with a baseline, and only one checkpoint is evaluated"
            return what, "add the checkpoint to compare with, as the first one or with --baseline"
        if one.data or one.kind:
            return f"{one.metric} does not belong to a data set", f"write {one.metric} without @ and /"
        return None
    if one.metric not in metrics:
        known = [*metrics, *(DRIFT if several else ())]
        return f"unknown metric {one.metric}", did_you_mean(one.metric, known)
    if one.data is not None and one.data not in kinds:
        return f"unknown data set {one.data}", did_you_mean(one.data, kinds)
    possible = sorted({kind for data, names in kinds.items() if one.data in (None, data) for kind in names})
    if one.kind is not None and one.kind not in possible:
        return f"no row has the kind {one.kind}", did_you_mean(one.kind, possible)
    return None


def check_requirements(
    requirements: Sequence[Requirement],
    figures: Mapping[str, Sequence[Figure]],
    drift: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, str | None],
) -> list[dict[str, Any]]:
    """Return {requirement, checkpoint, data, kind, value, passed} for each requirement, checkpoint and data set.

    figures: checkpoint -> its figures; drift: checkpoint -> {text, routing} against its baseline; baselines: checkpoint
    -> its baseline. A checkpoint without a baseline is exempt if others have one. A requirement without a value, for
    which nothing was measured, does not pass.
    """
    names = [name for name in figures if baselines[name]] or list(figures)
    return [line for one in requirements for name in names for line in _check(one, name, figures[name], drift[name])]


def _check(
    one: Requirement, checkpoint: str, figures: Sequence[Figure], drift: Mapping[str, Any]
) -> list[dict[str, Any]]:
    matching = [figure for figure in figures if figure.metric == one.metric and one.data in (None, figure.data)]
    values: list[tuple[str | None, str | None, float | None]] = []
    for data in dict.fromkeys(figure.data for figure in matching):
        of_data = [figure for figure in matching if figure.data == data]
        # `all` comes last
        selected = [figure for figure in of_data if figure.kind == one.kind] if one.kind else of_data[-1:]
        values += [(data, figure.kind, figure.value) for figure in selected]
    if one.metric in DRIFT and not matching:
        part, key = DRIFT[one.metric]
        measured = drift[part] or {}
        values = [(None, None, (measured if part == "text" else measured.get("flipped") or {}).get(key))]
    return [
        {
            "requirement": one.text,
            "checkpoint": checkpoint,
            "data": data,
            "kind": kind,
            "value": value,
            "passed": value is not None and _OPERATORS[one.op](value, one.bound),
        }
        for data, kind, value in values or [(one.data, one.kind, None)]
    ]
