"""Answers do not depend on the batch they are asked in, and figures are honest about how many they rest on."""

from __future__ import annotations

import json

import pytest

from ernie_align.data.formats import canonical
from ernie_align.errors import DataError
from ernie_align.evaluation import Sampling, answer, evaluate
from ernie_align.evaluation.metrics import exact_match, wilson_interval
from ernie_align.models.load import load_model
from tests.conftest import write_rows


def test_wilson_by_hand():
    """8 of 10: p 0.8, z² 3.841459; (0.8 + 0.192073 ± 1.959964·sqrt(0.016 + 0.0096036)) / 1.3841459."""
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    low, high = wilson_interval(0, 10)
    assert low == 0.0 and high == pytest.approx(0.277533, abs=1e-6)  # z² / (n + z²)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.277533, 1.0), abs=1e-6)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)


def test_exact_match_forgives_white_space_alone():
    assert exact_match(" seven\n", "seven") and not exact_match("Seven", "seven") and not exact_match("sevens", "seven")


@pytest.fixture
def questions(digits, tmp_path):
    """Text, one image and two, of different length."""
    rows = [json.loads(line) for line in (digits / "test.jsonl").read_text().splitlines()]
    chosen = [row for kind in ("sum", "name", "compare") for row in [row for row in rows if row["kind"] == kind][:4]]
    for row in chosen:
        row["images"] = [str(digits / image) for image in row.get("images", [])]
    return write_rows(tmp_path / "questions.jsonl", chosen)


def test_a_batch_answers_as_its_rows_do_alone(checkpoints, questions):
    """Left padding, images in some rows, two in others: the answers of a batch are those of single rows."""
    together = evaluate(checkpoints["vl_moe"], questions, batch_size=12, max_new_tokens=6)
    alone = evaluate(checkpoints["vl_moe"], questions, batch_size=1, max_new_tokens=6)
    assert [row["answer"] for row in together.rows] == [row["answer"] for row in alone.rows]
    assert len({row["answer"] for row in together.rows}) > 1


def test_the_report(checkpoints, questions, tmp_path):
    report = evaluate(checkpoints["vl_moe"], questions, out=tmp_path / "deep" / "report.json", max_new_tokens=2)
    kept = json.loads((tmp_path / "deep" / "report.json").read_text())["reports"][0]
    assert [(figure["kind"], figure["n"]) for figure in kept["figures"]] == [
        ("compare", 4), ("name", 4), ("sum", 4), ("all", 12),
    ]  # fmt: skip
    for figure in report.figures:
        rows = [row for row in report.rows if figure.kind in (row["kind"], "all")]
        assert figure.correct == sum(row["correct"] for row in rows)
        assert figure.interval == wilson_interval(figure.correct, figure.n)
    assert report.rows[0]["row"].startswith(f"{questions}:") and not list(tmp_path.rglob("*.partial"))


def test_generation_never_samples_a_modality_token(checkpoints, digits):
    """A sampled placeholder would ask the next forward for an image that is not there."""
    import torch

    bundle = load_model(str(checkpoints["vl_moe"]), dtype="float32")
    row = canonical({"messages": [{"role": "user", "content": "?"}], "images": ["images/0000.png"]}, "messages", digits)
    with torch.no_grad():  # a model that would say nothing else
        embeddings = bundle.model.model.language_model.embed_tokens.weight
        favourite = embeddings[bundle.modality.image].clone()
        embeddings.mul_(1e-3)
        embeddings[bundle.modality.image] = 1e3 * favourite
    text = answer(bundle, row, sampling=Sampling(max_new_tokens=8, temperature=2.0))
    assert "IMAGE" not in text and "VIDEO" not in text


def test_what_follows_the_thinking_is_the_answer(checkpoints, tmp_path, monkeypatch):
    """The row's own thinking is asked for; the answer is judged without it."""
    import ernie_align.evaluation.measure as measure

    row = {"messages": [{"role": "user", "content": "?"}], "answer": "seven", "thinking": True}
    path = write_rows(tmp_path / "a.jsonl", [row])
    monkeypatch.setattr(measure, "answers", lambda *args, **kwargs: iter([(0, "\nhm, eight?\n</think>\nseven")]))
    (figure,) = evaluate(checkpoints["dense"], path).figures
    assert figure.correct == 1


def test_preference_is_which_answer_is_more_likely(checkpoints, digits, tmp_path):
    """Log-probabilities in batches are those of each pair alone, by cross-entropy of the model's own logits."""
    import torch

    from ernie_align.data.pairs import PairCollator, PairEncoder
    from ernie_align.evaluation.generate import renderer_of

    lines = (digits / "preferences-val.jsonl").read_text().splitlines()[:5]
    file = digits / "few-preferences.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    report = evaluate(checkpoints["vl_moe"], file, metrics="preference", batch_size=3)
    bundle = load_model(str(checkpoints["vl_moe"]))
    encode = PairEncoder(renderer_of(bundle), max_length=512)
    for line, row in zip(lines, report.rows, strict=True):
        (pair,) = encode(canonical(json.loads(line), "preference", digits))
        batch = PairCollator(0, image_processor=bundle.image_processor)([pair | {"rows": [0, 0]}])
        inputs = {name: batch[name] for name in batch if name not in ("rows", "vision_tokens", "completion_mask")}
        with torch.no_grad():
            logits = bundle.model(**inputs, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        expected = -(nll * batch["completion_mask"][:, 1:]).sum(dim=1)
        # sums of float32 over batches padded to other widths
        assert [row["chosen_logp"], row["rejected_logp"]] == pytest.approx(expected.tolist(), rel=1e-4)
        assert row["correct"] == (row["chosen_logp"] > row["rejected_logp"])
    with pytest.raises(DataError, match="no preference is known"):
        evaluate(checkpoints["vl_moe"], digits / "val.jsonl", metrics="preference")


def test_zero_is_an_answer(checkpoints, tmp_path):
    file = tmp_path / "sums.jsonl"
    row = {"messages": [{"role": "user", "content": "What is zero plus zero?"}], "answer": 0}
    file.write_text(json.dumps(row) + "\n")
    (asked,) = evaluate(checkpoints["dense"], file, max_new_tokens=1).rows
    assert asked["expected"] == "0"


def test_rows_without_a_known_answer_are_told(checkpoints, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "?"}]}])
    with pytest.raises(DataError, match="no answer is known") as caught:
        evaluate(checkpoints["dense"], path)
    assert caught.value.faults[0].where == f"{path}:1"
