"""Verifiers of choices, numbers, math, JSON and boxes on answers as models write them."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import time

import pytest

from ernie_align.errors import RecipeError, RunError
from ernie_align.recipe.rewards import (
    ChecklistReward,
    ChoiceReward,
    FormatReward,
    IouReward,
    JsonSchemaReward,
    MathReward,
    NumericReward,
)
from ernie_align.rewards import build_rewards
from ernie_align.rewards.sandbox import Sandbox, math_equal
from ernie_align.rewards.verifiers import (
    choice,
    chosen_letter,
    find_boxes,
    grounding,
    iou,
    last_quantity,
    numeric,
    parse_boxes,
    to_corners,
)

CITIES = ["Paris", "London", "New York", "York"]


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "(B)",
        "b",
        "B.",
        "**B**",
        "The answer is B",
        "The answer is (B).",
        "the answer is: **B**",
        "\\boxed{B}",
        "So $\\boxed{\\text{B}}$, not A",
        "B. London",
        "(B) London",
        "B) London",
        "Answer: B, because A is wrong",
        "So the correct choice is option B",
        "I think B",
        "A city like that is (B)",
        "答案是B",
        "答案\uff1aB",
        "\\boxed{London}",
        "London",
        "It is London.",
    ],
)
def test_the_chosen_letter(answer):
    assert chosen_letter(answer, "ABCD", CITIES) == "B"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "not sure",
        "A or B",
        "The answer is A or B",
        "The answer is A. No, the answer is B.",
        "A. Paris\nB. London",
        "Paris or London",
        "\\boxed{A} \\boxed{B}",
        "the answer is a guess",
        "E",
    ],
)
def test_an_ambiguous_answer_chooses_nothing(answer):
    assert chosen_letter(answer, "ABCD", CITIES) is None


def test_a_longer_option_hides_the_one_within_it():
    assert (
        chosen_letter("It was New York.", "ABCD", CITIES) == "C"
        and chosen_letter("It was York.", "ABCD", CITIES) == "D"
    )
    assert chosen_letter("应该去北京市看看", "AB", ["北京", "上海"]) == "A"


@pytest.mark.parametrize("expected", ["B", "b", "(B)", 1, "London"])
def test_the_expected_option_in_any_spelling(expected):
    assert choice("B", expected, "ABCDEF", CITIES) == 1 and choice("A", expected, "ABCDEF", CITIES) == 0


def test_options_may_be_a_mapping_and_limit_the_letters():
    assert choice("two", "B", "ABCDEF", {"B": "two", "A": "one"}) == 1
    with pytest.raises(ValueError, match="'F'; expected one of A, B"):
        choice("two", "F", "ABCDEF", ["one", "two"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("It is -5.", -5),
        ("\u22127", -7),
        ("10 - 3 = 7", 7),
        ("5-3", 3),
        ("x=-3", -3),
        ("1,234,567.5", 1234567.5),
        ("10, 20", 20),
        ("3/4", 0.75),
        ("1 1/2 cups", 1.5),
        ("-\\dfrac{1}{2}", -0.5),
        ("1.2e-3", 0.0012),
        ("1.2 \u00d7 10^3", 1200),
        ("1.2 \\times 10^{-3}", 0.0012),
        ("10^6", 1e6),
        ("about $5.", 5),
        (".5", 0.5),
        ("\\boxed{12} for 3 people", 12),
        ("答案是5个", 5),
        ("x^2", None),
        ("B2", None),
        ("1/0", None),
        ("1e999", None),
        ("none", None),
    ],
)
def test_the_last_number(text, value):
    found = last_quantity(text)
    assert (found and found.value) == value


def test_tolerances_and_percents():
    def score(answer, expected, absolute=0.0, relative=1e-6):
        return numeric(answer, expected, absolute=absolute, relative=relative)

    assert score("0.333333", "1/3", relative=1e-5) == 1 and score("0.33", "1/3") == 0
    assert score("9.5", 10, absolute=0.5) == 1 and score("9.4", 10, absolute=0.5) == 0
    assert score("95", 100, relative=0.05) == 1 and score("94", 100, relative=0.05) == 0
    assert score("45%", 45) == score("45%", 0.45) == score("0.45", "45%") == score("45%", "45 %") == 1
    assert score("45%", "0.45%") == 0 and score("no idea", 3) == 0
    with pytest.raises(ValueError, match="'many' contains no number"):
        score("3", "many")


@pytest.fixture(scope="module")
def math_sandbox():
    sandbox = Sandbox(math_equal, seconds=10.0)
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("The answer is $\\frac{1}{2}$.", "0.5", 1),
        ("\\frac{1}{2}", "\\frac{2}{4}", 1),
        ("\\boxed{x^2 - 1}", "(x-1)(x+1)", 1),
        ("$x = 3$", "3", 1),
        ("(1, 2)", "$(1,2)$", 1),
        ("1,000", "1000", 1),
        ("5", "3", 0),
        ("", "3", 0),
        ("{{{\\frac \x00 \ud800", "3", 0),
        ("five", "", None),
    ],
)
def test_math(math_sandbox, answer, expected, score):
    assert math_sandbox.score(answer, expected) == score


def test_endless_math_is_interrupted_in_any_thread():
    sandbox, scores = Sandbox(math_equal, seconds=0.5, warm_up=("4", "4")), []
    assert sandbox.score("4", "4") == 1
    thread = threading.Thread(target=lambda: scores.append(sandbox.score("$9^{9^{9^{9}}}$", "3")))
    begun = time.monotonic()
    thread.start()
    thread.join()
    assert scores == [0.0] and sandbox.counts["timeouts"] == 1 and time.monotonic() - begun < 3
    sandbox.close()


def test_a_call_that_ignores_the_timer_is_killed():
    """Sleeping takes no computing time, so only the clock can end it, after four times the limit."""
    sandbox = Sandbox(time.sleep, seconds=0.2)
    assert sandbox.score(0) is None
    begun = time.monotonic()
    assert sandbox.score(60) == 0.0 and sandbox.counts["timeouts"] == 1 and time.monotonic() - begun < 3
    assert sandbox.score(0) is None
    sandbox.close()


def test_math_survives_the_death_of_its_process(math_sandbox):
    assert math_sandbox.score("4", "4") == 1
    for process in multiprocessing.active_children():
        process.kill()
    assert math_sandbox.score("4", "4") in (0.0, 1.0) and math_sandbox.score("4", "4") == 1


def test_a_process_that_cannot_start_is_named():
    with pytest.raises(RunError, match="math_equal: the verifier's process did not start"):
        Sandbox(math_equal, seconds=1.0, warm_up=("one argument",)).score("4", "4")


def test_the_process_has_little_memory_and_no_torch():
    sandbox = Sandbox(eval, seconds=10.0)
    assert sandbox.score("'torch' in __import__('sys').modules") is False
    assert sandbox.score("len(bytearray(1 << 20))") == 1 << 20 and sandbox.score("len(bytearray(8 << 30))") == 0.0
    assert sandbox.counts == {}
    sandbox.close()


def test_a_script_without_a_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('begun')\n"
        "from ernie_align.recipe.rewards import FormatReward\n"
        "from ernie_align.rewards import build_rewards\n"
        "(reward,) = build_rewards([FormatReward(name='format', pattern='[a-z]+')])\n"
        "print(reward(['?'] * 2, ['seven', '7']))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["begun", "[1.0, 0.0]"] and done.stderr == ""


@pytest.mark.parametrize(
    ("block", "quote"),
    [
        (FormatReward(name="format", pattern="(a+)+b"), ""),
        (JsonSchemaReward(name="json_schema", against={"type": "string", "pattern": "^(a+)+b$"}), '"'),
    ],
    ids=["format", "json_schema"],
)
def test_a_pattern_that_backtracks_is_interrupted(block, quote):
    (reward,) = build_rewards([block])
    begun = time.monotonic()
    answers = [f"{quote}{text}{quote}" for text in ("aab", "a" * 40, "b")]
    assert reward(["?"] * 3, answers) == [1.0, 0.0, 0.0] and reward.counts == {"timeouts": 1}
    assert time.monotonic() - begun < 8


def test_json_against_a_schema(tmp_path):
    schema = {"type": "object", "required": ["digit"], "properties": {"digit": {"type": "integer"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for against in (schema, str(tmp_path / "schema.json")):
        (reward,) = build_rewards([JsonSchemaReward(name="json_schema", against=against)])
        answers = ['{"digit": 7}', '{"digit": "7"}', "{}", "seven", '{"digit": NaN}', '```json\n{"digit": 7}\n```']
        answers += ["[" * 100_000, '{"digit": ' + "9" * 5000 + "}"]
        assert reward([""] * len(answers), answers) == [1, 0, 0, 0, 0, 0, 0, 0]
    (reward,) = build_rewards([JsonSchemaReward(name="json_schema", against=schema, fenced=True)])
    assert reward([""] * 3, ['```json\n{"digit": 7}\n```', '{"digit": 7}', 'So:\n```json\n{"digit": 7}\n```']) == [
        1,
        1,
        0,
    ]


def test_a_schema_that_is_none_is_a_fault():
    with pytest.raises(RecipeError, match="invalid JSON schema: 'objekt' is not valid"):
        build_rewards([JsonSchemaReward(name="json_schema", against={"type": "objekt"})])
    with pytest.raises(RecipeError, match="is not in the schema"):
        build_rewards([JsonSchemaReward(name="json_schema", against={"$ref": "https://example.com/other.json"})])


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[1, 2, 3, 4]", [(1, 2, 3, 4)]),
        ("[[1,2,3,4],[5,6,7,8]]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("[1,2,3,4] and (5,6),(7,8)", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("<box>1 2 3 4</box>", [(1, 2, 3, 4)]),
        ("<box>(1,2),(3,4)</box>", [(1, 2, 3, 4)]),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", [(1, 2, 3, 4)]),
        ('```json\n[{"bbox_2d": [0.5, .25, 3, 4], "label": "cat"}]\n```', [(0.5, 0.25, 3, 4)]),
        ("I see 3 boxes; box 1 (1,2,3,4)", [(1, 2, 3, 4)]),
        ("[1, 2, 3]", []),
        ("no box", []),
    ],
)
def test_boxes_in_an_answer(text, boxes):
    assert find_boxes(text) == boxes


def test_boxes_of_a_column():
    assert parse_boxes([1, 2, 3, 4]) == parse_boxes([[1, 2, 3, 4]]) == parse_boxes("[1,2,3,4]") == [(1, 2, 3, 4)]
    assert parse_boxes([]) == []
    for wrong in ("none", [1, 2, 3], [[1, 2]]):
        with pytest.raises(ValueError, match="box"):
            parse_boxes(wrong)


def test_overlap_by_hand():
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(2 / 6)  # 2 shared of 4 + 4 - 2
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1 and iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == iou((2, 2, 0, 0), (0, 0, 2, 2)) == 0
    assert to_corners((1, 1, 2, 3), "xywh") == (1, 1, 3, 4)


def test_several_boxes_are_matched_once_each():
    left, right = (0, 0, 2, 2), (4, 0, 6, 2)
    assert grounding([right, left], [left, right]) == 1
    assert (
        grounding([left], [left, right]) == grounding([left, right], [left]) == grounding([left, left], [left]) == 0.5
    )
    assert grounding([], [left]) == 0 and grounding([], []) == 1
    assert (
        grounding([(1, 0, 3, 2)], [left], threshold=0.3) == 1 and grounding([(1, 0, 3, 2)], [left], threshold=0.5) == 0
    )


def test_a_checklist_is_a_mean_by_weight_of_what_applies():
    (reward,) = build_rewards(
        [
            ChecklistReward(
                name="checklist",
                criteria=[
                    FormatReward(name="format", pattern=r"\d+", weight=3.0),
                    NumericReward(name="numeric", column="number"),
                ],
            )
        ]
    )
    assert reward.columns == ("number",)
    assert reward(["?"] * 4, ["7", "8", "so 7", "8"], number=[7, 7, 7, None]) == [1.0, 0.75, 0.25, 1.0]


def test_blocks_reach_their_verifiers():
    rewards = build_rewards(
        [
            ChoiceReward(name="choice", options_column="options"),
            NumericReward(name="numeric", absolute=1.0),
            IouReward(name="iou", column="answer", form="xywh", column_form="xyxy"),
        ]
    )
    assert [reward.columns for reward in rewards] == [("answer", "options"), ("answer",), ("answer",)]
    picked, counted, placed = rewards
    assert picked(["?"], ["London"], answer=["B"], options=[CITIES]) == [1]
    assert counted(["?"], ["8"], answer=["7"]) == [1]
    assert placed(["?"], ["[1, 1, 2, 3]"], answer=[[1, 1, 3, 4]]) == [1]
    with pytest.raises(RunError, match="'Z'; expected one of A, B, C, D"):
        picked(["?"], ["London"], answer=["Z"], options=[CITIES])


def test_math_takes_several_right_answers():
    (reward,) = build_rewards([MathReward(name="math")])
    assert reward(["?"], ["$2$"], answer=[["1", "2"]]) == [1] and reward.counts == {}
