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

from transformers import TrainerCallback

from ernie_align.errors import ModelError, RunError
from ernie_align.models.routing import ModalityTokens, moe_mm_token_type_ids
from ernie_align.models.routing_stats import find_expert_pools
from ernie_align.recipe import Recipe, to_yaml
from ernie_align.runs.train import run
from ernie_align.stages import STAGES

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
    recipe: Recipe, *, steps: int = 4, processes: int | None = None, log: Callable[[str], None] = lambda line: None
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
        return _Selfcheck(recipe, steps, processes, Path(folder), log).checks()


@dataclass(frozen=True)
class _Selfcheck:
    recipe: Recipe
    steps: int
    processes: int
    folder: Path
    log: Callable[[str], None]

    def checks(self) -> list[Check]:
        from ernie_align.runs.selfcheck import VisionTokenCounter

        whole = self.folder / "whole"
        counter = VisionTokenCounter()
        self.log(f"{self.steps} steps, with a checkpoint after {self.steps // 2}")
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
        self.log(f"resumed after {self.steps // 2} of them")
        again, middle = self.folder / "again", f"checkpoint-{self.steps // 2}"
        shutil.copytree(whole, again, ignore=shutil.ignore_patterns("final", "checkpoint-*"))
        (whole / middle).rename(again / middle)
        for later in whole.glob("checkpoint-*"):
            shutil.rmtree(later)
        self._run(again, resume=True)
        return self._bit_equal("resume", whole, again, "stopped and resumed, or not")

    def _repeat(self, whole: Path) -> Check:
        self.log("all of them again, with the same seed")
        twice = self.folder / "twice"
        self._run(twice, training={**self._training, "save_strategy": "no"})
        return self._bit_equal("repeat", whole, twice, "run twice")

    def _precision(self, whole: Path) -> Check:
        """As asked for, against float32; float32 against bfloat16."""
        if STAGES[self.recipe.stage].samples_completions:
            return Check("precision", "not applicable", "rollouts of two precisions are other texts")
        exact = self.recipe.model.dtype == "float32" and not any(self._mixed.values())
        dtype = "bfloat16" if exact else "float32"
        self.log(f"all of them in {dtype}")
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
        if STAGES[self.recipe.stage].samples_completions:
            return Check(name, "not applicable", "each process draws rollouts of its own")
        one, all_ = self.folder / "one", self.folder / "all"
        accumulation = self.recipe.training.get("gradient_accumulation_steps") or 1
        self.log(f"the batches of {count} processes in one")
        training = {**self._training, "save_strategy": "no"}
        self._run(one, training={**training, "gradient_accumulation_steps": count * accumulation})
        self.log(f"the same in {count} processes")
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

    def log(self, *told: Any) -> None:
        pass

    parameter_summary = sources = preview = text_parity = log


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


class VisionTokenCounter(TrainerCallback):
    """Counts at the backbone's door, by input_ids, and at the door of each pool of vision experts.

    Only while a forward lasts: with gradient checkpointing the pools are entered again on the way back.
    """

    def __init__(self) -> None:
        self.has_pools = False
        self.forwards = self.tokens = 0
        self.reached: dict[str, int] = {}
        self._inside = False
        self._handles: list[Any] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        blocks = {name: block for name, block in find_expert_pools(model).items() if name.endswith("vision_moe")}
        self.has_pools = bool(blocks)
        if not blocks:
            return
        modality = ModalityTokens.from_config(model.config)
        backbone = model.get_submodule(next(iter(blocks)).partition(".language_model.")[0])

        def enter(module: Any, given: tuple, named: dict[str, Any]) -> None:
            ids = named.get("input_ids", given[0] if given else None)
            self._inside = ids is not None
            if self._inside:
                self.forwards += 1
                self.tokens += int(moe_mm_token_type_ids(ids, modality).sum())

        def leave(*_: Any) -> None:
            self._inside = False

        def reach(name: str):
            def count(block: Any, given: tuple) -> None:
                if self._inside:
                    self.reached[name] += given[0].numel() // block.hidden_dim

            return count

        self._handles.append(backbone.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(backbone.register_forward_hook(leave))
        for name, block in blocks.items():
            self.reached[name] = 0
            self._handles.append(block.register_forward_pre_hook(reach(name)))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        while self._handles:
            self._handles.pop().remove()

    def verdict(self) -> tuple[Literal["pass", "fail", "not applicable"], str]:
        """What was found, and in words."""
        if not self.has_pools:
            return "not applicable", "a model with one pool of experts, or none"
        if not self.tokens:
            return "not applicable", "no image in the rows of these steps"
        for name, count in self.reached.items():
            if count != self.tokens:
                return "fail", f"{self.tokens} vision tokens, of which {count} reached {name}"
        what = f"{self.tokens} vision tokens in {self.forwards} forwards, all of which reached the vision experts"
        return "pass", f"{what} of each of {len(self.reached)} layers"
