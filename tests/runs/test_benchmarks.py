"""The benchmarks run, and reject arms that compute different values. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.measure import check_equal, ratio
from tests.support.runs import ROOT


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_experts_benchmark_checks_that_arms_are_equal():
    sizes = ["--hidden=64", "--width=32", "--experts=8", "--top-k=2", "--tokens=40", "--repetitions=2"]
    table = run("benchmarks.experts", *sizes, "--name=experts-tiny")
    assert all(f"| {arm} |" in table for arm in ("frozen", "grouped", "peft"))


def test_sft_benchmark_checks_that_arms_are_equal():
    table = run("benchmarks.sft", "--preset=tiny", "--repetitions=2")
    assert all(f"| {arm} |" in table for arm in ("ours", "stock", "attention"))


def test_dpo_benchmark_checks_that_arms_are_equal():
    table = run("benchmarks.dpo", "--preset=tiny", "--repetitions=1", "--side=112")
    assert all(f"| {arm} |" in table for arm in ("plain", "apart", "shared"))


def test_gpu_benchmark_runs_on_the_cpu_with_equal_losses():
    """Keeps the file working until a GPU is available."""
    losses = {}
    for arm, task in (("ours", "sft"), ("stock", "sft"), ("ours", "dpo")):
        gpu.main(["--preset=tiny", f"--arm={arm}", f"--task={task}", "--images", "--steps=1"])
        kept = json.loads((ROOT / "benchmarks" / "results" / f"gpu-tiny-{arm}-{task}-images.json").read_text())
        losses[arm, task] = [loss for shape in kept["shapes"] for loss in shape["losses"]]
    assert len(losses["ours", "sft"]) == 4  # two shapes, a warm-up step and another
    # bfloat16 has 8 bits; the first losses are equal
    assert losses["ours", "sft"] == pytest.approx(losses["stock", "sft"], rel=1e-2)
    # a fresh adapter is its own reference: log 2, exactly
    assert losses["ours", "dpo"][0] == pytest.approx(0.6931471805599453, abs=1e-7)


def test_unequal_arms_are_rejected():
    same = [{"loss": 1.0, "seconds": 2.0}, {"loss": 0.5, "seconds": 2.0}]
    other = [{"loss": 1.0, "seconds": 1.0}, {"loss": 0.6, "seconds": 4.0}]
    check_equal(same, same, {"loss": 1e-5})
    with pytest.raises(SystemExit, match=r"step 1: loss is 0\.5 in one arm and 0\.6 in the other"):
        check_equal(same, other, {"loss": 1e-5})
    with pytest.raises(SystemExit):
        check_equal([{"loss": float("nan")}], [{"loss": 1.0}], {"loss": 1e-5})
    assert ratio(same, other) == {"median": 1.25, "min": 0.5, "max": 2.0}
