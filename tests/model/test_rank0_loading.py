"""Rank 0 loads the weights; no other rank ever holds the full model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.loading import MODES, load_sharded, run_processes
from ernie_align.models.architecture import Architecture

pytestmark = pytest.mark.xdist_group("scale")  # processes are started by one worker


@pytest.mark.parametrize("way", MODES)
def test_only_rank_0_holds_the_full_model(checkpoints, way):
    """Peak memory of torch from loading until the model is sharded over two ranks.

    The first way, in which every rank loads, shows that the measurement detects a full model.
    """
    model = checkpoints["vl_moe"]
    architecture = Architecture.from_config(json.loads((model / "config.json").read_text()))
    full = 4 * architecture.size  # bytes, in float32
    largest = 4 * max(tensor.size for tensor in architecture.tensors)
    first, second = run_processes(model, way, 2, module="tests.model.test_rank0_loading")
    if way == MODES[0]:
        assert second >= full
    else:
        # its half, one full weight at a time with the shard cut from it, and a twentieth for pixel tables and the
        # padding of FSDP2
        assert second <= (0.5 + 0.05) * full + 2 * largest
    assert first >= full / 2


@pytest.mark.parametrize("family", ["dense", "moe", "vl_moe"])
def test_other_ranks_receive_the_model_without_weights(checkpoints, family):
    import pickle

    from ernie_align.models.distributed.rank0_loading import pop_weights, to_meta
    from ernie_align.models.load import load_model

    model = load_model(str(checkpoints[family]), dtype="bfloat16").model
    sent = pickle.loads(pickle.dumps(to_meta(model)))
    for (name, weight), (same, other) in zip(model.named_parameters(), sent.named_parameters(), strict=True):
        assert (name, weight.shape, weight.dtype) == (same, other.shape, other.dtype) and other.is_meta
        assert weight.requires_grad == other.requires_grad
    for (name, buffer), (same, other) in zip(model.named_buffers(), sent.named_buffers(), strict=True):
        assert name == same and torch.equal(buffer, other)
    assert sent.lm_head.weight is sent.get_input_embeddings().weight
    assert sent.config.to_dict() == model.config.to_dict()
    names = [name for name, _ in model.named_parameters()]
    assert list(pop_weights(model)) == names and all(weight.is_meta for weight in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def main() -> None:
    """Run one process of `started` and print the peak bytes that torch held."""
    from ernie_align.report.console import quiet_libraries

    quiet_libraries()
    torch.distributed.init_process_group("gloo")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = load_sharded(Path(sys.argv[1]), sys.argv[2])
        torch.distributed.barrier()
    held = most = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    print(most)
    del kept


if __name__ == "__main__":
    main()
