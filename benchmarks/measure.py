"""How the benchmarks measure: each way of doing a thing has a process of its own and is asked in turn, step by step.

So a step of one way stands beside a step of the other, whatever else the machine does meanwhile, and the peak memory of
each is its own.
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


def asked_for(doc: str, arms: Iterable[str], **numbers: tuple[int, str | None]) -> argparse.Namespace:
    """The command line of a benchmark of whole steps: --preset, its own numbers (each with its default and what it is),
    --checkpointing, and what an arm is told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini", choices=["tiny", "mini"])
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--arm", choices=list(arms), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, without what an arm is told."""
    return {name: value for name, value in vars(given).items() if name not in ("arm", "folder")}


def arms_of(module: str, arms: Iterable[str], given: argparse.Namespace, folder: Path) -> list[Arm]:
    """The arms of such a benchmark, each told what was asked for."""
    words = [f"--folder={folder}"]
    for name, value in settings_of(given).items():
        words += ([f"--{name}"] if value else []) if isinstance(value, bool) else [f"--{name}={value}"]
    return [Arm(module, arm, words) for arm in arms]


class Arm:
    """One way of doing the thing: `python -m MODULE --arm NAME ...`, which does a step whenever it is asked."""

    def __init__(self, module: str, name: str, arguments: Iterable[str]):
        self.name = name
        command = [sys.executable, "-m", module, *arguments, "--arm", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, Any]:
        """What one step took, and the numbers it came to."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the arm {self.name} ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


class Questions:
    """The other end of an Arm. Whatever libraries print goes to stderr."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> bool:
        """Until a step is asked for; False when no more will be."""
        return bool(sys.stdin.readline())

    def answer(self, **values: Any) -> None:
        """What the step took."""
        print(json.dumps(values), file=self._answers, flush=True)

    def serve(self, step: Callable[[], None], numbers: Callable[[], dict[str, float]]) -> None:
        """Answer every question with a timed step, and with the numbers it left, which are worked out afterwards."""
        while self.wait():
            with Stopwatch() as watch:
                step()
            self.answer(seconds=watch.seconds, peak=watch.peak, **numbers())


class Stopwatch:
    """seconds of a block, and the peak of its memory in bytes: resident set, or allocated on a GPU."""

    def __enter__(self) -> Stopwatch:
        forget_peak()
        synchronize()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self._start
        self.peak = peak_memory()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak() -> None:
    """Begin a new peak of memory here."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes at the highest point since forget_peak."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def interleave(arms: list[Arm], repetitions: int, *, warm_up: int = 1) -> dict[str, list[dict[str, Any]]]:
    """One step of each arm after the other, from another arm on each time. Steps of warming up are done and dropped."""
    steps: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for number in range(warm_up + repetitions):
        first = number % len(arms)
        for arm in (*arms[first:], *arms[:first]):
            steps[arm.name].append(arm.step())
    for arm in arms:
        arm.close()
    return {name: done[warm_up:] for name, done in steps.items()}


def demand_equal(these: list[dict], those: list[dict], tolerances: dict[str, float]) -> None:
    """Both come to the same numbers in every step, to these relative tolerances: or no timing is shown at all."""
    for number, (this, that) in enumerate(zip(these, those, strict=True)):
        for key, tolerance in tolerances.items():
            if not abs(this[key] - that[key]) <= tolerance * abs(that[key]):
                sys.exit(f"step {number}: {key} is {this[key]!r} here and {that[key]!r} there: these are not the same")


def ratio(these: list[dict], those: list[dict], key: str = "seconds") -> dict[str, float]:
    """Of steps that stood side by side: the median ratio, the least and the greatest."""
    ratios = [this[key] / that[key] for this, that in zip(these, those, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def median(steps: list[dict], key: str) -> float:
    """The median of a number over the steps."""
    return statistics.median(step[key] for step in steps)


def matmul_rate(dtype: str = "float32", size: int = 1024, repetitions: int = 9) -> float:
    """FLOP/s of a square matrix product here and now."""
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
    """What the figures are measured on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"


def show(ratio: dict[str, float]) -> str:
    """median [min, max]"""
    return f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"


def table(figures: dict[str, dict[str, Any]], *columns: tuple) -> str:
    """Markdown, a row for each name. columns: (head, key of the figures[, format[, unit]]), ratios as show has them."""

    def cell(value: Any, form: str = "", unit: float = 1) -> str:
        return show(value) if isinstance(value, dict) else f"{value / unit:{form}}"

    lines = [f"| | {' | '.join(head for head, *_ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, figure in figures.items():
        lines.append(f"| {name} | {' | '.join(cell(figure[key], *how) for _, key, *how in columns)} |")
    return "\n".join(lines)


def keep(name: str, figures: dict[str, Any]) -> Path:
    """Write the figures, with what they were measured on, into results/NAME.json."""
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "trl", "peft")}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "versions": versions, **figures}, indent=2) + "\n")
    return path
