"""What loading costs each process in memory, where the processes share a model: `python -m benchmarks.loading`.

The model is the tiny preset `mini` of the VL family in float32: all processes on one machine, which meet by gloo and
share it by FSDP2 or with `--ep-size`. Of each process: the peak of its resident memory while it loads and shards, less
what it held before, with torch and transformers imported. On a CPU a process keeps its own part in the same memory.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ernie_align.models.distributed.layout import SHARDING_UNITS, ParallelLayout
from ernie_align.models.distributed.rank0_loading import give_distinct_addresses
from ernie_align.models.load import load_model
from ernie_align.report.console import quiet_libraries
from ernie_align.tiny import make_checkpoint
from tests.support.multi_process import FSDP2, gpus_on_the_cpu
from tests.support.runs import ROOT

WAYS = ("fsdp2, each reads", "fsdp2, the first reads", "ep")


def main() -> None:
    """A table of MB, one row for each way and number of processes."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint("vl_moe", Path(folder) / "model", preset="mini")
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        print(f"the model: {size / 1e6:.0f} MB")
        for processes in (2, 4):
            for way in WAYS:
                peaks = started(model, way, processes)
                row = " ".join(f"{peak:6.0f}" for peak in peaks)
                print(f"{way:24} {processes} processes: {row}   together {sum(peaks):6.0f} MB", flush=True)


def started(model: Path, way: str, processes: int, module: str = "benchmarks.loading") -> list[float]:
    """MB of each process of `python -m module`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        place |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1, "ACCELERATE_USE_CPU": "true"}
        env = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, "-m", module, str(model), way]
        children.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE))
    said = [child.communicate()[0] for child in children]
    return [float(line) for line in said]


def share(model: Path, way: str) -> PreTrainedModel:
    """The model, loaded and shared by the processes that were started."""
    if way == "ep":
        return load_model(str(model), parallel=ParallelLayout(ep_size=torch.distributed.get_world_size())).model
    rank0_loading = way == WAYS[1]
    units = SHARDING_UNITS["vl_moe"]
    told = {"FSDP_CPU_RAM_EFFICIENT_LOADING": str(rank0_loading).lower()}
    told["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(units.layers + units.routers)
    with gpus_on_the_cpu(**FSDP2 | told):
        from accelerate import Accelerator

        kept = load_model(str(model), rank0_loading=rank0_loading).model.requires_grad_(False)
        kept.model.language_model.norm.weight.requires_grad_(True)
        give_distinct_addresses(kept, in_float32=False)
        trained = [weight for weight in kept.parameters() if weight.requires_grad]
        return Accelerator().prepare(kept, torch.optim.SGD(trained))[0]


def load(model: Path, way: str) -> None:
    """One process: prints its peak."""
    quiet_libraries()
    torch.distributed.init_process_group("gloo")
    held = resident()
    kept = share(model, way)
    torch.distributed.barrier()
    print(resident("VmHWM") - held)
    del kept


def resident(which: str = "VmRSS") -> float:
    """MB of memory that this process holds, or (VmHWM) has held at most. getrusage would tell the parent's peak too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which + ":"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load(Path(sys.argv[1]), sys.argv[2])
    else:
        main()
