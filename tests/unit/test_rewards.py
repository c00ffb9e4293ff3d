"""Rewards are TRL's callables: they judge the answer and not the reasoning, and say whose fault a failure is."""

from __future__ import annotations

import pytest

from ernie_align.errors import RunError
from ernie_align.recipe.rewards import ContainsReward, ExactMatchReward, FormatReward, LengthReward, ThinkingReward
from ernie_align.rewards import build_rewards, missing_columns
from ernie_align.rewards.reward import Reward, Scorer, answer_text, parse_completion, reasoning_text, source_line
from ernie_align.rewards.verifiers import contains, exact_match, repetition, thinking, within_length


def one(block, completion, **columns):
    """The score of a single completion."""
    (reward,) = build_rewards([block])
    (score,) = reward(["?"], [completion], **{key: [value] for key, value in columns.items()})
    return score


def answer(content, reasoning=None):
    return [{"role": "assistant", "content": content, **({"reasoning_content": reasoning} if reasoning else {})}]


@pytest.mark.parametrize(
    ("text", "opened", "content", "reasoning"),
    [
        ("four", False, "four", None),
        ("2 + 2\n</think>\nfour", True, "four", "2 + 2"),
        ("2 + 2 is", True, "", "2 + 2 is"),
        ("<think>\n2 + 2\n</think>\n\nfour\n", False, "four", "2 + 2"),
        ("<think>\n2 + 2\n</think>\n\nfour\n", True, "four", "2 + 2"),
        ("<think>\n2 + 2", False, "", "2 + 2"),
        ("2 + 2\n</think>\n\n<response>\nfour\n</response>\n", True, "four", "2 + 2"),
        ("2 + 2\n</think>\n\n<response>\nfour", True, "four", "2 + 2"),
        ("</think>four", True, "four", ""),
        ("four </think>", False, "four </think>", None),
        ("a <response> is due", False, "a <response> is due", None),
    ],
)
def test_a_completion_is_taken_apart(text, opened, content, reasoning):
    parts = parse_completion(text, opened=opened)
    assert parts["content"] == content and parts.get("reasoning_content") == reasoning


def test_plain_text_and_messages_are_read_alike():
    assert answer_text("2 + 2</think>four") == answer_text(answer("four", "2 + 2")) == "four"
    assert reasoning_text("2 + 2</think>four") == reasoning_text(answer("four", "2 + 2")) == "2 + 2"
    assert answer_text(answer("<think>2 + 2</think>four")) == "four"
    assert answer_text([{"role": "assistant", "content": [{"type": "text", "text": "four"}]}]) == "four"
    assert (answer_text([]), answer_text(answer(None)), reasoning_text("four")) == ("", "", None)


def test_the_reasoning_is_never_judged():
    block = ContainsReward(name="contains", text="four")
    assert one(block, answer("five", "four, surely")) == 0 and one(block, answer("four", "five")) == 1


def test_exact_match_forgives_white_space_alone():
    assert exact_match(" seven\n", "seven") == 1 and exact_match("", " ") == 1
    assert exact_match("seven", "Seven") == 0 and exact_match("seven", "seve") == 0
    assert exact_match("Straße", "STRASSE", ignore_case=True) == 1
    assert exact_match("7", 7) == 1 and exact_match("b", ["a", "b"]) == 1 and exact_match("c", ["a", "b"]) == 0


def test_contains():
    assert contains("It is seven.", "seven") == 1 and contains("It is Seven.", "seven") == 0
    assert contains("It is Seven.", "seven", ignore_case=True) == 1
    assert contains("anything", "") == 0 and contains("red and blue", ["green", "blue"]) == 1


def test_format_is_a_full_match_unless_asked():
    assert one(FormatReward(name="format", pattern="[a-z]+"), "seven") == 1
    assert one(FormatReward(name="format", pattern="[a-z]+"), "it is seven") == 0
    assert one(FormatReward(name="format", pattern="[a-z]+", match="search"), "It is SEVEN") == 1


def test_thinking_wants_reasoning_closed_and_an_answer():
    assert thinking("four", "2 + 2") == 1
    assert thinking("", "2 + 2") == thinking("four", None) == thinking("four", " ") == 0
    assert thinking("four </think>", "2 + 2") == thinking("four", "2 <think> 2") == 0
    assert [thinking("four", "12345", shortest=low, longest=high) for low, high in [(5, 5), (6, 9), (1, 4)]] == [
        1,
        0,
        0,
    ]
    assert one(ThinkingReward(name="thinking"), "<think>2 + 2") == 0


@pytest.mark.parametrize(
    ("length", "shortest", "longest", "falloff", "score"),
    [
        (10, 10, 10, None, 1.0),
        (5, 10, None, None, 0.5),  # 1 - 5 / 10
        (0, 10, None, None, 0.0),
        (15, None, 10, None, 0.5),  # 1 - 5 / 10
        (30, None, 10, None, 0.0),
        (8, 10, 20, 4, 0.5),  # 1 - 2 / 4
        (21, 10, 20, 4, 0.75),  # 1 - 1 / 4
    ],
)
def test_length_falls_linearly(length, shortest, longest, falloff, score):
    assert within_length(length, shortest=shortest, longest=longest, falloff=falloff) == score


def test_length_counts_what_it_is_asked_to():
    words = LengthReward(name="length", unit="words", target=2)
    assert one(words, "two words") == 1 and one(words, "one") == 0.5
    assert one(LengthReward(name="length", min=4), " ab ") == 0.5
    assert one(LengthReward(name="length", unit="tokens", max=2), "x", completion_ids=[1, 2, 3]) == 0.5


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repetition(["a", "b", "c", "d"], n=2) == 0
    assert repetition(["a", "b", "a", "b", "a"], n=2) == 2 / 4 - 1  # ab ba ab ba
    assert repetition(["a", "a", "a", "a", "a"], n=1) == 1 / 5 - 1
    assert repetition(["a", "b"], n=3) == 0


def test_names_are_unique_and_columns_are_known():
    first, second, third = build_rewards(
        [
            ExactMatchReward(name="exact_match"),
            ExactMatchReward(name="exact_match", column="other"),
            FormatReward(name="format", pattern="x", label="exact_match", weight=0.5),
        ]
    )
    assert [reward.name for reward in (first, second, third)] == ["exact_match", "exact_match_2", "exact_match_3"]
    assert [reward.__name__ for reward in (first,)] == ["exact_match"] and third.weight == 0.5
    assert (first.columns, second.columns, third.columns) == (("answer",), ("other",), ())
    (fault,) = missing_columns([first, second, third], {"answer", "kind"})
    assert "'other'" in fault.what and "answer, kind" in fault.fix
    (tokens,) = build_rewards([LengthReward(name="length", unit="tokens", max=2)])
    assert tokens.columns == ()


def test_a_row_without_the_value_is_left_out():
    (reward,) = build_rewards([ExactMatchReward(name="exact_match")])
    assert reward(["?", "?"], ["a", "b"], answer=["a", None]) == [1.0, None]


def test_a_failing_reward_names_the_function_the_prompt_and_the_completion():
    def fragile(prompts, completions, **columns):
        return [1 / len(completion) for completion in completions]

    reward = Reward("fragile", 1.0, Scorer(fragile, place=source_line(fragile)))
    with pytest.raises(RunError) as caught:
        reward(["one?", "two?"], ["x", ""], answer=["a", "b"])
    (fault,) = caught.value.faults
    line = fragile.__code__.co_firstlineno + 1
    assert fault.where == f"{__file__}:{line}" and "fragile: ZeroDivisionError" in fault.what
    assert "prompt: 'two?'" in fault.why and "completion: ''" in fault.why
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_failure_of_the_batch_alone_is_called_that():
    def jealous(prompts, completions, **columns):
        if len(prompts) > 1:
            raise ValueError("one at a time")
        return [0.0]

    with pytest.raises(RunError, match="on each of these rows alone it does not fail"):
        Reward("jealous", 1.0, Scorer(jealous, place=source_line(jealous)))(["a", "b"], ["c", "d"])


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        (["high", "low"], "returned 'high'; expected a finite number"),
        ([0.0, float("nan")], "returned nan"),
        (None, "returned NoneType; expected a list"),
    ],
)
def test_scores_are_finite_numbers_one_for_each_completion(scores, says):
    reward = Reward("odd", 1.0, Scorer(lambda prompts, completions, **columns: scores))
    with pytest.raises(RunError, match=says):
        reward(["a", "b"], ["c", "d"])


def test_booleans_and_the_scalars_of_numpy_and_torch_are_numbers():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    found = [True, None, numpy.bool_(True), numpy.float32(0.5), torch.tensor(0.25)]
    reward = Reward("sure", 1.0, Scorer(lambda prompts, completions, **columns: found))
    assert reward("abcde", "fghij") == [1.0, None, 1.0, 0.5, 0.25]


def test_a_column_that_never_came_is_named():
    (reward,) = build_rewards([ExactMatchReward(name="exact_match")])
    with pytest.raises(RunError, match="reads the column 'answer', which no row has"):
        reward(["?"], ["a"], kind=["sum"])
