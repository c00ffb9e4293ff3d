"""Answers do not depend on their batch, and every result states its number of rows and its interval."""

from __future__ import annotations

import json
import math

import pytest

from ernie_align.data.formats import canonicalize
from ernie_align.errors import DataError
from ernie_align.evaluation import Sampling, evaluate, generate_answer, load_eval_config
from ernie_align.evaluation.intervals import wilson_interval
from ernie_align.evaluation.metrics import build_metrics
from ernie_align.evaluation.questions import Question
from ernie_align.models.load import load_model
from tests.support.runs import beside, write_rows


def answers_of(evaluation):
    """Return every checkpoint's answers, row by row."""
    return [answer for row in evaluation.rows for result in row["results"].values() for answer in result["answers"]]


def score_of(row, measure="exact_match"):
    (result,) = row["results"].values()
    return result["scores"][measure]


@pytest.fixture
def questions(digits, tmp_path):
    """Text, one image and two, of different length."""
    rows = [json.loads(line) for line in (digits / "test.jsonl").read_text().splitlines()]
    chosen = [row for kind in ("sum", "name", "compare") for row in [row for row in rows if row["kind"] == kind][:4]]
    for row in chosen:
        row["images"] = beside(tmp_path, digits, row.get("images", []))
    return write_rows(tmp_path / "questions.jsonl", chosen)


def test_a_batch_answers_as_its_rows_do_alone(checkpoints, questions):
    """With left padding and no, one or two images per row, a batch gives the answers of single rows."""
    together = evaluate(checkpoints["vl_moe"], questions, batch_size=12, max_new_tokens=6)
    alone = evaluate(checkpoints["vl_moe"], questions, batch_size=1, max_new_tokens=6)
    assert answers_of(together) == answers_of(alone)
    assert len(set(answers_of(together))) > 1


def test_the_figures(checkpoints, questions):
    evaluation = evaluate(checkpoints["vl_moe"], questions, max_new_tokens=2)
    assert [(figure.kind, figure.n) for figure in evaluation.figures] == [
        ("compare", 4), ("name", 4), ("sum", 4), ("all", 12),
    ]  # fmt: skip
    for figure in evaluation.figures:
        rows = [row for row in evaluation.rows if figure.kind in (row["kind"], "all")]
        right = sum(score_of(row) for row in rows)
        assert figure.value == right / figure.n and figure.interval == wilson_interval(int(right), figure.n)
    assert evaluation.rows[0]["row"].startswith(f"{questions}:")


def test_generation_never_samples_a_modality_token(checkpoints, digits):
    """After a sampled placeholder the next forward pass would need an image that does not exist."""
    import torch

    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    row = canonicalize(
        {"messages": [{"role": "user", "content": "?"}], "images": ["images/0000.png"]}, "messages", digits
    )
    with torch.no_grad():  # a model that would always sample the placeholder
        embeddings = bundle.model.model.language_model.embed_tokens.weight
        favourite = embeddings[bundle.modality.image].clone()
        embeddings.mul_(1e-3)
        embeddings[bundle.modality.image] = 1e3 * favourite
    text = generate_answer(bundle, row, sampling=Sampling(max_new_tokens=8, temperature=2.0))
    assert "IMAGE" not in text and "VIDEO" not in text


def test_the_answer_follows_the_reasoning(renderers):
    """The row turns thinking on; the answer is scored without the reasoning."""
    row = canonicalize(
        {"messages": [{"role": "user", "content": "?"}], "answer": "seven", "thinking": True}, "messages"
    )
    question = Question("rows", "rows:1", "all", row, {"answer": "seven"})
    outcome = {"answers": [{"text": "\nhm, eight?\n</think>\nseven", "ids": [1]}], "opened": True}
    never_closed = {"answers": [{"text": "seven", "ids": [1]}], "opened": True}
    plan = load_eval_config({"data": [{"path": "-"}], "metrics": [{"name": "exact_match"}, {"name": "thinking"},
                                                           {"name": "thinking_length"}]})  # fmt: skip
    exact, thinking, length = (
        measure.score([question, question], [outcome, never_closed]) for measure in build_metrics(plan)
    )
    assert exact == [(1.0, 1.0), (0.0, 1.0)] and thinking == [(1.0, 1.0), (0.0, 1.0)]
    assert length == [(2.0, 1.0), (1.0, 1.0)]  # words


def test_preference_compares_the_likelihood_of_two_answers(checkpoints, digits, tmp_path):
    """Log-probabilities in batches equal each pair's cross-entropy computed from the model's logits."""
    import torch

    from ernie_align.data.pairs import PairCollator, PairEncoder
    from ernie_align.data.render import renderer_of

    lines = (digits / "preferences-val.jsonl").read_text().splitlines()[:5]
    file = digits / "few-preferences.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    report = evaluate(checkpoints["vl_moe"], file, metrics="preference", batch_size=3)
    bundle = load_model(str(checkpoints["vl_moe"]))
    encode = PairEncoder(renderer_of(bundle), max_length=512)
    for line, row, scored in zip(lines, report.results[0].outcomes, report.rows, strict=True):
        (pair,) = encode(canonicalize(json.loads(line), "preference", digits))
        batch = PairCollator(0, image_processor=bundle.image_processor)([pair | {"rows": [0, 0]}])
        inputs = {name: batch[name] for name in batch if name not in ("rows", "vision_tokens", "completion_mask")}
        shown = [name for name in ("pixel_values", "image_grid_thw") if name in batch]
        inputs |= {name: torch.cat([batch[name]] * 2) for name in shown}  # to the better and to the worse answer
        with torch.no_grad():
            logits = bundle.model(**inputs, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        expected = -(nll * batch["completion_mask"][:, 1:]).sum(dim=1)
        # sums of float32 over batches padded to other widths
        found = [row["chosen_logp"], row["rejected_logp"]]
        assert found == pytest.approx(expected.tolist(), rel=1e-4)
        assert scored["results"]["vl_moe"]["scores"]["preference"] == (found[0] > found[1])
    with pytest.raises(DataError, match="preference reads chosen and rejected"):
        evaluate(checkpoints["vl_moe"], digits / "val.jsonl", metrics="preference")


def test_zero_is_an_answer(checkpoints, tmp_path):
    file = tmp_path / "sums.jsonl"
    row = {"messages": [{"role": "user", "content": "What is zero plus zero?"}], "answer": 0}
    file.write_text(json.dumps(row) + "\n")
    (asked,) = evaluate(checkpoints["dense"], file, max_new_tokens=1).rows
    assert asked["expected"] == 0 and "exact_match" in asked["results"]["dense"]["scores"]


def test_a_row_without_a_known_answer_is_an_error(checkpoints, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "?"}]}])
    with pytest.raises(DataError, match="exact_match reads answer") as caught:
        evaluate(checkpoints["dense"], path)
    assert caught.value.faults[0].where == f"{path}:1"


def test_a_sampled_answer_does_not_depend_on_its_batch(checkpoints, questions):
    """Each row and sample has its own seed: any batch size gives the same answers, another seed gives others."""
    drawn = {"temperature": 1.5, "top_p": 0.9, "samples": 2, "max_new_tokens": 4, "seed": 3}

    def draw(**changed):
        plan = {"data": [{"path": str(questions)}], "metrics": [{"name": "exact_match"}]}
        return answers_of(evaluate(checkpoints["vl_moe"], config=plan | {"generation": drawn | changed}))

    some = draw(batch_size=5)
    assert some == draw(batch_size=24) == draw(batch_size=1)
    assert some != draw(batch_size=24, seed=4) and some[0::2] != some[1::2]


def test_samples_follow_the_model(checkpoints):
    """Frequencies of 2000 first tokens match the softmax of the logits, truncated at top_p."""
    import torch

    from ernie_align.evaluation.generate import _gumbel_noise

    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]]).expand(2000, -1)
    processors = _gumbel_noise(Sampling(temperature=0.8, top_p=0.9), [str(seed) for seed in range(2000)], "cpu")
    counts = processors(torch.zeros(2000, 1, dtype=torch.long), logits).argmax(dim=-1).bincount(minlength=4)
    kept = torch.tensor([2.0, 1.0, 0.5]).div(0.8).softmax(dim=0)  # 0.69 + 0.20 < 0.9 <= ... + 0.11; the last is cut
    assert counts[3] == 0
    # three standard deviations of a frequency over 2000 draws are at most 0.034
    assert (counts[:3] / 2000).tolist() == pytest.approx(kept.tolist(), abs=0.034)


def test_perplexity_is_that_of_the_answers_own_tokens(checkpoints, questions):
    """exp(Σ nll / Σ tokens), by cross-entropy of the model's own logits, row by row."""
    import torch

    from ernie_align.data.render import renderer_of
    from ernie_align.evaluation.questions import load_questions
    from ernie_align.recipe.evaluation import DataSetBlock

    evaluation = evaluate(checkpoints["vl_moe"], questions, metrics="perplexity", batch_size=5)
    bundle = load_model(str(checkpoints["vl_moe"]))
    renderer, total, tokens = renderer_of(bundle), 0.0, 0
    for question in load_questions(DataSetBlock(path=str(questions))):
        (example,) = renderer.examples(question.with_answer, max_length=512)
        inputs = {"input_ids": torch.tensor([example.input_ids])}
        if example.media:
            from ernie_align.data.media import load_image

            pixels = bundle.image_processor(images=[load_image(image) for image in example.media], return_tensors="pt")
            inputs |= {name: pixels[name] for name in ("pixel_values", "image_grid_thw")}
        with torch.no_grad():
            logits = bundle.model(**inputs, use_cache=False).logits[:, :-1]
        labels = torch.tensor([example.labels[1:]])
        total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
        tokens += int((labels != -100).sum())
    figure = evaluation.figures[-1]
    # sums of float32 over batches padded to other widths
    assert figure.value == pytest.approx(math.exp(total / tokens), rel=1e-4) and figure.n == 12
    assert figure.interval[0] < figure.value < figure.interval[1]
