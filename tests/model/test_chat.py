"""The commands eval, generate --chat and eval --harness as a user types them."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ernie_align.cli import app
from ernie_align.errors import DataError
from ernie_align.evaluation.chat import Chat
from ernie_align.evaluation.generate import Sampling
from ernie_align.models.load import load_model
from tests.support.runs import write_rows


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_a_missed_requirement_is_exit_code_4(checkpoints, text_rows, tmp_path):
    flags = ("--data", text_rows, "--limit", 3, "--max-new-tokens", 2, "--out", tmp_path / "out")
    missed = invoke("eval", checkpoints["dense"], *flags, "--require", "exact_match>=0.9")
    assert missed.exit_code == 4 and "MISSED" in missed.output and (tmp_path / "out" / "report.json").exists()
    met = invoke("eval", checkpoints["dense"], *flags, "--require", "exact_match>=0")
    assert met.exit_code == 0 and "all were cached" in met.output


def test_exactly_one_of_config_data_and_harness(checkpoints):
    assert invoke("eval", checkpoints["dense"]).exit_code == 2
    assert invoke("generate", checkpoints["dense"]).exit_code == 2


@pytest.fixture(scope="module")
def bundle(checkpoints):
    return load_model(str(checkpoints["vl_moe"]))


def test_a_conversation_keeps_its_history_and_images(bundle, digits):
    chat = Chat(bundle, system="Be brief.", sampling=Sampling(max_new_tokens=3))
    lines = f"/image {digits / 'images' / '0003.png'}\nWhich digit is this?\n\nAnd twice that?\n"
    out = io.StringIO()
    chat.loop(io.StringIO(lines), out)
    roles = [turn["role"] for turn in chat.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[1]["content"][0] == {"type": "image"} and len(chat.images) == 1 and not chat.pending
    assert chat.messages[3]["content"] == [{"type": "text", "text": "And twice that?"}]
    assert "next message: 1" in out.getvalue()


def test_the_streamed_text_is_the_answer(bundle):
    pieces = []
    chat = Chat(bundle, sampling=Sampling(max_new_tokens=6))
    answer = chat.ask("What is two plus three?", write=pieces.append)
    assert "".join(pieces).strip() == answer.strip() and len(pieces) > 1
    again = Chat(bundle, sampling=Sampling(max_new_tokens=6))
    assert again.ask("What is two plus three?") == answer


def test_mistakes_do_not_end_the_conversation(bundle, checkpoints, tmp_path):
    chat = Chat(bundle, sampling=Sampling(max_new_tokens=2))
    out = io.StringIO()
    chat.loop(
        io.StringIO(f"/image {tmp_path}/none.png\n/thinking on\n/thinking maybe\nHi\n/reset\n/quit\nnever\n"), out
    )
    output = out.getvalue()
    assert "no such image" in output and "thinking is on" in output and "unknown command: /thinking maybe" in output
    assert chat.thinking and chat.messages == [] and "conversation cleared" in output
    text_only = Chat(load_model(str(checkpoints["dense"])), sampling=Sampling(max_new_tokens=2))
    with pytest.raises(DataError, match="has no vision"):
        text_only.attach(tmp_path / "a.png")


def test_a_conversation_through_a_pipe(checkpoints):
    command = [sys.executable, "-m", "ernie_align", "generate", str(checkpoints["dense"]), "--chat"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "2"], input="Hello\n/reset\n", capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("conversation cleared\n") and done.stderr == ""


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install '.[bench]'"
)
def test_a_local_task_of_lm_eval(checkpoints, tmp_path, monkeypatch):
    """Multiple choice by likelihood: lm-eval's accuracy equals the accuracy by the model's log-probabilities."""
    import torch

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": f"What is {n} plus one?"} for n in ("two", "six", "ten")])
    (tmp_path / "sums.yaml").write_text(
        f"task: tiny_sums\ndataset_path: json\ndataset_kwargs: {{data_files: {rows}}}\ntest_split: train\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: [three, seven]\ndoc_to_target: 0\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    out = tmp_path / "harness.json"
    arguments = ("--harness", "tiny_sums", "--include-path", tmp_path, "--out", out)
    result = invoke("eval", checkpoints["vl_moe"], *arguments)
    assert result.exit_code == 0, result.output
    ((line,),) = json.loads(out.read_text())["harness"].values()
    bundle = load_model(str(checkpoints["vl_moe"]))

    def likelihood(question, answer):
        encode = bundle.tokenizer.encode
        before, whole = encode(question), encode(f"{question} {answer}")
        with torch.no_grad():
            logps = bundle.model.eval()(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(dim=-1)
        return sum(logps[place - 1, whole[place]].item() for place in range(len(before), len(whole)))

    questions = [json.loads(text)["question"] for text in rows.read_text().splitlines()]
    right = [likelihood(question, "three") > likelihood(question, "seven") for question in questions]
    assert (line["task"], line["metric"], line["value"]) == ("tiny_sums", "acc", pytest.approx(sum(right) / 3))
