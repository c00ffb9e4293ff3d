"""Measure the peak memory of each process while a sharded model is loaded: `python -m benchmarks.loading`.

The model is the preset `mini` of the VL family in float32. All processes run on one machine with gloo and shard the
model with FSDP2 or `--ep-size`. The figure of a process is its peak resident memory while it loads and shards, minus
what it held before with torch and transformers imported. On a CPU, a process keeps its shard in the same memory.
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

MODES = ("fsdp2, every rank reads", "fsdp2, rank 0 reads", "ep")


def main() -> None:
    """Print MB of each process, one row per mode and number of processes."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint("vl_moe", Path(folder) / "model", preset="mini")
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        print(f"model: {size / 1e6:.0f} MB")
        for processes in (2, 4):
            for way in MODES:
                peaks = run_processes(model, way, processes)
                row = " ".join(f"{peak:6.0f}" for peak in peaks)
                print(f"{way:24} {processes} processes: {row}   total {sum(peaks):6.0f} MB", flush=True)


def run_processes(model: Path, way: str, processes: int, module: str = "benchmarks.loading") -> list[float]:
    """Start the processes of `python -m module`; return the MB that each prints."""
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
    return [float(child.communicate()[0]) for child in children]


def load_sharded(model: Path, way: str) -> PreTrainedModel:
    """Load and shard the model in this process group."""
    if way == "ep":
        return load_model(str(model), parallel=ParallelLayout(ep_size=torch.distributed.get_world_size())).model
    rank0_loading = way == MODES[1]
    units = SHARDING_UNITS["vl_moe"]
    fsdp = {"FSDP_CPU_RAM_EFFICIENT_LOADING": str(rank0_loading).lower()}
    fsdp["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(units.layers + units.routers)
    with gpus_on_the_cpu(**FSDP2 | fsdp):
        from accelerate import Accelerator

        kept = load_model(str(model), rank0_loading=rank0_loading).model.requires_grad_(False)
        kept.model.language_model.norm.weight.requires_grad_(True)
        give_distinct_addresses(kept, in_float32=False)
        trained = [weight for weight in kept.parameters() if weight.requires_grad]
        return Accelerator().prepare(kept, torch.optim.SGD(trained))[0]


def load(model: Path, way: str) -> None:
    """Load in this process and print its peak memory in MB."""
    quiet_libraries()
    torch.distributed.init_process_group("gloo")
    held = resident_memory()
    kept = load_sharded(model, way)
    torch.distributed.barrier()
    print(resident_memory("VmHWM") - held)
    del kept


def resident_memory(which: str = "VmRSS") -> float:
    """Return the MB that this process holds, or has held at most (VmHWM). getrusage would include the parent's peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which + ":"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load(Path(sys.argv[1]), sys.argv[2])
    else:
        main()
