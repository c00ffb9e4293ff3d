"""selfcheck takes a recipe's own steps in several ways; each of its checks can fail."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from transformers import TrainerCallback
from typer.testing import CliRunner

from ernie_align import selfcheck
from ernie_align.cli import app
from ernie_align.runs.selfcheck import VisionTokenCounter
from tests.support.callbacks import At
from tests.support.runs import recipe_of

NAMES = ["routing", "resume", "repeat", "precision", "processes"]


@pytest.fixture
def recipe(checkpoints, digits, tmp_path):
    blocks = {"adapter": {"scopes": ["attention", "vision_experts"]}, "data": {"eval": [{"path": "none.jsonl"}]}}
    made = recipe_of("lora", checkpoints["vl_moe"], digits / "val.jsonl", tmp_path / "run", **blocks)
    made["training"] |= {"per_device_train_batch_size": 2, "save_total_limit": 1, "eval_strategy": "steps"}
    return made


def test_a_sound_recipe_passes_and_its_run_directory_is_not_touched(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(app, ["selfcheck", str(tmp_path / "recipe.yaml"), "--steps", "2", "--json"])
    assert done.exit_code == 0, done.output
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert list(checks) == NAMES
    verdicts = [check["verdict"] for check in checks.values()]
    assert verdicts == ["pass"] * 4 + ["not applicable"]
    tokens, what = checks["routing"]["what"].split(maxsplit=1)
    # an image of the digits is 4 placeholders, a start and an end; 2 steps of 2 rows have 4 images or more
    assert int(tokens) >= 24 and int(tokens) % 6 == 0
    assert what == "vision tokens in 2 forwards, all of which reached the vision experts of each of 3 layers"
    assert "2 losses and" in checks["resume"]["what"] and "bit-equal" in checks["resume"]["what"]
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_route_fails(recipe):
    """Image tokens go to the text experts, as in the stock stack."""

    def to_text_experts(model=None, **_):
        def override(module, args, kwargs):
            return args, {**kwargs, "moe_mm_token_type_ids": torch.zeros_like(kwargs["moe_mm_token_type_ids"])}

        (backbone,) = (part for part in model.modules() if type(part).__name__ == "Ernie4_5_VLMoeModel")
        backbone.register_forward_pre_hook(override, with_kwargs=True)  # after the hook that derives the types

    checks = selfcheck(recipe, steps=2, callbacks=[At(0, to_text_experts, "on_train_begin")])
    assert [check.verdict for check in checks] == ["fail"] + ["not applicable"] * 4
    assert "reached the vision experts" in checks[0].what


class Noise(TrainerCallback):
    """Something unseeded in every step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        unseeded = torch.Generator()
        unseeded.seed()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 1e-3 * torch.randn(parameter.shape, generator=unseeded)


def test_runs_that_differ_fail(recipe, monkeypatch):
    """The first run has noise, precisions may not differ at all, and no process can be started."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    results = selfcheck(recipe, steps=2, processes=2, callbacks=[Noise()], max_drift=0.0)
    checks = {check.name: check for check in results}
    assert [checks[name].verdict for name in NAMES] == ["pass", "fail", "fail", "fail", "fail"]
    assert "tensors differ, by" in checks["repeat"].what
    assert "the loss differs from step 1 on" in checks["repeat"].what
    assert "2 processes do not reach the end" in checks["processes"].what


def test_the_counter_reports_tokens_that_did_not_reach_a_pool():
    counter = VisionTokenCounter()
    assert counter.verdict()[0] == "not applicable"
    counter.has_pools = True
    assert counter.verdict() == ("not applicable", "no image in the rows of these steps")
    counter.tokens, counter.forwards = 6, 1
    counter.reached = {"layers.1.mlp.vision_moe": 6, "layers.2.mlp.vision_moe": 5}
    assert counter.verdict() == ("fail", "6 vision tokens, of which 5 reached layers.2.mlp.vision_moe")
