"""Compare planned with measured memory over the loaded model, stage by stage.

    python -m benchmarks.plan [--preset tiny|mini] [--out benchmarks/results/plan.json]

Each case is a run of three steps on rows of one length (text and one image), in float32, in a process of its own.
Measured is the peak of the resident set (sampled every 2 ms; allocated device memory on a GPU) minus what the process
held when training began, with every weight in memory. The allocator returns memory at once (MALLOC_MMAP_THRESHOLD_), so
that resident memory is memory in use. Planned is ernie_align.planning.memory for the same recipe, rows and device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

STEPS = 3
SIZES = {"tiny": (16, 224, 350), "mini": (4, 224, 120)}  # rows, side of the image in pixels, words of the question
BOTH_POOLS = {"scopes": ["attention", "text_experts", "vision_experts"], "rank": 16, "alpha": 32}
CASES: dict[str, dict[str, Any]] = {
    "sft": {"stage": "sft"},
    "sft, checkpointing": {"stage": "sft", "checkpointing": True},
    "lora on attention": {"stage": "lora", "adapter": {"scopes": ["attention"], "rank": 16, "alpha": 32}},
    "lora on both pools": {"stage": "lora", "adapter": BOTH_POOLS},
    "lora on both pools, checkpointing": {"stage": "lora", "adapter": BOTH_POOLS, "checkpointing": True},
    "dpo, adapter": {"stage": "dpo", "adapter": BOTH_POOLS},
    "dpo, weights": {"stage": "dpo", "tune": {"scopes": "all"}},
    "upo, adapter": {"stage": "upo", "adapter": BOTH_POOLS},
}


def recipe_of(case: dict[str, Any], folder: Path, run: Path, rows: int) -> dict[str, Any]:
    """Return the recipe of a case."""
    stage = case["stage"]
    recipe: dict[str, Any] = {
        "stage": stage,
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "data": {"train": [{"path": str(folder / f"{'pairs' if stage == 'dpo' else 'rows'}.jsonl")}]},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": rows // 2 if stage == "dpo" else rows,
            "gradient_checkpointing": case.get("checkpointing", False),
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "report_to": "none",
        },
        "run": {"dir": str(run)},
        **{key: case[key] for key in ("adapter", "tune") if key in case},
    }
    if stage == "upo":
        recipe["rewards"] = [{"name": "contains", "text": "e", "weight": 1.0}]
        keep = {"always_right": False, "always_wrong": False, "refills": 0}
        recipe["upo"] = {"num_generations": 2, "max_completion_length": 32, "filter": keep}
    return recipe


def make(folder: Path, preset: str) -> None:
    """Create the model, and rows of one length."""
    from PIL import Image

    from ernie_align.tiny import make_checkpoint

    make_checkpoint("vl_moe", folder / "model", preset=preset)
    rows, side, words = SIZES[preset]
    question = [{"type": "image"}, {"type": "text", "text": " ".join(["seven"] * words)}]
    turns, pairs = [], []
    for number in range(rows * STEPS):
        name = f"{number}.png"
        Image.new("RGB", (side, side), (number, 128, 255 - number)).save(folder / name)
        prompt = [{"role": "user", "content": question}]
        answers = [[{"role": "assistant", "content": text}] for text in ("nine", "four")]
        turns.append({"messages": prompt + answers[0], "images": [name]})
        pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "images": [name]})
    for name, kept in (("rows", turns), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def plan_memory(recipe: Any) -> dict[str, float]:
    """Plan the bytes by part for the actual length of the rows."""
    import torch

    from ernie_align.models.architecture import Architecture
    from ernie_align.models.checkpoint_files import CheckpointFiles
    from ernie_align.planning.memory import estimate_memory
    from ernie_align.planning.workload import ModelShape, Workload
    from ernie_align.runs import sample_data, set_up

    setup = set_up(recipe)
    (example, *_), _ = sample_data(setup, 1)
    ids = example["input_ids"] if "input_ids" in example else example["prompt_ids"] + example["chosen_ids"]
    config = CheckpointFiles(recipe.model.name).read_json("config.json")
    architecture = Architecture.from_config(config)
    images = example["vision_tokens"] / (2 if recipe.stage == "dpo" and example["vision_tokens"] > len(ids) / 2 else 1)
    setting = Workload.of(recipe, architecture, vision=0.0)
    length = len(ids) + setting.completion
    device = "gpu" if torch.cuda.is_available() else "cpu"
    padded = recipe.stage == "upo"  # completions differ in length; the rows created here do not
    vision = min(images, len(ids)) / length
    both = "chosen_ids" in example
    trained = len(example["chosen_ids"] + example["rejected_ids"]) / 2 if both else example.get("trained", 0)
    scored = trained / length
    setting = replace(setting, tokens=length, vision=vision, scored=scored, device=device, padded=padded)
    found = estimate_memory(setting, architecture, ModelShape.of(architecture, config))
    return {**found.parts(), "over_loaded": found.peak - found.loaded, "tokens": length, "vision": setting.vision}


def measure_memory(recipe: Any) -> float:
    """Bytes over the loaded model, at the worst moment of a run in this process."""
    import resource

    import torch
    from rich.console import Console
    from transformers import TrainerCallback

    from ernie_align.report.console import Terminal, quiet_libraries
    from ernie_align.runs import run

    held: list[int] = []
    ended = threading.Event()

    def resident_memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def watch() -> None:
        while not ended.wait(0.002):
            held.append(resident_memory())

    class Meter(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                for parameter in model.parameters():  # a memory-mapped file is resident once it is read
                    parameter.sum()
            held.append(resident_memory())
            if torch.cuda.is_available():
                held[:] = [torch.cuda.memory_allocated()]
                torch.cuda.reset_peak_memory_stats()
            else:
                threading.Thread(target=watch, daemon=True).start()

        def on_train_end(self, args, state, control, **kwargs):
            ended.set()

    class Quiet(Terminal):
        def progress(self):
            return [Meter()]

    quiet_libraries()
    run(recipe, reporter=Quiet(Console(quiet=True)))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else max(held)
    return float(peak - held[0])


def run_case(case: str, folder: Path, preset: str) -> dict[str, Any]:
    """Plan and measure a case in this process."""
    from ernie_align.runs import load_recipe

    with tempfile.TemporaryDirectory(dir=folder) as run:
        recipe = load_recipe(recipe_of(CASES[case], folder, Path(run) / "run", SIZES[preset][0]))
        expected = plan_memory(recipe)
        return {"case": case, "planned": expected, "measured": measure_memory(recipe)}


def keep(path: Path, results: list[dict[str, Any]]) -> None:
    """Write the figures as JSON."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "dtype": "float32", "cases": results}, indent=1) + "\n")


def main() -> None:
    """Run every case in a process of its own and print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--preset", choices=list(SIZES), action="append", help="default: both")
    arguments.add_argument("--case", choices=list(CASES), action="append", help="default: all")
    arguments.add_argument("--out", type=Path, help="write the figures to this file as JSON")
    arguments.add_argument("--one", nargs=3, metavar=("CASE", "FOLDER", "PRESET"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.run_case:
        case, folder, preset = options.run_case
        print(json.dumps(run_case(case, Path(folder), preset)))
        return
    results = []
    print("| model | case | tokens | planned GB | measured GB | off |\n|---|---|---|---|---|---|")
    for preset in options.preset or list(SIZES):
        with tempfile.TemporaryDirectory() as name:
            make(Path(name), preset)
            for case in options.case or list(CASES):
                command = [sys.executable, "-m", "benchmarks.plan", "--one", case, name, preset]
                frugal = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
                done = subprocess.run(command, capture_output=True, text=True, env=frugal)
                if done.returncode:
                    sys.exit(done.stderr)
                figure = {"preset": preset, **json.loads(done.stdout.splitlines()[-1])}
                results.append(figure)
                plan, found = figure["planned"]["over_loaded"], figure["measured"]
                print(
                    f"| {preset} | {case} | {figure['planned']['tokens']} | {plan / 1e9:.3f} | {found / 1e9:.3f} | "
                    f"{plan / found - 1:+.1%} |",
                    flush=True,
                )
                if options.out is not None:  # after each case, so that an interrupted benchmark keeps its figures
                    keep(options.out, results)


if __name__ == "__main__":
    main()
