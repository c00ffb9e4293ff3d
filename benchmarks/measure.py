"""Interleaved measurement: each variant (arm) runs in a process of its own, and the arms take one step each in turn.

Whatever else the machine does then affects all arms alike, and each arm has its own peak memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parse_options(doc: str, arms: Iterable[str], **numbers: tuple[int, str | None]) -> argparse.Namespace:
    """Parse the command line of a benchmark of whole steps.

    numbers: name -> (default, help) of further integer options. --arm and --folder are passed to the processes of arms.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini", choices=["tiny", "mini"])
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--arm", choices=list(arms), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def settings_from(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the benchmark without those passed to arms."""
    return {name: value for name, value in vars(options).items() if name not in ("arm", "folder")}


def start_arms(module: str, arms: Iterable[str], options: argparse.Namespace, folder: Path) -> list[Arm]:
    """Start one process per arm with the options of the benchmark."""
    words = [f"--folder={folder}"]
    for name, value in settings_from(options).items():
        words += ([f"--{name}"] if value else []) if isinstance(value, bool) else [f"--{name}={value}"]
    return [Arm(module, arm, words) for arm in arms]


class Arm:
    """A variant under measurement: a process `python -m MODULE --arm NAME ...` that takes a step on request."""

    def __init__(self, module: str, name: str, arguments: Iterable[str]):
        self.name = name
        command = [sys.executable, "-m", module, *arguments, "--arm", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, Any]:
        """Run one step; return its seconds, peak memory and values."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            sys.exit(f"arm {self.name} exited with code {self.process.wait()}")
        return json.loads(reply)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


class StepServer:
    """The process side of an Arm. Output of libraries goes to stderr."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> bool:
        """Wait for a request; return False if there will be no more."""
        return bool(sys.stdin.readline())

    def answer(self, **values: Any) -> None:
        """Send the measurements of a step."""
        print(json.dumps(values), file=self._answers, flush=True)

    def serve(self, step: Callable[[], None], numbers: Callable[[], dict[str, float]]) -> None:
        """Answer every request with a timed step and its values, which are computed outside the timed part."""
        while self.wait():
            with Stopwatch() as watch:
                step()
            self.answer(seconds=watch.seconds, peak=watch.peak, **numbers())


class Stopwatch:
    """Seconds of a block and its peak memory in bytes: resident set, or allocated memory on a GPU."""

    def __enter__(self) -> Stopwatch:
        reset_peak_memory()
        synchronize()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self._start
        self.peak = peak_memory()


def synchronize() -> None:
    """Synchronize the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    """Reset the peak memory counter."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak memory in bytes since reset_peak_memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def interleave(arms: list[Arm], repetitions: int, *, warm_up: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Run one step of each arm in turn, starting with another arm each time. Warm-up steps are dropped."""
    steps: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for number in range(warm_up + repetitions):
        first = number % len(arms)
        for arm in (*arms[first:], *arms[:first]):
            steps[arm.name].append(arm.step())
    for arm in arms:
        arm.close()
    return {name: done[warm_up:] for name, done in steps.items()}


def check_equal(these: list[dict], those: list[dict], tolerances: dict[str, float]) -> None:
    """Exit unless both arms computed the same values in every step, within relative tolerances."""
    for number, (this, that) in enumerate(zip(these, those, strict=True)):
        for key, tolerance in tolerances.items():
            if not abs(this[key] - that[key]) <= tolerance * abs(that[key]):
                sys.exit(f"step {number}: {key} is {this[key]!r} in one arm and {that[key]!r} in the other")


def ratio(these: list[dict], those: list[dict], key: str = "seconds") -> dict[str, float]:
    """Return median, minimum and maximum of the ratios of steps taken in the same turn."""
    ratios = [this[key] / that[key] for this, that in zip(these, those, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def median(steps: list[dict], key: str) -> float:
    """Return the median of a value over the steps."""
    return statistics.median(step[key] for step in steps)


def matmul_rate(dtype: str = "float32", size: int = 1024, repetitions: int = 9) -> float:
    """Measure the FLOP/s of a square matrix product."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    seconds = []
    for _ in range(repetitions):
        with Stopwatch() as watch:
            a @ b
        seconds.append(watch.seconds)
    return 2 * size**3 / statistics.median(seconds[1:])


def machine() -> str:
    """Return the name of the GPU, or the architecture and threads of the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"


def show(ratio: dict[str, float]) -> str:
    """Format as median [min, max]."""
    return f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"


def table(figures: dict[str, dict[str, Any]], *columns: tuple) -> str:
    """Return a Markdown table with a row per name. columns: (header, key of the figures[, format[, unit]])."""

    def cell(value: Any, form: str = "", unit: float = 1) -> str:
        return show(value) if isinstance(value, dict) else f"{value / unit:{form}}"

    lines = [f"| | {' | '.join(head for head, *_ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, figure in figures.items():
        lines.append(f"| {name} | {' | '.join(cell(figure[key], *how) for _, key, *how in columns)} |")
    return "\n".join(lines)


def keep(name: str, figures: dict[str, Any]) -> Path:
    """Write the figures with machine and versions to results/NAME.json."""
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "trl", "peft")}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "versions": versions, **figures}, indent=2) + "\n")
    return path
