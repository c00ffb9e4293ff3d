"""Requirements: what a figure has to reach for the exit code to be 0."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_align.errors import Fault, RecipeError
from ernie_align.evaluation.runner import Figure

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}
_GRAMMAR = re.compile(
    r"\s*(?P<measure>[^\s@/<>=]+)(?:@(?P<data>[^\s@/<>=]+))?(?:/(?P<kind>[^@<>=]+?))?\s*"
    r"(?P<op>>=|<=|==|>|<)\s*(?P<bound>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
)
# Beside the measures of the plan, of every checkpoint but the first: how it compares with that one.
AGAINST_FIRST = {
    "text_retention": ("text", "agreement"),
    "text_kl": ("text", "kl"),
    "routing_flips_text": ("routing", "text"),
    "routing_flips_vision": ("routing", "vision"),
}


@dataclass(frozen=True)
class Requirement:
    """`measure[@data][/kind] op bound`. Without data it holds for every data set, without kind for all of its rows."""

    text: str
    measure: str
    data: str | None
    kind: str | None
    op: str
    bound: float


def parse_requirements(
    texts: Iterable[str], *, measures: Sequence[str], kinds: Mapping[str, Sequence[str]], several: bool, where: str
) -> list[Requirement]:
    """Requirements, judged before anything is asked.

    measures: of the plan; kinds: data set -> its kinds; several: more than one checkpoint is measured; where: of the
    requirements, for errors. Raises RecipeError with every fault.
    """
    faults, found = [], []
    for text in texts:
        match = _GRAMMAR.fullmatch(text)
        if match is None:
            fix = "write measure[@data][/kind] op number, such as exact_match@test.jsonl/sum>=0.9"
            faults.append(Fault(where, f"{text!r} is no requirement", fix=fix))
            continue
        one = Requirement(
            text.strip(), match["measure"], match["data"], match["kind"], match["op"], float(match["bound"])
        )
        fault = _fault(one, [*measures, *(AGAINST_FIRST if several else ())], measures, kinds, several, where)
        if fault:
            faults.append(fault)
        found.append(one)
    if faults:
        raise RecipeError(*faults)
    return found


def _fault(
    one: Requirement,
    known: Sequence[str],
    measures: Sequence[str],
    kinds: Mapping[str, Sequence[str]],
    several: bool,
    where: str,
) -> Fault | None:
    if one.measure in AGAINST_FIRST and one.measure not in measures:
        if not several:
            what = f"{one.text}: {one.measure} compares with the first checkpoint, and there is only one"
            return Fault(where, what, fix="name the checkpoint to compare with first")
        if one.data or one.kind:
            return Fault(where, f"{one.text}: {one.measure} is not of a data set", fix=f"write {one.measure} alone")
        return None
    if one.measure not in known:
        return Fault(where, f"{one.text}: no measure is called {one.measure}", fix=_choose(one.measure, known))
    if one.data is not None and one.data not in kinds:
        return Fault(where, f"{one.text}: no data set is called {one.data}", fix=_choose(one.data, list(kinds)))
    there = {kind for data, own in kinds.items() if one.data in (None, data) for kind in own}
    if one.kind is not None and one.kind not in there:
        return Fault(where, f"{one.text}: no row is of kind {one.kind}", fix=_choose(one.kind, sorted(there)))
    return None


def _choose(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return (f"did you mean {close[0]}? " if close else "") + f"there are {', '.join(known)}"


def judge(
    requirements: Sequence[Requirement],
    figures: Mapping[str, Sequence[Figure]],
    against: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One line for each requirement, checkpoint and data set: {requirement, checkpoint, data, kind, value, passed}.

    figures: checkpoint -> its figures; against: checkpoint -> {text, routing} against the first. Of several checkpoints
    the first is what the others are compared with, and nothing is required of it. What could not be measured has value
    None and does not pass.
    """
    names = list(figures)
    asked = names[1:] or names
    return [line for one in requirements for name in asked for line in _lines(one, name, figures[name], against[name])]


def _lines(
    one: Requirement, checkpoint: str, figures: Sequence[Figure], against: Mapping[str, Any]
) -> list[dict[str, Any]]:
    own = [figure for figure in figures if figure.measure == one.measure and one.data in (None, figure.data)]
    values: list[tuple[str | None, str | None, float | None]] = []
    for data in dict.fromkeys(figure.data for figure in own):
        here = [figure for figure in own if figure.data == data]
        chosen = [figure for figure in here if figure.kind == one.kind] if one.kind else here[-1:]  # `all` comes last
        values += [(data, figure.kind, figure.value) for figure in chosen]
    if one.measure in AGAINST_FIRST and not own:
        part, key = AGAINST_FIRST[one.measure]
        found = (against.get(part) or {}) if part == "text" else ((against.get(part) or {}).get("flipped") or {})
        values = [(None, None, found.get(key))]
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
