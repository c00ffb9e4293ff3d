"""Count the files of the package that one training step enters, and the moves between them.

    python -m benchmarks.code_path [lora] [dpo] [upo]

Each stage runs in a process of its own: one step on one row (one pair, one prompt with two completions) with a tiny
vision-language checkpoint and adapters on attention and both pools of experts, from the recipe to `final/`. A file
counts as entered when one of its functions is called. A move is a call into another file of the package than the call
before it. Code that runs at import is not counted. Fewer files and moves mean less to read before one understands what
happens to a row.
"""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import ernie_align

PACKAGE = str(Path(ernie_align.__file__).parent) + "/"
ROWS = {"lora": "val.jsonl", "dpo": "preferences-val.jsonl", "upo": "val.jsonl"}


class CallCounter:
    """A profile function that counts calls by file, and moves between the files of the package."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.entries: Counter[str] = Counter()
        self._last = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        runs_at_import = not frame.f_code.co_flags & inspect.CO_OPTIMIZED  # the body of a module or of a class
        if event != "call" or not path.startswith(PACKAGE) or runs_at_import:
            return
        file = path.removeprefix(PACKAGE)
        self.calls[file] += 1
        if self._last and self._last != file:
            self.entries[file] += 1
        self._last = file


def make_recipe(stage: str, folder: Path) -> dict[str, Any]:
    """A recipe of one step on one row."""
    recipe: dict[str, Any] = {
        "stage": stage,
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "adapter": {"scopes": ["attention", "text_experts", "vision_experts"], "rank": 4, "alpha": 8},
        "data": {"train": [{"path": str(folder / "digits" / ROWS[stage]), "limit": 1}], "max_length": 256},
        "training": {
            "max_steps": 1,
            "per_device_train_batch_size": 2 if stage == "upo" else 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        },
        "run": {"dir": str(folder / stage)},
    }
    if stage == "upo":
        recipe["upo"] = {"num_generations": 2, "max_completion_length": 8}
        recipe["rewards"] = [{"name": "length", "max": 8}]
    return recipe


def trace_step(stage: str) -> CallCounter:
    """Run one step of a stage in this process and count its calls."""
    from rich.console import Console

    from ernie_align.report.console import Terminal, quiet_libraries
    from ernie_align.runs import load_recipe, run
    from ernie_align.tiny import make_checkpoint, make_digits

    quiet_libraries()
    counter = CallCounter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint("vl_moe", folder / "model")
        make_digits(folder / "digits")
        terminal = Terminal(Console(quiet=True))
        threading.setprofile(counter)
        sys.setprofile(counter)
        try:
            run(load_recipe(make_recipe(stage, folder)), reporter=terminal)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return counter


def main() -> None:
    """Print one line for each stage, or with --one the files that one stage enters most often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=list(ROWS), help="stages to trace")
    parser.add_argument("--one", action="store_true", help="trace a single stage in this process, file by file")
    options = parser.parse_args()
    if options.one:
        counter = trace_step(options.stages[0])
        for file, count in counter.entries.most_common():
            print(f"{count:6} moves into {file}")
        print(f"{options.stages[0]}: {len(counter.calls)} files, {counter.entries.total()} moves")
        return
    files = len(list(Path(PACKAGE).rglob("*.py")))
    print(f"{files} files in the package")
    for stage in options.stages:
        command = [sys.executable, "-m", "benchmarks.code_path", stage, "--one"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
