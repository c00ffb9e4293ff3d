"""Several processes train as one does: whatever they see, however they share the weights, and whoever goes on."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from ernie_align import export
from tests.support import multi_process as scale_cases
from tests.support.multi_process import apart, goes_on, run_case, run_dir
from tests.support.runs import logged, stopped_after, tensors_of

pytestmark = pytest.mark.xdist_group("scale")  # processes are started once, not by each worker

# What is left of two orders of summation in float32 after four steps, at a loss of 7.
BOUND = 1e-5
RESUMED = ["fsdp2:sft-all", "fsdp2:lora-vision+checkpointing", "ep:sft-all", "ep:lora-vision+checkpointing"]
BFLOAT16 = "fsdp2:sft-all+bfloat16"
CONTINUED = ["fsdp2:lora-adapter+continued", "fsdp2:dpo-adapter+continued"]
CASES = ["sft-all", "dpo-adapter", "upo-adapter", *RESUMED, "fsdp2:upo-adapter+early", *CONTINUED]
CASES.append("fsdp2:dpo-weights")  # its reference is whole on each process, and touches nothing
CASES += ["ep:dpo-adapter+continued", "ep:upo-adapter+early", "tp:sft-all"]
# a frozen tower, and embeddings that checkpointing makes to require gradients: text must fetch no more than images
CASES.append("fsdp2:lora-vision_experts+checkpointing")
STEPS = 3
TOKENS = ("eval_loss", "eval_mean_token_accuracy")
PAIRS = ("entropy", "rewards/chosen", "rewards/accuracies", "rewards/margins", "logps/rejected", "logits/chosen")
PAIRS += ("routing/flips_text", "routing/flips_vision")
EVALUATED = {"sft": TOKENS, "dpo": (*TOKENS, *(f"eval_{name}" for name in PAIRS))}


@pytest.fixture(scope="module")
def folder(checkpoints, digits, tmp_path_factory):
    """Every case on two processes, which are started once."""
    folder = tmp_path_factory.mktemp("scale")
    scale_cases.make_rows(folder, digits)
    scale_cases.make_adapter(folder, checkpoints["vl_moe"])
    scale_cases.launch(folder, checkpoints["vl_moe"], 2, [*CASES, BFLOAT16], steps=STEPS)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(folder, checkpoints, case, monkeypatch):
    """Images on one and text on the other, text alone on both, images alone on both."""
    monkeypatch.setattr(torch, "multinomial", scale_cases.draw_by_place)
    run_case(case, folder, checkpoints["vl_moe"], STEPS)
    assert len(logged(run_dir(case, folder, 2))) == STEPS
    one, two = run_dir(case, folder, 1), run_dir(case, folder, 2)
    assert apart(one, two) <= BOUND
    if "upo" not in case:
        # of all gradients together; Adam's own division hides their size from the losses
        assert apart(one, two, "grad_norm") <= BOUND * max(1, *logged(one, "grad_norm"))
    # seven rows: the last batches are filled up with rows that were counted already
    for key in EVALUATED.get(case.removeprefix("fsdp2:").partition("-")[0], ()):
        assert apart(one, two, key) <= BOUND * max(1, *map(abs, logged(one, key)))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("ep:") and "sft" not in case])
def test_adapters_on_dealt_out_experts_are_spread(folder, case):
    """Each process holds half of the rows of every adapter weight, of its gradient and of both its moments: FSDP2 cuts
    by rows, and the first of two has the odd one."""
    held = [json.loads((run_dir(case, folder, 2) / f"held-{rank}.json").read_text()) for rank in range(2)]
    assert held[0]["whole"] == held[1]["whole"]
    for rank, process in enumerate(held):
        half = [(rows + 1 - rank) // 2 * columns for rows, columns in process["whole"]]
        assert process["weights"] == half
        # a step without an image leaves vision parts without a gradient
        assert all(found in (0, own) for found, own in zip(process["gradients"], half, strict=True))
        assert any(process["gradients"]) and process["moments"] == 2 * sum(half)


def test_bfloat16_weights_are_trained_as_float32_copies(folder, checkpoints):
    """One process does the same with float32 weights under autocast. Routers are float32 anyhow."""
    run_case(BFLOAT16, folder, checkpoints["vl_moe"], STEPS)
    one, two = run_dir(BFLOAT16, folder, 1), run_dir(BFLOAT16, folder, 2)
    first = [logged(run)[0] for run in (one, two)]
    assert abs(first[0] - first[1]) <= 2**-5  # the spacing of bfloat16 where the loss is: between 4 and 8
    assert apart(one, two) <= 0.1  # then tokens turn to other experts by rounding; in ten steps it was 9e-2 at most
    kept = FileSystemReader(two / f"checkpoint-{STEPS}" / "sharded").read_metadata().state_dict_metadata
    assert all(kept[name].properties.dtype == torch.float32 for name in kept if name.startswith("weights."))
    for name, weight in tensors_of(two / "final").items():
        assert weight.dtype == (torch.float32 if ".gate." in name or "moe_statics" in name else torch.bfloat16), name


def header(folder):
    """Names, dtypes, shapes, order and metadata: all of a safetensors file but its numbers."""
    (file,) = folder.glob("*model.safetensors")
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


@pytest.mark.parametrize("case", RESUMED)
def test_one_process_goes_on_where_two_stopped(folder, checkpoints, case):
    """From a checkpoint of sharded weights and moments. What both write differs by rounding of the training alone."""
    again = goes_on(case, folder, checkpoints["vl_moe"], STEPS, after=2, processes=1)
    assert apart(run_dir(case, folder, 2), again) <= BOUND
    assert header(again / "final") == header(run_dir(case, folder, 2) / "final")
    assert (again / "final" / "config.json").exists() != (":lora" in case)


def test_four_processes_go_on_where_others_stopped(folder, checkpoints):
    """Two, of shards, and one: dealt-out experts are elsewhere in its optimizer, and a group of their own in that of
    four; its adapter and moments are whole, and four take their part."""
    sharded, dealt_out, adapter = "fsdp2:sft-all", "ep:sft-all", "ep:lora-vision+checkpointing"
    for case, begun in ((sharded, 2), (dealt_out, 1), (adapter, 1)):
        if not run_dir(case, folder, begun).exists():
            run_case(case, folder, checkpoints["vl_moe"], STEPS)
        stopped_after(2, run_dir(case, folder, begun), run_dir(case, folder, 4, resume=True))
    replicated = "hsdp:sft-all"  # over two machines of two
    stopped_after(2, run_dir(sharded, folder, 2), run_dir(replicated, folder, 4, resume=True))
    cases = [sharded, dealt_out, adapter, replicated]
    scale_cases.launch(folder, checkpoints["vl_moe"], 4, cases, steps=STEPS, resume=True)
    for case in cases:
        same = sharded if case == replicated else case
        assert apart(run_dir(same, folder, 2), run_dir(case, folder, 4, resume=True)) <= BOUND


@pytest.mark.parametrize("case", [*RESUMED, *CONTINUED])
def test_two_processes_write_what_one_writes(folder, checkpoints, case, tmp_path):
    """Gone on with after its last step, one process reads the shards, has nothing left to train, and writes."""
    one = goes_on(case, folder, checkpoints["vl_moe"], STEPS, after=STEPS, processes=1) / "final"
    two = run_dir(case, folder, 2) / "final"
    assert bytes_of(one) == bytes_of(two)
    if case.endswith(":lora-vision+checkpointing"):
        merged = [export(final, to=tmp_path / name).folder for final, name in ((one, "one"), (two, "two"))]
        weights = [bytes_of(folder, ".safetensors") for folder in merged]
        assert weights[0] and weights[0] == weights[1]


def bytes_of(folder, ending=""):
    """Every file, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.endswith(ending)}
