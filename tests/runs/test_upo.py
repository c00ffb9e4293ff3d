"""UPO: rollouts, rewards and preference in one loop, on images and text, against TRL and against arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ernie_align import losses
from ernie_align.errors import ModelError, RecipeError, RunError
from ernie_align.models.routing import mm_token_type_ids
from ernie_align.models.token_dispatch import count_routed_tokens, find_expert_pools
from ernie_align.runs import load_recipe, set_up
from tests.support.runs import FAMILIES, beside, logged, recipe_of, run_quietly, stopped_after, tensors_of, write_rows

BOTH_POOLS = {"scopes": ["attention", "text_experts", "vision_experts"], "rank": 4, "alpha": 8}
SCOPES = {"dense": ["attention", "dense_mlp"], "moe": ["attention", "text_experts"], "vl_moe": BOTH_POOLS["scopes"]}

# A tiny model with random weights is right about nothing, but its answers hold some letters and not others.
REWARDS = [
    {"name": "contains", "text": "e", "label": "has_e", "weight": 1.0},
    {"name": "contains", "text": "a", "label": "has_a", "weight": 0.3},
]
NO_FILTER = {"always_right": False, "always_wrong": False, "refills": 0}


@pytest.fixture(scope="module")
def mixed_prompts(digits, tmp_path_factory):
    """Questions with two images, with one and with none."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = [json.loads(line) for line in (digits / "prompts.jsonl").read_text().splitlines()[:60]]
    chosen = [next(row for row in rows if len(row.get("images", [])) == count) for count in (2, 1, 0)]
    chosen += [row for row in rows if row not in chosen][:9]
    for row in chosen:
        row["images"] = beside(folder, digits, row.get("images", []))
    return write_rows(folder / "mixed-prompts.jsonl", chosen)


@pytest.fixture(scope="module")
def text_prompts(tmp_path_factory):
    from ernie_align.tiny.tokenizer import NUMBERS

    def row(number):
        question = f"What is {NUMBERS[number % 19]} plus {NUMBERS[(3 * number) % 19]}?"
        return {"prompt": [{"role": "user", "content": question}], "kind": ("even", "odd")[number % 2]}

    return write_rows(tmp_path_factory.mktemp("text") / "text-prompts.jsonl", [row(number) for number in range(12)])


@pytest.fixture(scope="module")
def image_run(checkpoints, mixed_prompts, tmp_path_factory):
    """The recipe of a finished run of two steps on prompts with images. Several tests read its folder."""
    blocks = {
        "upo": {"temperature": 0.7, "completions_steps": 1},
        "training": {"gradient_checkpointing": True, "learning_rate": 1e-2},
    }
    recipe = upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path_factory.mktemp("image-run") / "run", **blocks)
    run_quietly(recipe)
    return recipe


def upo_recipe(checkpoints, family, rows, run_dir, **blocks):
    recipe = recipe_of("upo", checkpoints[family], rows, run_dir)
    recipe["rewards"] = REWARDS
    recipe["adapter"] = {**BOTH_POOLS, "scopes": SCOPES[family]}
    recipe["upo"] = {"num_generations": 4, "max_completion_length": 6, "filter": NO_FILTER}
    recipe["training"] |= {"per_device_train_batch_size": 12, "max_steps": 2}
    for name, values in blocks.items():
        recipe[name] = {**recipe.get(name, {}), **values} if isinstance(values, dict) else values
    return {name: block for name, block in recipe.items() if block is not None}


def make_trainer(recipe):
    """The trainer of a recipe, before its first step."""
    from ernie_align.runs.prepare import prepare_data
    from ernie_align.runs.train import load_for_training

    setup = set_up(load_recipe(recipe))
    config = setup.stage.configure(setup.recipe, setup.recipe.run.dir)
    data = prepare_data(setup)
    bundle = load_for_training(setup, None)
    trainer = setup.stage.build_trainer(setup.recipe, config, bundle, data, [])
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def move_from_reference(model):
    """Give the adapter weights that are not zero, so that the policy differs from its reference."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))


def sample_and_score(trainer, examples):
    """Groups of four completions for each example."""
    groups = trainer.rollouts.sample(examples, 4)
    trainer.rollouts.score(groups, trainer.state, trainer._metrics["train"])
    return groups


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def plain_logps(model, inputs, temperature=1.0):
    """(B, C) log-probs from the model's own logits, computed without any code of the trainer."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **images).logits
    keep = inputs["completion_ids"].shape[1]
    return losses.token_logps(logits / temperature, ids)[:, -keep:]


def test_pairs_alone_are_dpo_on_best_and_worst(checkpoints, mixed_prompts, tmp_path):
    """With images, after the policy has left its reference; at first the loss is log 2."""
    blocks = {"upo": {"policy_weight": 0.0, "kl_weight": 0.0, "preference_weight": 1.0}}
    trainer = make_trainer(upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / "run", **blocks))
    inputs = trainer._prepare_inputs(first_batch(trainer))
    assert len(inputs["pairs"]) >= 2
    assert trainer._compute_loss(trainer.model, inputs).item() == pytest.approx(math.log(2), abs=1e-6)

    move_from_reference(trainer.model)
    with torch.no_grad():
        found = trainer._compute_loss(trainer.model, inputs)
        trainer.model.eval()
        mask = inputs["completion_mask"]
        policy = (plain_logps(trainer.model, inputs) * mask).sum(dim=1)
        with trainer.model.disable_adapter():
            reference = (plain_logps(trainer.model, inputs) * mask).sum(dim=1)
    best, worst = inputs["pairs"].T
    ratios = policy - reference
    expected = losses.dpo_sigmoid(ratios[best], ratios[worst], beta=0.1).mean()
    assert abs(expected.item() - math.log(2)) > 1e-3
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_pairs_are_best_and_worst_by_reward(checkpoints, mixed_prompts, tmp_path):
    trainer = make_trainer(upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / "run"))
    inputs = trainer._prepare_inputs(first_batch(trainer))
    texts = [
        trainer.rollouts.decode(ids[:n].tolist())
        for ids, n in zip(inputs["completion_ids"], inputs["completion_mask"].sum(1), strict=True)
    ]
    earned = torch.tensor([1.0 * ("e" in text) + 0.3 * ("a" in text) for text in texts])
    groups = earned.view(3, 4)
    for number, (best, worst) in enumerate(inputs["pairs"].tolist()):
        assert best // 4 == worst // 4, "both sides answer one prompt"
        own = earned[best // 4 * 4 : best // 4 * 4 + 4]
        assert earned[best] == own.max() and earned[worst] == own.min() and earned[best] > earned[worst], number
    assert len(inputs["pairs"]) == int((groups.max(dim=1).values > groups.min(dim=1).values).sum())


def test_without_preference_it_is_trls_grpo_on_the_same_rollouts(checkpoints, text_prompts, tmp_path):
    """TRL's own trainer scores, normalizes and learns from the completions that ours sampled: loss and gradients."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    blocks = {"upo": {"preference_weight": 0.0, "kl_weight": 0.3, "normalize_rewards": "group"}}
    ours = make_trainer(upo_recipe(checkpoints, "dense", text_prompts, tmp_path / "run", **blocks))
    move_from_reference(ours.model)  # otherwise the KL term is zero
    inputs = ours._prepare_inputs(first_batch(ours))
    loss = ours._compute_loss(ours.model, inputs)
    loss.backward()

    lengths = zip(inputs["prompt_mask"].sum(1).tolist(), inputs["completion_mask"].sum(1).tolist(), strict=True)
    rows = list(zip(inputs["prompt_ids"].tolist(), inputs["completion_ids"].tolist(), lengths, strict=True))
    drawn = {
        "prompt_ids": [prompt[-p:] for prompt, _, (p, _) in rows],
        "completion_ids": [answer[:c] for _, answer, (_, c) in rows],
        "logprobs": None,
    }
    config = GRPOConfig(
        str(tmp_path / "stock"),
        per_device_train_batch_size=12,
        num_generations=4,
        max_completion_length=6,
        beta=0.3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )

    def has(letter):
        return lambda completions, **_: [float(letter in text) for text in completions]

    stock_model = make_trainer(upo_recipe(checkpoints, "dense", text_prompts, tmp_path / "other", **blocks)).model
    weights = dict(ours.model.named_parameters())
    with torch.no_grad():
        for name, weight in stock_model.named_parameters():
            weight.copy_(weights[name])
    stock = GRPOTrainer(
        stock_model,
        [has("e"), has("a")],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "?"}] * 3),
        processing_class=ours.processing_class,
        rollout_func=lambda prompts, trainer: drawn,
    )
    # TRL would use a copy of the adapter as the reference; ours is the model without adapters
    stock.model.delete_adapter("ref")
    stock.reward_weights = torch.tensor([1.0, 0.3])
    stock.current_gradient_accumulation_steps = 1
    stock.model.train()
    theirs = stock._compute_loss(stock.model, stock._generate_and_score_completions([{"prompt": "?"}] * 12))
    theirs.backward()
    assert abs(loss.item()) > 1e-4
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-6)
    gradients = {name: weight.grad for name, weight in stock.model.named_parameters() if weight.grad is not None}
    own = {name: weight.grad for name, weight in ours.model.named_parameters() if weight.grad is not None}
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        # float32 sums in another order of rows and padding
        torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-4)


def test_every_forward_routes_the_same_vision_tokens(checkpoints, mixed_prompts, tmp_path):
    """Rollout, reference and policy: 4 placeholders, a start and an end for each image of each completion."""
    trainer = make_trainer(upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / "run"))
    trainer.state.logging_steps = 0
    trainer.state.global_step = 1  # not the first step, which also compares rollout and training
    batch = first_batch(trainer)
    expected = sum(6 * len(example["media"]) for example in batch)
    assert expected > 0
    with count_routed_tokens(find_expert_pools(trainer.model)) as seen:
        inputs = trainer._prepare_inputs(batch)
        assert {*seen.vision.values()} == {2 * expected}
        trainer._compute_loss(trainer.model, inputs)
        assert {*seen.vision.values()} == {3 * expected}


@pytest.mark.parametrize("family", ["vl_moe", "dense"])
def test_an_image_is_encoded_once_for_all_completions_of_a_rollout(
    family, checkpoints, mixed_prompts, text_prompts, tmp_path
):
    """The completions are the same as when it is encoded for each of them."""
    rows = mixed_prompts if family == "vl_moe" else text_prompts
    trainer = make_trainer(upo_recipe(checkpoints, family, rows, tmp_path / "run"))
    examples = first_batch(trainer)[::4]
    trainer.model.eval()
    encoded, given = [], []
    if family == "vl_moe":
        tower = trainer.model.get_base_model().model.vision_tower
        tower.patch_embed.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    generate = trainer.rollouts.generate
    trainer.rollouts.generate = lambda *args: given.append(args) or generate(*args)
    with torch.no_grad():
        torch.manual_seed(0)
        once = [ids for group in trainer.rollouts.sample(examples, 4) for ids in group.completion_ids]
        torch.manual_seed(0)
        assert generate(*given[0])[0] == once
    images = 16 * sum(len(example["media"]) for example in examples)  # of 4 x 4 patches each
    assert encoded == ([images, 4 * images] if family == "vl_moe" else [])


@pytest.mark.parametrize("when", ["rollout", "loss"])
def test_lost_routing_stops_the_run(when, checkpoints, mixed_prompts, tmp_path):
    trainer = make_trainer(upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / "run"))
    backbone = trainer.model.get_base_model().model
    batch = first_batch(trainer)
    inputs = trainer._prepare_inputs(batch) if when == "loss" else None
    backbone._forward_pre_hooks.clear()

    def all_are_text(module, args, kwargs):
        ids = kwargs["input_ids"]
        places = mm_token_type_ids(ids, trainer.rollouts.modality)
        return args, {**kwargs, "mm_token_type_ids": places, "moe_mm_token_type_ids": torch.zeros_like(ids)}

    backbone.register_forward_pre_hook(all_are_text, with_kwargs=True)
    with pytest.raises(ModelError, match="reached the vision experts"):
        if when == "loss":
            trainer._compute_loss(trainer.model, inputs)
        else:
            trainer._prepare_inputs(batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_recomputes_what_the_rollout_sampled(family, checkpoints, text_prompts, tmp_path, request):
    """Log-probs of the rollout and of the loss agree, and so do the experts, at a temperature other than 1."""
    run_dir = tmp_path / "run"
    if family == "vl_moe":
        run_dir = Path(request.getfixturevalue("image_run")["run"]["dir"])
    else:
        blocks = {"upo": {"temperature": 0.7}, "training": {"gradient_checkpointing": True}}
        run_quietly(upo_recipe(checkpoints, family, text_prompts, run_dir, **blocks))
    apart = logged(run_dir, "rollout/logps_apart")
    assert len(apart) == 2 and max(apart) < 1e-4  # float32, with a cache and without one
    if family != "dense":
        assert set(logged(run_dir, "routing/flips_text")) == {0.0}
    if family == "vl_moe":
        assert set(logged(run_dir, "routing/flips_vision")) == {0.0}


def test_no_rollout_holds_a_modality_token(checkpoints, mixed_prompts, tmp_path):
    """Even if modality tokens have the largest logits."""
    trainer = make_trainer(upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / "run"))
    ids = sorted(trainer.rollouts.modality.ids)

    def prefer_modality_tokens(module, args, kwargs, output):
        if "labels" not in kwargs:
            output.logits[..., ids] += 100.0

    trainer.model.get_base_model().register_forward_hook(prefer_modality_tokens, with_kwargs=True)
    inputs = trainer._prepare_inputs(first_batch(trainer))
    assert not torch.isin(inputs["completion_ids"], torch.tensor(ids)).any()


def test_small_batches_add_up_to_a_large_one(checkpoints, mixed_prompts, tmp_path):
    """One rollout of 24 as one batch, and as six batches of four in one optimizer step: the same gradient."""
    gradients = []
    for size, steps in ((24, 1), (4, 6)):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        recipe = upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / str(size), training=training)
        recipe["upo"] |= {"preference_weight": 1.0, "kl_weight": 0.3}
        trainer = make_trainer(recipe)
        move_from_reference(trainer.model)
        torch.manual_seed(0)
        for batch, _ in zip(trainer.get_train_dataloader(), range(steps), strict=False):
            inputs = trainer._prepare_inputs(batch)
            trainer._compute_loss(trainer.model, inputs).backward()
            trainer._step += 1
        gradients.append({n: w.grad for n, w in trainer.model.named_parameters() if w.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # float32 sums in another order
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-6, rtol=1e-3)


def test_two_runs_with_one_seed_are_equal(image_run, tmp_path):
    from datasets import load_dataset

    folders = [Path(image_run["run"]["dir"]), tmp_path / "again"]
    run_quietly({**image_run, "run": {"dir": str(folders[1])}})
    tables = [
        load_dataset("parquet", data_files=str(folder / "completions" / "*.parquet"), split="train").to_list()
        for folder in folders
    ]
    assert tables[0] == tables[1] and len(tables[0]) == 24
    assert logged(folders[0]) == logged(folders[1])
    first, second = (tensors_of(folder / "final") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    columns = {"row", "domain", "prompt", "completion", "reward/has_e", "reward", "advantage", "side"}
    assert columns <= tables[0][0].keys()


MODES = {
    "rollouts": {},
    "within a rollout": {  # of four steps
        "training": {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2},
    },
    "dataset": {"upo": {"pairs": "dataset", "pairs_data": [{"path": "PAIRS", "limit": 8}], "pairs_batch_size": 2}},
    "full, dataset, no reference model": {
        "adapter": None,
        "tune": {"scopes": ["attention"]},
        "upo": {
            "pairs": "dataset",
            "pairs_data": [{"path": "PAIRS", "limit": 8}],
            "pairs_batch_size": 2,
            "kl_weight": 0.0,
        },
    },
    "full": {"adapter": None, "tune": {"scopes": ["attention", "vision_experts"]}},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_equals_an_uninterrupted_one(mode, checkpoints, digits, mixed_prompts, tmp_path):
    """Sampler, random state, refills and pairs continue where they were, into the second epoch."""
    blocks = json.loads(json.dumps(MODES[mode]).replace("PAIRS", str(digits / "preferences-val.jsonl")))
    runs = []
    for name in ("whole", "again"):
        recipe = upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / name, **blocks)
        recipe["upo"]["filter"] = {"min_group_std": 0.2, "always_wrong": False, "refills": 1}
        recipe["training"] |= {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "learning_rate": 5e-3}
        runs.append(recipe)
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_quietly(runs[0])
    stopped_after(3, whole, again)
    run_quietly(runs[1], resume=True)
    for key in ("loss", "grad_norm", "reward", "completions/mean_length", "filter/drawn"):
        assert logged(again, key) == logged(whole, key)
    expected, found = tensors_of(whole / "final"), tensors_of(again / "final")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_offline_pairs_are_dpo_next_to_the_rollouts(checkpoints, digits, mixed_prompts, tmp_path):
    """Each pair once per epoch; the first loss is log 2; reference log-probs are computed once and stored."""
    pairs = digits / "preferences-val.jsonl"
    offline = {"pairs": "dataset", "pairs_data": [{"path": str(pairs), "limit": 6}], "pairs_batch_size": 3}
    blocks = {"upo": {**offline, "policy_weight": 0.0, "kl_weight": 0.0, "preference_weight": 0.5}}
    trainer = make_trainer(upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / "run", **blocks))
    inputs = trainer._prepare_inputs(first_batch(trainer))
    assert "ref_per_token_logps" not in inputs, "not needed"
    assert trainer._compute_loss(trainer.model, inputs).item() == pytest.approx(0.5 * math.log(2), abs=1e-6)
    drawn = trainer.pairs["pairs"]
    rounds = [
        sorted(tuple(row) for n in (2 * r, 2 * r + 1) for row in drawn.batch(n, 3)["rows"].tolist()) for r in (0, 1)
    ]
    assert rounds[0] == rounds[1] and len(set(rounds[0])) == 6
    assert (tmp_path / "run" / "reference" / "pairs.safetensors").exists()


def test_held_out_pairs_are_measured_at_each_evaluation(checkpoints, digits, mixed_prompts, tmp_path):
    held_out = [{"path": str(digits / "preferences-val.jsonl"), "limit": 6}]
    recipe = upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / "run", upo={"pairs_eval": held_out})
    recipe["data"]["eval"] = [{"path": str(mixed_prompts), "limit": 3}]
    recipe["training"] |= {
        "num_generations_eval": 1,
        "per_device_eval_batch_size": 3,
        "learning_rate": 0.0,
        "max_steps": 1,
    }
    result = run_quietly(recipe)
    # the learning rate is 0: what remains is float32 rounding in batches of another width
    assert result.metrics["eval_held_out/margin"] == pytest.approx(0.0, abs=1e-6)
    assert {"eval_reward", "eval_rewards/has_e", "eval_loss"} <= result.metrics.keys()


@pytest.mark.parametrize("mode", ["continued adapter", "full"])
def test_the_reference_is_the_model_that_the_run_began_with(mode, checkpoints, mixed_prompts, tmp_path, request):
    """No KL at the first step, some after it; the frozen copy is not saved."""
    blocks = {"adapter": None, "tune": {"scopes": "all"}} if mode == "full" else {}
    recipe = upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / "run", **blocks)
    if mode == "continued adapter":
        recipe["model"]["name"] = request.getfixturevalue("image_run")["run"]["dir"]
        del recipe["adapter"]
    recipe["training"]["learning_rate"] = 1e-2
    run_quietly(recipe)
    kl = logged(tmp_path / "run", "kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-9) and kl[1] > 1e-6
    assert not (tmp_path / "run" / "final" / "ref").exists()


def test_zero_advantage_groups_are_replaced_counted_and_have_no_effect(checkpoints, mixed_prompts, tmp_path):
    """With a reward of 1 for every answer all groups are filtered, others sampled, and the rest has no gradient."""
    recipe = upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / "run", upo={"filter": {"refills": 2}})
    recipe["training"]["max_steps"] = 1
    recipe["rewards"] = [{"name": "format", "pattern": ".*", "match": "search"}]
    recipe["upo"]["kl_weight"] = 0.0
    run_quietly(recipe)
    assert logged(tmp_path / "run", "filter/always_right") == [9.0]  # three groups, sampled three times
    assert logged(tmp_path / "run", "filter/unfilled") == [3.0]
    assert logged(tmp_path / "run", "grad_norm") == [0.0]


def test_a_reward_that_raises_names_the_function_the_prompt_and_the_completion(checkpoints, text_prompts, tmp_path):
    code = tmp_path / "mine.py"
    code.write_text("def picky(prompts, completions, **columns):\n    raise KeyError('oops')\n")
    recipe = upo_recipe(checkpoints, "dense", text_prompts, tmp_path / "run")
    recipe["rewards"] = [{"name": f"{code}:picky"}]
    with pytest.raises(RunError) as error:
        run_quietly(recipe)
    text = str(error.value)
    assert "picky" in text and "oops" in text and "What is" in text and "completion" in text


def test_rewards_are_normalized_within_their_domain(checkpoints, text_prompts, tmp_path):
    """A domain whose rewards are a hundred times larger weighs no more than the other."""
    code = tmp_path / "mine.py"
    code.write_text(
        "def loud(prompts, completions, kind, **columns):\n"
        "    length = [len(c[-1]['content']) for c in completions]\n"
        "    return [n * (100.0 if k == 'odd' else 1.0) for n, k in zip(length, kind)]\n"
    )
    sizes = {}
    for how in ("per_domain", "none"):
        blocks = {"upo": {"domain_column": "kind", "normalize_rewards": how, "max_completion_length": 12}}
        recipe = upo_recipe(checkpoints, "dense", text_prompts, tmp_path / how, **blocks)
        recipe["rewards"] = [{"name": f"{code}:loud"}]
        recipe["training"]["per_device_train_batch_size"] = 48
        trainer = make_trainer(recipe)
        batch = first_batch(trainer)
        odd = torch.tensor(["odd" in example["columns"] for example in batch])
        advantages = trainer._prepare_inputs(batch)["advantages"].abs()
        sizes[how] = (advantages[odd].mean() / advantages[~odd].mean()).item()
    assert 0.5 < sizes["per_domain"] < 2 and sizes["none"] > 50


@pytest.mark.parametrize(
    ("block", "values", "what"),
    [
        ("training", {"per_device_train_batch_size": 6}, "not a multiple of upo.num_generations 4"),
        ("training", {"beta": 0.1}, "set upo.kl_weight"),
        ("training", {"num_generations_eval": 3}, "not a multiple of 3 generations"),
        ("upo", {"pairs": "dataset"}, "list preference rows as pairs_data"),
        ("upo", {"pairs": "none", "preference_weight": 0.1}, "but pairs is none"),
        ("upo", {"policy_weight": 0.0, "preference_weight": 0.0}, "both 0"),
        ("upo", {"clip": [1.5, 0.2]}, "both sides of 1"),
        ("upo", {"pairs_by": "exact"}, "no reward is named 'exact'"),
        ("upo", {"filter": {"by": "exact"}}, "no reward is named 'exact'"),
        ("rollout", {"engine": "vllm"}, "not installed"),
        ("data", {"streaming": True}, "draw prompts by row number"),
        ("upo", {"pairs_eval": [{"path": "x.jsonl"}]}, "list prompts under data.eval"),
    ],
)
def test_invalid_recipes_are_rejected_before_anything_is_loaded(
    block, values, what, checkpoints, text_prompts, tmp_path
):
    recipe = upo_recipe(checkpoints, "dense", text_prompts, tmp_path / "run", **{block: values})
    if "pairs_eval" not in values:
        recipe["data"]["eval"] = [{"path": str(text_prompts)}]
    with pytest.raises(RecipeError, match=what):
        load_recipe(recipe)


def test_a_pair_needs_an_even_batch(checkpoints, text_prompts, tmp_path):
    blocks = {"upo": {"num_generations": 3}, "training": {"per_device_train_batch_size": 3}}
    with pytest.raises(RecipeError, match="is odd"):
        load_recipe(upo_recipe(checkpoints, "dense", text_prompts, tmp_path / "run", **blocks))


def test_both_expert_pools_learn(image_run):
    weights = tensors_of(Path(image_run["run"]["dir"]) / "final")
    learned = {name for name, tensor in weights.items() if "lora_B" in name and tensor.any()}
    assert any("vision_moe" in name for name in learned) and any("text_moe" in name for name in learned)


def test_a_reward_may_look_at_the_images(checkpoints, mixed_prompts, tmp_path):
    """It receives those of its own row, as PIL images."""
    code = tmp_path / "mine.py"
    code.write_text(
        "def side(prompts, completions, images, **columns):\n"
        "    return [sum(image.size[0] for image in row) for row in images]\n"
    )
    recipe = upo_recipe(checkpoints, "vl_moe", mixed_prompts, tmp_path / "run")
    recipe["rewards"] = [{"name": f"{code}:side"}, *REWARDS]
    trainer = make_trainer(recipe)
    batch = first_batch(trainer)
    groups = sample_and_score(trainer, batch[::4])
    assert [group.scores[0, 0].item() for group in groups] == [56.0 * len(e["media"]) for e in batch[::4]]


def test_a_column_that_no_row_has_is_refused(checkpoints, text_prompts, tmp_path):
    recipe = upo_recipe(checkpoints, "dense", text_prompts, tmp_path / "run")
    recipe["rewards"] = [*REWARDS, {"name": "exact_match", "column": "anwser"}]
    with pytest.raises(RecipeError, match="'anwser', which no row has"):
        run_quietly(recipe)


def test_reasoning_is_separated_from_the_answer(checkpoints, text_prompts, tmp_path):
    """If the prompt opens a thought that the completion never closes, there is no answer to score."""
    recipe = upo_recipe(checkpoints, "vl_moe", text_prompts, tmp_path / "run", data={"thinking": True})
    recipe["rewards"] = [{"name": "contains", "text": "e"}, {"name": "length", "unit": "tokens", "max": 3}]
    trainer = make_trainer(recipe)
    groups = sample_and_score(trainer, first_batch(trainer)[::4])
    messages = [completion[-1] for group in groups for completion in group.completions]
    assert all(message["content"] == "" and message["reasoning_content"] for message in messages)
    assert all((group.scores[:, 0] == 0).all() for group in groups)


def test_a_reward_may_log_as_it_does_under_trl(checkpoints, text_prompts, tmp_path):
    """A metric and a column of the completion log, through TRL's own two arguments."""
    from datasets import load_dataset

    code = tmp_path / "mine.py"
    code.write_text(
        "def long(prompts, completions, log_metric, log_extra, **columns):\n"
        "    sizes = [len(completion[-1]['content']) for completion in completions]\n"
        "    log_metric('longest', max(sizes))\n"
        "    log_extra('size', sizes)\n"
        "    return [float(size) for size in sizes]\n"
    )
    recipe = upo_recipe(checkpoints, "dense", text_prompts, tmp_path / "run", training={"max_steps": 1})
    recipe["rewards"] = [{"name": f"{code}:long"}]
    run_quietly(recipe)
    table = load_dataset("parquet", data_files=str(tmp_path / "run/completions/*.parquet"), split="train")
    assert table["extra/size"] == table["reward"] == [len(text) for text in table["completion"]]
    assert logged(tmp_path / "run", "longest") == [max(table["extra/size"])]


def test_rewards_are_named_as_logs_name_them(checkpoints, text_prompts, tmp_path):
    """The second of a name without a label is name_2, for pairs_by and filter.by too."""
    recipe = upo_recipe(checkpoints, "dense", text_prompts, tmp_path / "run", upo={"pairs_by": "contains_2"})
    recipe["rewards"] = [{"name": "contains", "text": letter} for letter in "ea"]
    trainer = make_trainer(recipe)
    assert [reward.name for reward in trainer.rollouts.rewards] == ["contains", "contains_2"]
    trainer._prepare_inputs(first_batch(trainer))
    with pytest.raises(RecipeError, match="no reward is named 'contains_3'"):
        load_recipe({**recipe, "upo": {**recipe["upo"], "pairs_by": "contains_3"}})
