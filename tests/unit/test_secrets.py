"""Tokens and passwords are rejected in a recipe, hidden in errors, and absent from a run directory."""

from __future__ import annotations

import pytest
import yaml

from ernie_align.errors import Fault, RecipeError, is_secret_key, redact
from ernie_align.runs import load_recipe
from tests.support.runs import ROOT, recipe_of, run_quietly

SECRET = "s3cr3tW0rdThatNobodyMaySee"


@pytest.fixture
def recipe(tmp_path):
    return recipe_of("upo", tmp_path, tmp_path / "rows.jsonl", tmp_path / "run", upo={"kl_weight": 0.0}) | {
        "adapter": {"scopes": ["attention"]},
        "rewards": [{"name": "judge", "url": "http://localhost:8000/v1", "model": "m", "rubric": "truth"}],
    }


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda r: r["rewards"][0].update(url=f"https://me:{SECRET}@host/v1"), "rewards[0].url"),
        (lambda r: r["rewards"][0].update(url=f"https://host/v1?api_key={SECRET}"), "rewards[0].url"),
        (lambda r: r["data"]["train"][0].update(path=f"https://h/a.jsonl?X-Amz-Signature={SECRET}"), "train[0].path"),
        (lambda r: r["model"].update(revision=f"hf_{SECRET}"), "model.revision"),
        (lambda r: r["training"].update(hub_token=SECRET), "training.hub_token"),
        (lambda r: r["training"].update(run_name=f"Bearer {SECRET}"), "training.run_name"),
        (lambda r: r["rewards"].append({"name": "a.py:f", "args": {"api_key": SECRET}}), "rewards[1].args.api_key"),
    ],
)
def test_a_secret_in_a_recipe_is_rejected_with_its_place(recipe, tmp_path, change, where):
    change(recipe)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert SECRET not in str(caught.value)
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if SECRET in text)
    (fault,) = caught.value.faults
    assert fault.where.startswith(f"{path}:{line}:") and fault.where.endswith(where)


def test_secrets_in_comments_and_overrides_are_rejected(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe) + f"# key: hf_{SECRET}\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: an API token, in a comment") as caught:
        load_recipe(path)
    assert SECRET not in str(caught.value)
    with pytest.raises(RecipeError, match=r"command line: training\.hub_token: a secret") as caught:
        load_recipe(recipe, overrides=[f"training.hub_token={SECRET}"])
    assert SECRET not in str(caught.value)


def test_messages_of_other_libraries_are_shown_without_secrets(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", SECRET)
    text = str(
        Fault(
            "here",
            f"401 for {SECRET}",
            why=f"GET https://u:{SECRET[:9]}@h/x?token=abcd1234&a=1",
            fix="Bearer " + SECRET,
        )
    )
    assert SECRET[:9] not in text and "abcd1234" not in text
    assert "GET https://u:***@h/x?token=***&a=1" in text and "401 for ***" in text


@pytest.mark.parametrize(
    "text",
    [
        "step 3: the loss is nan",
        "runs/a:b@c/x.jsonl",
        "http://localhost:8000/v1",
        "C:\\rows",
        "sk-learn",
        "a?b=c",
        "hf_hub",
    ],
)
def test_plain_words_are_not_hidden(text):
    assert redact(text) == text


def test_keys_of_secrets_are_recognized():
    assert all(
        map(is_secret_key, ("token", "hub_token", "HF_TOKEN", "api_key", "OPENAI_API_KEY", "password", "secret"))
    )
    plain = ("api_key_env", "pad_token", "eos_token", "image_token", "max_tokens", "monkey", "key", "tokenizer")
    assert not any(map(is_secret_key, plain))


def test_no_shipped_recipe_is_rejected():
    from ernie_align.recipe.document import parse_document, reject_secrets

    for path in ROOT.glob("recipes/**/*.yaml"):
        reject_secrets(parse_document(path.read_text(), str(path)))


def test_a_run_directory_holds_no_secret_of_the_environment(checkpoints, text_rows, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    recipe = recipe_of("lora", checkpoints["dense"], text_rows, tmp_path / "run")
    recipe["training"] |= {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "report_to": ["tensorboard"]}
    run_quietly(recipe)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
