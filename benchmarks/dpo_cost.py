"""Compare the cost of a DPO step with an adapter with an SFT step with the same adapter.

    python -m benchmarks.dpo_cost [--preset mini] [--steps 5]

Both train the same adapter, SFT on answers and DPO on pairs of answers. A pair is two sequences; the policy computes
each with gradient, the reference without. Seconds are the median step after one warm-up step. Memory is the peak during
the steps (resident set, sampled every 5 ms; allocated device memory on a GPU) minus the memory held before the first
step. Each run has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.measure import machine, synchronize

ADAPTER = {"scopes": ["attention", "text_experts", "vision_experts"], "rank": 16, "alpha": 32}


def recipe(stage: str, reference: str, folder: Path, steps: int, batch: int) -> dict:
    """Return the recipe of a run; runs differ only in their stage."""
    rows = {"sft": "train.jsonl", "dpo": "preferences.jsonl"}[stage]
    blocks: dict = {"dpo": {"reference": reference}} if stage == "dpo" else {}
    return {
        "stage": {"sft": "lora", "dpo": "dpo"}[stage],
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "adapter": ADAPTER,
        "data": {"train": [{"path": str(folder / "digits" / rows), "limit": batch * (steps + 1)}]},
        "training": {
            "max_steps": steps + 1,
            "per_device_train_batch_size": batch,
            "gradient_checkpointing": False,
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "report_to": "none",
        },
        "run": {"dir": str(folder / f"{stage}-{reference}")},
        **blocks,
    }


def measure(stage: str, reference: str, folder: Path, steps: int, batch: int) -> dict[str, float]:
    """Measure seconds per step and peak memory of one run in this process."""
    import resource

    import torch
    from rich.console import Console
    from transformers import TrainerCallback

    from ernie_align.report.console import Terminal, quiet_libraries
    from ernie_align.runs import load_recipe, run

    times: list[float] = []
    held: list[float] = []
    ended = threading.Event()

    def watch_memory():
        while not ended.wait(0.005):
            held.append(resident_memory())

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            held.append(resident_memory())
            threading.Thread(target=watch_memory, daemon=True).start()
            if torch.cuda.is_available():
                held[:] = [torch.cuda.memory_allocated()]
                torch.cuda.reset_peak_memory_stats()

        def on_train_end(self, args, state, control, **kwargs):
            ended.set()

        def on_step_begin(self, args, state, control, **kwargs):
            synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            synchronize()
            times.append(time.perf_counter() - self.start)

    class Quiet(Terminal):
        def progress(self):
            return [Clock()]

    def resident_memory():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    quiet_libraries()
    run(load_recipe(recipe(stage, reference, folder, steps, batch)), reporter=Quiet(Console(quiet=True)))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else max(held)
    return {"seconds": statistics.median(times[1:]), "gigabytes": (peak - held[0]) / 1e9}


def main() -> None:
    """Create model and rows, measure each run in a process of its own, and print a table of ratios."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--preset", default="mini", choices=["tiny", "mini"])
    arguments.add_argument("--steps", type=int, default=5)
    arguments.add_argument("--batch", type=int, default=4, help="rows or pairs per step")
    arguments.add_argument("--one", nargs=3, metavar=("STAGE", "REFERENCE", "FOLDER"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.one:
        stage, reference, folder = options.one
        print(json.dumps(measure(stage, reference, Path(folder), options.steps, options.batch)))
        return
    from ernie_align.tiny import make_checkpoint, make_digits

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint("vl_moe", folder / "model", preset=options.preset)
        make_digits(folder / "digits")
        figures = {}
        for stage, reference in (("sft", "none"), ("dpo", "auto"), ("dpo", "precomputed")):
            settings = ["--steps", str(options.steps), "--batch", str(options.batch), "--preset", options.preset]
            command = [sys.executable, "-m", "benchmarks.dpo_cost", *settings, "--one", stage, reference, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            figures[stage, reference] = json.loads(done.stdout.splitlines()[-1])
    print(f"{options.preset}, {options.batch} rows or pairs per step, float32, {machine()}\n")
    print("| stage | s/step | / SFT | GB over the loaded model | / SFT |\n|---|---|---|---|---|")
    base = figures["sft", "none"]
    for (stage, reference), figure in figures.items():
        what = "SFT" if stage == "sft" else f"DPO, reference: {reference}"
        ratios = [f"{figure[key]:.2f} | {figure[key] / base[key]:.2f}" for key in ("seconds", "gigabytes")]
        print(f"| {what} | {ratios[0]} | {ratios[1]} |")


if __name__ == "__main__":
    main()
