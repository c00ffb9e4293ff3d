"""`ernie-align selfcheck`: take a few steps of a recipe in several ways on this machine, and compare the results."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from ernie_align.errors import ModelError, RunError
from ernie_align.models.routing import ModalityTokens, moe_mm_token_type_ids
from ernie_align.models.token_dispatch import find_expert_pools
from ernie_align.recipe import Recipe, to_yaml
from ernie_align.runs.reporter import SilentReporter
from ernie_align.runs.train import run
from ernie_align.stages import STAGES

if TYPE_CHECKING:
    from torch import Tensor

# bfloat16 keeps 8 bits: it rounds by 0.4 %, most of which cancels over a batch. Ten times that is not rounding.
MAX_DRIFT = 0.05  # of the loss, or of 1 if the loss is smaller
# Sums in another order, by dtype of the weights; same unit.
_MAX_SUM_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}
_ROW_FACTOR = 4  # times the rows that the steps need: some are dropped, and every source should have one
_SHOWN_LINES = 3  # of the error of another process

Verdict = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True)
class Check:
    """The result of one check. what: the figures behind the verdict."""

    name: str
    verdict: Verdict
    what: str


def selfcheck(
    recipe: Recipe,
    *,
    steps: int = 4,
    processes: int | None = None,
    log: Callable[[str], None] = lambda line: None,
    callbacks: Sequence[TrainerCallback] = (),
    max_drift: float = MAX_DRIFT,
) -> list[Check]:
    """Check that a recipe routes, resumes, repeats, and gives the same losses in other precisions and on more ranks.

    run.dir is not touched: the runs are made in a temporary folder (in TMPDIR), which needs room for two checkpoints
    and is removed.

    steps: 2 or more; processes: number to compare with one, by default the accelerators; log: called with each line of
    progress; callbacks: added to the first run only; max_drift: difference between precisions that passes.
    Raises AlignError if the recipe does not run at all.
    """
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        what = "started as one of several processes"
        raise RunError.at("selfcheck", what, fix="start it without a launcher: it starts its own processes")
    if processes is None:
        processes = max(1, torch.accelerator.device_count() if torch.accelerator.is_available() else 1)
    with tempfile.TemporaryDirectory(prefix="ernie-align-") as folder:
        return _Selfcheck(recipe, steps, processes, Path(folder), log, max_drift).checks(callbacks)


@dataclass(frozen=True)
class _Selfcheck:
    recipe: Recipe
    steps: int
    processes: int
    folder: Path
    log: Callable[[str], None]
    max_drift: float

    def checks(self, callbacks: Sequence[TrainerCallback]) -> list[Check]:
        whole = self.folder / "whole"
        counter = VisionTokenCounter()
        self.log(f"{self.steps} steps, with a checkpoint after {self.steps // 2}")
        try:
            self._run(whole, counter, *callbacks)
        except ModelError as error:
            skipped = ("resume", "repeat", "precision", "processes")
            what = "the first run did not reach its end"
            return [Check("routing", "fail", str(error)), *(Check(name, "not applicable", what) for name in skipped)]
        routing = Check("routing", *counter.verdict())
        return [routing, self._resume(whole), self._repeat(whole), self._precision(whole), self._processes()]

    # -- the checks -------------------------------------------------------------------------------------------------

    def _resume(self, whole: Path) -> Check:
        """Take the second half of the steps once more, from the checkpoint in the middle."""
        self.log(f"the same, resumed after {self.steps // 2} steps")
        resumed, middle = self.folder / "resumed", f"checkpoint-{self.steps // 2}"
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("final", "checkpoint-*"))
        (whole / middle).rename(resumed / middle)
        for later in whole.glob("checkpoint-*"):
            shutil.rmtree(later)
        self._run(resumed, resume=True)
        return self._compare_bits("resume", whole, resumed, "resumed or not")

    def _repeat(self, whole: Path) -> Check:
        self.log("the same again, with the same seed")
        repeated = self.folder / "repeated"
        self._run(repeated, training={**self._training, "save_strategy": "no"})
        return self._compare_bits("repeat", whole, repeated, "run twice")

    @staticmethod
    def _compare_bits(name: str, one: Path, other: Path, how: str) -> Check:
        """Compare two runs that should be equal, and remove the second, which is as large as the model."""
        verdict, what = _differences(one, other)
        shutil.rmtree(other)
        return Check(name, verdict, f"{how}: {what}")

    def _precision(self, whole: Path) -> Check:
        """Compare the recipe with float32; one in float32 with bfloat16."""
        if STAGES[self.recipe.stage].samples_completions:
            what = "completions sampled in two precisions are different texts"
            return Check("precision", "not applicable", what)
        exact = self.recipe.model.dtype == "float32" and not any(self._mixed_precision.values())
        dtype = "bfloat16" if exact else "float32"
        self.log(f"the same in {dtype}")
        other = self.folder / "other"
        precision = {**dict.fromkeys(self._mixed_precision, False), "bf16": exact}
        training = {**self._training, **precision, "save_strategy": "no"}
        try:
            self._run(other, model=self.recipe.model.updated(dtype=dtype), training=training)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            return Check("precision", "not applicable", f"{dtype} does not fit into the memory of this machine")
        drifts = _relative_differences(whole, other)
        what = f"the loss differs by {drifts[0]:.2g} at the first step and {max(drifts):.2g} at most"
        what = f"{'float32' if exact else 'the recipe'} against {dtype}: {what}, {self.max_drift:g} allowed"
        return Check("precision", "pass" if max(drifts) <= self.max_drift else "fail", what)

    def _processes(self) -> Check:
        """Compare the same batches in one process, one after the other, and in several at once."""
        count, name = self.processes, "processes"
        if count == 1:
            return Check(name, "not applicable", "one device; --processes 2 compares two processes on the CPU")
        if STAGES[self.recipe.stage].samples_completions:
            return Check(name, "not applicable", "every rank samples its own completions")
        one, several = self.folder / "one", self.folder / "several"
        accumulation = self.recipe.training.get("gradient_accumulation_steps") or 1
        self.log(f"the batches of {count} processes in one")
        training = {**self._training, "save_strategy": "no"}
        self._run(one, training={**training, "gradient_accumulation_steps": count * accumulation})
        self.log(f"the same in {count} processes")
        path = self.folder / "several.yaml"
        path.write_text(to_yaml(self._short_recipe(several)), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += ["-m", "ernie_align", self.recipe.stage, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not (several / "final").exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()][:_SHOWN_LINES]
            return Check(name, "fail", "\n".join([f"{count} processes do not reach the end:", *lines]))
        if not (several / f"checkpoint-{self.steps}" / f"rng_state_{count - 1}.pth").exists():
            return Check(name, "fail", f"each of the {count} processes ran on its own")
        limit = _MAX_SUM_ERROR[self.recipe.model.dtype]
        worst = max(_relative_differences(one, several))
        what = f"1 against {count}: the loss differs by {worst:.2g} at most, {limit:g} allowed"
        return Check(name, "pass" if worst <= limit else "fail", what)

    # -- runs -------------------------------------------------------------------------------------------------------

    @property
    def _mixed_precision(self) -> dict[str, Any]:
        return {key: self.recipe.training.get(key) for key in ("bf16", "fp16")}

    @property
    def _training(self) -> dict[str, Any]:
        """The recipe's own keys, for a few steps, each of them logged, without evaluation."""
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

    def _short_recipe(self, run_dir: Path, **blocks: Any) -> Recipe:
        training = blocks.setdefault("training", self._training)
        batch = training.get("per_device_train_batch_size") or 8  # transformers' default
        accumulation = self.recipe.training.get("gradient_accumulation_steps") or 1
        rows = _ROW_FACTOR * self.steps * batch * accumulation * self.processes
        train = [block.updated(limit=min(block.limit or rows, rows)) for block in self.recipe.data.train]
        data = self.recipe.data.updated(train=train, eval=[])
        return self.recipe.updated(data=data, run=self.recipe.run.updated(dir=str(run_dir)), **blocks)

    def _run(self, run_dir: Path, *callbacks: TrainerCallback, resume: bool = False, **blocks: Any) -> None:
        import torch

        try:
            run(self._short_recipe(run_dir, **blocks), resume=resume, reporter=SilentReporter(*callbacks))
        finally:
            gc.collect()  # trainer and model refer to one another, and the next run needs their memory
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()


def _losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def _relative_differences(one: Path, other: Path) -> list[float]:
    """Difference of the losses at each step, relative to the first run's loss or to 1."""
    pairs = zip(_losses(one), _losses(other), strict=True)
    return [abs(expected - actual) / max(1, abs(expected)) for expected, actual in pairs]


def _differences(one: Path, other: Path) -> tuple[Verdict, str]:
    """Compare losses and finished weights bit by bit."""
    pairs = zip(_losses(one), _losses(other), strict=True)
    differing_steps = [step for step, (expected, actual) in enumerate(pairs, 1) if expected != actual]
    differing, worst, count = 0, 0.0, 0
    for expected, actual in _tensors(one / "final", other / "final"):
        count += 1
        if not expected.equal(actual):
            differing += 1
            worst = max(worst, (expected.float() - actual.float()).abs().max().item())
    if not differing_steps and not differing:
        return "pass", f"{len(_losses(one))} losses and {count} tensors are bit-equal"
    losses = f"the loss differs from step {differing_steps[0]} on" if differing_steps else "the losses are equal"
    return "fail", f"{losses}; {differing} of {count} tensors differ, by {worst:.2g} at most"


def _tensors(one: Path, other: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of both folders, one pair at a time: two whole models may not fit into memory."""
    from safetensors import safe_open

    for file in sorted(one.glob("*.safetensors")):
        with safe_open(file, "pt") as first, safe_open(other / file.name, "pt") as second:
            for name in first.keys():  # noqa: SIM118 (not a mapping)
                yield first.get_tensor(name), second.get_tensor(name)


class VisionTokenCounter(TrainerCallback):
    """Counts vision tokens in the backbone's input_ids, and the tokens that reach each pool of vision experts.

    Counts only during a forward: gradient checkpointing runs the pools once more during the backward.
    """

    def __init__(self) -> None:
        self.has_pools = False
        self.forwards = self.tokens = 0
        self.reached: dict[str, int] = {}
        self._in_forward = False
        self._handles: list[Any] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        pools = {name: block for name, block in find_expert_pools(model).items() if name.endswith("vision_moe")}
        self.has_pools = bool(pools)
        if not pools:
            return
        modality = ModalityTokens.from_config(model.config)
        backbone = model.get_submodule(next(iter(pools)).partition(".language_model.")[0])

        def before_backbone(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            self._in_forward = ids is not None
            if self._in_forward:
                self.forwards += 1
                self.tokens += int(moe_mm_token_type_ids(ids, modality).sum())

        def after_backbone(*_: Any) -> None:
            self._in_forward = False

        def before_pool(name: str) -> Callable[[Any, tuple], None]:
            def count(block: Any, args: tuple) -> None:
                if self._in_forward:
                    self.reached[name] += args[0].numel() // block.hidden_dim

            return count

        self._handles.append(backbone.register_forward_pre_hook(before_backbone, with_kwargs=True))
        self._handles.append(backbone.register_forward_hook(after_backbone))
        for name, block in pools.items():
            self.reached[name] = 0
            self._handles.append(block.register_forward_pre_hook(before_pool(name)))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        while self._handles:
            self._handles.pop().remove()

    def verdict(self) -> tuple[Verdict, str]:
        """Return if all vision tokens reached the vision experts, and the counts in words."""
        if not self.has_pools:
            return "not applicable", "the model has no vision experts"
        if not self.tokens:
            return "not applicable", "no image in the rows of these steps"
        for name, count in self.reached.items():
            if count != self.tokens:
                return "fail", f"{self.tokens} vision tokens, of which {count} reached {name}"
        what = f"{self.tokens} vision tokens in {self.forwards} forwards, all of which reached the vision experts"
        return "pass", f"{what} of each of {len(self.reached)} layers"
