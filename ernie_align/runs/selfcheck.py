"""Whether a recipe routes, resumes, repeats and spreads on this machine: a few of its own steps, taken several ways."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ernie_align.errors import ModelError, RunError
from ernie_align.recipe import Recipe, to_yaml
from ernie_align.runs.train import run

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerCallback

# bfloat16 keeps 8 bits: a rounding of 0.4 %, most of which cancels over a batch. Ten times that is no rounding
DRIFT = 0.05  # of the loss, or of 1 where the loss is smaller
# the same numbers summed in another order, by dtype of the weights; of the loss
_ORDER = {"float32": 1e-4, "bfloat16": 2e-2}
_ROWS = 4  # times what the steps need: some are dropped, and a source of little weight is to have one
_SHOWN = 3  # lines of another process's error

Verdict = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One question about the recipe on this machine, and the answer. what: the figures it rests on."""

    name: str
    verdict: Verdict
    what: str


def selfcheck(
    recipe: Recipe, *, steps: int = 4, processes: int | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Check]:
    """Take a few steps of the recipe several ways and compare them. run.dir is not touched: all is done in a temporary
    folder (of TMPDIR), which must have room for two checkpoints and is removed.

    steps: 2 or more; processes: to compare with one, otherwise one per accelerator; say: told each line of progress.
    Raises AlignError where the recipe does not run at all.
    """
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError.at("selfcheck", "started as one of several processes", fix="start it alone: it starts them")
    if processes is None:
        processes = max(1, torch.accelerator.device_count() if torch.accelerator.is_available() else 1)
    with tempfile.TemporaryDirectory(prefix="ernie-align-") as folder:
        return _Selfcheck(recipe, steps, processes, Path(folder), say).checks()


@dataclass(frozen=True)
class _Selfcheck:
    recipe: Recipe
    steps: int
    processes: int
    folder: Path
    say: Callable[[str], None]

    def checks(self) -> list[Check]:
        from ernie_align.runs.routed import RoutedCounter

        whole = self.folder / "whole"
        counter = RoutedCounter()
        self.say(f"{self.steps} steps, with a checkpoint after {self.steps // 2}")
        try:
            self._run(whole, counter)
        except ModelError as error:
            what = "the recipe does not come to the end of its first steps"
            rest = ("resume", "repeat", "precision", "processes")
            return [Check("routing", "fail", str(error)), *(Check(name, "not applicable", what) for name in rest)]
        routing = Check("routing", *counter.verdict())
        return [routing, self._resume(whole), self._repeat(whole), self._precision(whole), self._spread()]

    # -- the checks -------------------------------------------------------------------------------------------------

    def _resume(self, whole: Path) -> Check:
        """The second half again, from the checkpoint in the middle."""
        self.say(f"resumed after {self.steps // 2} of them")
        again, middle = self.folder / "again", f"checkpoint-{self.steps // 2}"
        shutil.copytree(whole, again, ignore=shutil.ignore_patterns("final", "checkpoint-*"))
        (whole / middle).rename(again / middle)
        for later in whole.glob("checkpoint-*"):
            shutil.rmtree(later)
        self._run(again, resume=True)
        return self._bit_equal("resume", whole, again, "stopped and resumed, or not")

    def _repeat(self, whole: Path) -> Check:
        self.say("all of them again, with the same seed")
        twice = self.folder / "twice"
        self._run(twice, training={**self._training, "save_strategy": "no"})
        return self._bit_equal("repeat", whole, twice, "run twice")

    def _precision(self, whole: Path) -> Check:
        """As asked for, against float32; float32 against bfloat16."""
        if self.recipe.stage == "upo":
            return Check("precision", "not applicable", "rollouts of two precisions are other texts")
        exact = self.recipe.model.dtype == "float32" and not any(self._mixed.values())
        dtype = "bfloat16" if exact else "float32"
        self.say(f"all of them in {dtype}")
        other = self.folder / "other"
        training = {**self._training, **dict.fromkeys(self._mixed, False), "bf16": exact, "save_strategy": "no"}
        try:
            self._run(other, model=self.recipe.model.updated(dtype=dtype), training=training)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            return Check("precision", "not applicable", f"{dtype} does not fit into memory here")
        drifts = [abs(a - b) / max(1, abs(a)) for a, b in zip(_losses(whole), _losses(other), strict=True)]
        what = (
            f"the loss is off by {drifts[0]:.2g} at the first step and by {max(drifts):.2g} at worst, {DRIFT:g} allowed"
        )
        asked = "float32" if exact else "as asked for"
        return Check("precision", "pass" if max(drifts) <= DRIFT else "fail", f"{asked} against {dtype}: {what}")

    def _spread(self) -> Check:
        """The same batches in one process, one after the other, and in several at once."""
        count, name = self.processes, "processes"
        if count == 1:
            return Check(name, "not applicable", "one device; --processes 2 compares two on the CPU")
        if self.recipe.stage == "upo":
            return Check(name, "not applicable", "each process draws rollouts of its own")
        one, all_ = self.folder / "one", self.folder / "all"
        accumulation = self.recipe.training.get("gradient_accumulation_steps") or 1
        self.say(f"the batches of {count} processes in one")
        training = {**self._training, "save_strategy": "no"}
        self._run(one, training={**training, "gradient_accumulation_steps": count * accumulation})
        self.say(f"the same in {count} processes")
        written = self.folder / "all.yaml"
        written.write_text(to_yaml(self._recipe(all_)), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        done = subprocess.run(
            [*command, "-m", "ernie_align", self.recipe.stage, str(written)], capture_output=True, text=True
        )
        if done.returncode or not (all_ / "final").exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()][:_SHOWN]
            return Check(name, "fail", "\n".join([f"{count} processes do not come to the end:", *lines]))
        if not (all_ / f"checkpoint-{self.steps}" / f"rng_state_{count - 1}.pth").exists():
            return Check(name, "fail", f"the {count} processes ran each for itself")
        limit = _ORDER[self.recipe.model.dtype]
        differences = [abs(a - b) / max(1, abs(a)) for a, b in zip(_losses(one), _losses(all_), strict=True)]
        what = f"1 against {count}: the loss is off by {max(differences):.2g} at worst, {limit:g} allowed"
        return Check(name, "pass" if max(differences) <= limit else "fail", what)

    @staticmethod
    def _bit_equal(name: str, one: Path, other: Path, how: str) -> Check:
        """Of two runs that should be one. The other is removed: it is as large as the model."""
        verdict, what = _differences(one, other)
        shutil.rmtree(other)
        return Check(name, verdict, f"{how}: {what}")

    # -- runs -------------------------------------------------------------------------------------------------------

    @property
    def _mixed(self) -> dict[str, Any]:
        return {key: self.recipe.training.get(key) for key in ("bf16", "fp16")}

    @property
    def _training(self) -> dict[str, Any]:
        """The recipe's own keys, for a few steps that are logged one by one and evaluated never."""
        without = ("num_train_epochs", "eval_steps", "load_best_model_at_end", "save_total_limit")
        return {key: value for key, value in self.recipe.training.items() if key not in without} | {
            "max_steps": self.steps,
            "save_strategy": "steps",
            "save_steps": self.steps // 2,
            "logging_strategy": "steps",
            "logging_steps": 1,
            "logging_first_step": False,
            "eval_strategy": "no",
            "report_to": "none",
        }

    def _recipe(self, run_dir: Path, **blocks: Any) -> Recipe:
        training = blocks.setdefault("training", self._training)
        batch = training.get("per_device_train_batch_size") or 8  # transformers' default
        accumulation = self.recipe.training.get("gradient_accumulation_steps") or 1
        rows = _ROWS * self.steps * batch * accumulation * self.processes
        train = [block.updated(limit=min(block.limit or rows, rows)) for block in self.recipe.data.train]
        data = self.recipe.data.updated(train=train, eval=[])
        return self.recipe.updated(data=data, run=self.recipe.run.updated(dir=str(run_dir)), **blocks)

    def _run(
        self, run_dir: Path, callback: TrainerCallback | None = None, *, resume: bool = False, **blocks: Any
    ) -> None:
        import torch

        try:
            run(self._recipe(run_dir, **blocks), resume=resume, reporter=_Silent(callback))
        finally:
            gc.collect()  # a trainer and its model refer to one another, and the next model needs the room
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()


class _Silent:
    """A reporter that says nothing and brings a callback."""

    def __init__(self, callback: TrainerCallback | None):
        self.callback = callback

    def progress(self) -> list[TrainerCallback]:
        return [self.callback] if self.callback is not None else []

    def say(self, *told: Any) -> None:
        pass

    coverage = sources = preview = certificate = say


def _losses(run_dir: Path) -> list[float]:
    """Step by step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def _differences(one: Path, other: Path) -> tuple[Verdict, str]:
    """Of losses and finished weights: whether there are any, and in words."""
    odd = [step for step, pair in enumerate(zip(_losses(one), _losses(other), strict=True), 1) if pair[0] != pair[1]]
    differing, worst, count = 0, 0.0, 0
    for tensor, found in _tensors(one / "final", other / "final"):
        count += 1
        if not tensor.equal(found):
            differing += 1
            worst = max(worst, (tensor.float() - found.float()).abs().max().item())
    if not odd and not differing:
        return "pass", f"{len(_losses(one))} losses and {count} tensors are bit-equal"
    losses = f"the loss differs from step {odd[0]} on" if odd else "the losses are equal"
    return "fail", f"{losses}; {differing} of {count} tensors differ, by {worst:.2g} at worst"


def _tensors(one: Path, other: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """The same tensor of both, one after the other: two whole models may not fit."""
    from safetensors import safe_open

    for file in sorted(one.glob("*.safetensors")):
        with safe_open(file, "pt") as first, safe_open(other / file.name, "pt") as second:
            for name in first.keys():  # noqa: SIM118 (it is no mapping)
                yield first.get_tensor(name), second.get_tensor(name)
