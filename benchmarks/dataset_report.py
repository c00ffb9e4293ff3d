"""Measure time and memory of `ernie-align data check` on 100,000 text rows and 2,000 images.

    python -m benchmarks.dataset_report --rows 100000 --images 2000 --workers 2

Rows are conversations of one to three turns in words of the tiny checkpoint's tokenizer; images are JPEGs of random
shapes of up to 1024 pixels per side, one per row.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml


def main() -> None:
    """Create the data, run the command, and print its time and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = make(Path(folder), options.rows, options.images)
        command = [sys.executable, "-m", "ernie_align", "data", "check", str(recipe), "--workers", str(options.workers)]
        report = Path(folder) / "report.json"
        seconds, cpu, memory = measure_process(
            [*command, "--json", str(report), "--out", str(Path(folder) / "page.html")]
        )
        sources = json.loads(report.read_text())["sources"]
    tokens = sum(source["count"]["tokens"] for source in sources)
    print(f"{sum(s['count']['rows'] for s in sources):,} rows, {tokens:,} tokens, {options.workers} workers")
    print(f"{seconds:.1f} s elapsed, {cpu:.1f} s of CPU time")
    tenths = [memory[len(memory) * tenth // 10] for tenth in range(10)] + [memory[-1]]
    print(
        "GB of parent and workers together (PSS), at each tenth of the run: "
        + ", ".join(f"{value:.2f}" for value in tenths)
    )
    print(f"peak: {max(memory):.2f} GB")


def make(folder: Path, rows: int, images: int) -> Path:
    """Write two sources and a recipe that names them; return its path."""
    from PIL import Image

    from ernie_align.tiny import make_checkpoint
    from ernie_align.tiny.tokenizer import NUMBERS

    draw = random.Random(0)
    words = [*NUMBERS, "plus"]

    def random_text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    def turns(count: int) -> list[dict[str, str]]:
        pairs = (("user", random_text(5, 100)), ("assistant", random_text(5, 200)))
        return [{"role": role, "content": text} for _ in range(count) for role, text in pairs]

    make_checkpoint("vl_moe", folder / "model")
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(rows):
            file.write(json.dumps({"messages": turns(draw.choice((1, 1, 2, 3)))}) + "\n")
    shapes = [(draw.randint(200, 1024), draw.randint(200, 1024)) for _ in range(40)]
    for number, shape in enumerate(shapes):
        Image.effect_noise(shape, 60).convert("RGB").save(folder / f"{number}.jpg", quality=85)
    with (folder / "images.jsonl").open("w") as file:
        for number in range(images):
            name = f"image-{number:05d}.jpg"
            shutil.copyfile(folder / f"{number % len(shapes)}.jpg", folder / name)
            file.write(json.dumps({"messages": turns(1), "images": [name]}) + "\n")
    recipe = {
        "stage": "lora",
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "adapter": {"scopes": ["attention"]},
        "data": {"train": [{"path": str(folder / name)} for name in ("text.jsonl", "images.jsonl")]},
        "run": {"dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def measure_process(command: list[str]) -> tuple[float, float, list[float]]:
    """Run a command; return elapsed seconds, CPU seconds, and the GB of its process tree twice per second."""
    began = time.monotonic()
    child = subprocess.Popen(command)
    tree, memory, used = psutil.Process(child.pid), [], {}
    while child.poll() is None:
        total = 0
        for process in [tree, *_children(tree)]:
            try:
                total += process.memory_full_info().pss  # PSS counts shared pages once
                used[process.pid] = sum(process.cpu_times()[:2])
            except psutil.Error:
                continue
        memory.append(total / 1e9)
        time.sleep(0.5)
    if child.returncode:
        raise SystemExit(f"the command exited with code {child.returncode}")
    return time.monotonic() - began, sum(used.values()), memory


def _children(tree: psutil.Process) -> list[psutil.Process]:
    try:
        return tree.children(recursive=True)
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
