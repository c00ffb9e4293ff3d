"""Several ranks train as one process does: whatever they see, however they shard the weights, and whoever resumes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.support.multi_process import (
    Launcher,
    make_adapter,
    make_rows,
    max_difference,
    run_case,
    run_dir,
    sample_by_position,
)
from tests.support.runs import logged, stopped_after, tensors_of

pytestmark = pytest.mark.xdist_group("scale")  # the ranks are started once, not by each worker

# What is left of two orders of summation in float32 after four steps, at a loss of 7.
BOUND = 1e-5
RESUMED = ["fsdp2:sft-all", "fsdp2:lora-vision+checkpointing", "ep:sft-all", "ep:lora-vision+checkpointing"]
BFLOAT16 = "fsdp2:sft-all+bfloat16"
CONTINUED = ["fsdp2:lora-adapter+continued", "fsdp2:dpo-adapter+continued"]
CASES = ["sft-all", "dpo-adapter", "upo-adapter", *RESUMED, "fsdp2:upo-adapter+early", *CONTINUED]
CASES.append("fsdp2:dpo-weights")  # its reference is a whole model on each rank, and needs no dummy image
CASES += ["ep:dpo-adapter+continued", "ep:upo-adapter+early", "tp:sft-all"]
# a frozen tower, and embeddings that checkpointing makes to require gradients: ranks with text only must gather the
# same weights as ranks with images
CASES.append("fsdp2:lora-vision_experts+checkpointing")
STEPS = 3
TOKENS = ("eval_loss", "eval_mean_token_accuracy")
PAIRS = ("entropy", "rewards/chosen", "rewards/accuracies", "rewards/margins", "logps/rejected", "logits/chosen")
PAIRS += ("routing/flips_text", "routing/flips_vision")
EVALUATED = {"sft": TOKENS, "dpo": (*TOKENS, *(f"eval_{name}" for name in PAIRS))}


@pytest.fixture(scope="module")
def launcher(checkpoints, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    make_rows(folder, digits)
    with Launcher(folder, checkpoints["vl_moe"], steps=STEPS) as launcher:  # imports while the adapter is trained
        make_adapter(folder, checkpoints["vl_moe"])
        yield launcher


@pytest.fixture(scope="module")
def folder(launcher):
    """Every case on two ranks, which are started once."""
    launcher.launch(2, [*CASES, BFLOAT16])
    return launcher.folder


@pytest.fixture
def one_process(folder, checkpoints, monkeypatch):
    """case -> the run directory of one process, run when it is needed first. Several cases share a run."""
    monkeypatch.setattr(torch, "multinomial", sample_by_position)

    def run(case):
        if not run_dir(case, folder, 1).exists():
            run_case(case, folder, checkpoints["vl_moe"], STEPS)
        return run_dir(case, folder, 1)

    return run


@pytest.fixture
def resumed(folder, checkpoints):
    """(case, step) -> the run directory of one process that has resumed the run of two after that step."""

    def run(case, step):
        again = run_dir(case, folder, 1, resume=True)
        shutil.rmtree(again, ignore_errors=True)
        stopped_after(step, run_dir(case, folder, 2), again)
        run_case(case, folder, checkpoints["vl_moe"], STEPS, resume=True)
        return again

    return run


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process(folder, one_process, case):
    """Images on one and text on the other, text on both, images on both."""
    one, two = one_process(case), run_dir(case, folder, 2)
    assert len(logged(two)) == STEPS
    assert max_difference(one, two) <= BOUND
    if "upo" not in case:
        # of all gradients together; Adam's own division hides their size from the losses
        assert max_difference(one, two, "grad_norm") <= BOUND * max(1, *logged(one, "grad_norm"))
    # seven rows: the last batches are filled up with rows that were counted already
    for key in EVALUATED.get(case.removeprefix("fsdp2:").partition("-")[0], ()):
        assert max_difference(one, two, key) <= BOUND * max(1, *map(abs, logged(one, key)))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("ep:") and "sft" not in case])
def test_adapters_of_sharded_experts_are_sharded(folder, case):
    """Each rank holds half of the rows of every adapter weight, of its gradient and of both its moments: FSDP2 shards
    by rows, and the first of two ranks has the odd one."""
    ranks = [json.loads((run_dir(case, folder, 2) / f"shards-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["shapes"] == ranks[1]["shapes"]
    for rank, held in enumerate(ranks):
        half = [(rows + 1 - rank) // 2 * columns for rows, columns in held["shapes"]]
        assert held["weights"] == half
        # a step without an image leaves vision parts without a gradient
        assert all(elements in (0, expected) for elements, expected in zip(held["gradients"], half, strict=True))
        assert any(held["gradients"]) and held["moments"] == 2 * sum(half)


def test_bfloat16_weights_are_trained_as_float32_copies(folder, one_process):
    """One process does the same with float32 weights under autocast. Routers are float32 anyway."""
    one, two = one_process(BFLOAT16), run_dir(BFLOAT16, folder, 2)
    first = [logged(run)[0] for run in (one, two)]
    assert abs(first[0] - first[1]) <= 2**-5  # the spacing of bfloat16 where the loss is: between 4 and 8
    assert max_difference(one, two) <= 0.1  # then rounding routes tokens to other experts; 9e-2 at most in ten steps
    saved = FileSystemReader(two / f"checkpoint-{STEPS}" / "sharded").read_metadata().state_dict_metadata
    assert all(saved[name].properties.dtype == torch.float32 for name in saved if name.startswith("weights."))
    for name, weight in tensors_of(two / "final").items():
        assert weight.dtype == (torch.float32 if ".gate." in name or "moe_statics" in name else torch.bfloat16), name


def header(folder):
    """Names, dtypes, shapes, order and metadata: all of a safetensors file but its numbers."""
    (file,) = folder.glob("*model.safetensors")
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


@pytest.mark.parametrize("case", RESUMED)
def test_one_process_resumes_the_run_of_two(folder, resumed, case):
    """From a checkpoint of sharded weights and moments. The final weights differ only by rounding in training."""
    again = resumed(case, 2)
    assert max_difference(run_dir(case, folder, 2), again) <= BOUND
    assert header(again / "final") == header(run_dir(case, folder, 2) / "final")
    assert (again / "final" / "config.json").exists() != (":lora" in case)


def test_four_ranks_resume_the_runs_of_others(folder, launcher, one_process):
    """From shards of two ranks, and from one rank, whose optimizer has no separate group for distributed experts.

    One rank writes its adapter and moments unsharded, and each of four ranks takes its shard.
    """
    sharded, expert_parallel, adapter = "fsdp2:sft-all", "ep:sft-all", "ep:lora-vision+checkpointing"
    replicated = "hsdp:sft-all"  # over two machines with two ranks each
    started = {
        sharded: run_dir(sharded, folder, 2),
        expert_parallel: one_process(expert_parallel),
        adapter: one_process(adapter),
        replicated: run_dir(sharded, folder, 2),
    }
    for case, run in started.items():
        stopped_after(2, run, run_dir(case, folder, 4, resume=True))
    launcher.launch(4, list(started), resume=True)
    for case in started:
        of_two = run_dir(sharded if case == replicated else case, folder, 2)
        assert max_difference(of_two, run_dir(case, folder, 4, resume=True)) <= BOUND


@pytest.mark.parametrize("case", [*RESUMED, *CONTINUED])
def test_two_ranks_write_the_files_of_one_process(folder, resumed, case):
    """Resumed after its last step, one process reads the shards, has nothing left to train, and writes."""
    one, two = (
        {path.name: path.read_bytes() for path in (run / "final").iterdir()}
        for run in (resumed(case, STEPS), run_dir(case, folder, 2))
    )
    assert one == two
