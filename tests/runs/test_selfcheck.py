"""selfcheck takes a recipe's own steps several ways; each of its checks can fail."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from typer.testing import CliRunner

from ernie_align import selfcheck
from ernie_align.cli import app
from ernie_align.models.routing import derive_token_types
from ernie_align.runs import selfcheck as room
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
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert list(found) == NAMES
    verdicts = [check["verdict"] for check in found.values()]
    assert verdicts == ["pass"] * 4 + ["not applicable"]
    words = found["routing"]["what"].split(maxsplit=1)
    # an image of the digits is 4 placeholders, a start and an end; 2 steps of 2 rows show 4 images or more
    assert int(words[0]) >= 24 and int(words[0]) % 6 == 0
    assert words[1] == "vision tokens in 2 forwards, all of which reached the vision experts of each of 3 layers"
    assert "2 losses and" in found["resume"]["what"] and "bit-equal" in found["resume"]["what"]
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_route_fails(recipe, monkeypatch):
    """Image tokens go to the text experts, as in the stock stack."""

    def astray(backbone):
        def derive(module, args, kwargs):
            args, kwargs = derive_token_types(module, args, kwargs)
            pools = torch.zeros_like(kwargs["moe_mm_token_type_ids"])
            return args, {**kwargs, "moe_mm_token_type_ids": pools}

        backbone.register_forward_pre_hook(derive, with_kwargs=True, prepend=True)

    monkeypatch.setattr("ernie_align.models.load.install_routing", astray)
    checks = selfcheck(recipe, steps=2)
    assert [check.verdict for check in checks] == ["fail"] + ["not applicable"] * 4
    assert "reached the vision experts" in checks[0].what


def test_what_is_not_the_same_twice_fails(recipe, monkeypatch):
    """Something unseeded in the first run alone; and no precision is good enough."""

    class Restless(selfcheck.VisionTokenCounter):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            unseeded = torch.Generator()
            unseeded.seed()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 1e-3 * torch.randn(parameter.shape, generator=unseeded)

    monkeypatch.setattr(selfcheck, "RoutedCounter", Restless)
    monkeypatch.setattr(room, "DRIFT", 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = {check.name: check for check in selfcheck(recipe, steps=2, processes=2)}
    assert [found[name].verdict for name in NAMES] == ["pass", "fail", "fail", "fail", "fail"]
    assert "tensors differ, by" in found["repeat"].what and "the loss differs from step 1 on" in found["repeat"].what
    assert "2 processes do not come to the end" in found["processes"].what


def test_a_counter_tells_tokens_that_went_astray():
    counter = selfcheck.VisionTokenCounter()
    assert counter.verdict()[0] == "not applicable"
    counter.has_pools = True
    assert counter.verdict() == ("not applicable", "no image in the rows of these steps")
    counter.tokens, counter.forwards, counter.reached = (
        6,
        1,
        {"layers.1.mlp.vision_moe": 6, "layers.2.mlp.vision_moe": 5},
    )
    assert counter.verdict() == ("fail", "6 vision tokens, of which 5 reached layers.2.mlp.vision_moe")
