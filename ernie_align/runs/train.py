"""The life of a run: recipe -> launch checks -> folder -> data -> model -> trainer -> finished model."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.data.preview import format_preview, preview_example
from ernie_align.models.distributed.layout import ParallelLayout
from ernie_align.models.load import Bundle
from ernie_align.models.pixels import pixel_backend
from ernie_align.models.text_parity import TextProbe, probe_text
from ernie_align.recipe import Recipe
from ernie_align.runs.distributed import (
    RankGroup,
    check_world,
    collective_timeout,
    configure_deepspeed,
    configure_launch,
    examples_per_step,
    init_distributed_state,
    rank0_loading_enabled,
    repeated_examples,
    requested_sharding,
)
from ernie_align.runs.prepare import Setup, load_for_training, prepare_data, set_up
from ernie_align.runs.reporter import Reporter
from ernie_align.runs.run_dir import RunDirectory, latest_checkpoint, open_run
from ernie_align.stages import Datasets
from ernie_align.stages.base import inherited_defaults

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from ernie_align.runs.callbacks.graceful_stop import GracefulStop


@dataclass(frozen=True)
class RunResult:
    """The outcome of a finished run.

    final: folder of the model or adapter; metrics: of the evaluation at the end, if there is one; text_unchanged: text
    logits are bit-identical before and after, None if the scope does not promise it.
    """

    directory: Path
    final: Path
    metrics: dict[str, float]
    text_unchanged: bool | None = None


def run(
    recipe: Recipe, *, resume: bool = False, parallel: ParallelLayout | None = None, reporter: Reporter
) -> RunResult:
    """Train what the recipe says and write the result into `run.dir`.

    resume: continue from the newest complete checkpoint in run.dir, or start at step 0 if there is none; a finished run
    is left as it is; parallel: tensor and expert parallelism, besides what the launcher does.
    Raises AlignError, Interrupted if a signal stopped the run. Complete checkpoints are kept however it ends.
    """
    from ernie_align.runs.callbacks.graceful_stop import GracefulStop, handle_signals
    from ernie_align.runs.failures import explain_failures

    state = init_distributed_state(recipe)
    setup = set_up(recipe)
    recipe, stage = setup.recipe, setup.stage
    configure_launch(state, setup, parallel)
    config = stage.configure(recipe, recipe.run.dir)  # TRL rejects invalid values before anything is written
    configure_deepspeed(config, setup)
    run_dir = RunDirectory(recipe.run.dir, where=recipe.run.where("dir"))
    with handle_signals(run_dir) as signals, run_dir:
        ranks = RankGroup(collective_timeout(recipe))
        examples = examples_per_step(config, parallel)
        open_run(run_dir, recipe, reporter, ranks, resume=resume, examples_per_step=examples)
        if run_dir.final.exists():
            reporter.log(f"{run_dir.path} is already finished")
            return RunResult(run_dir.path, run_dir.final, {}, run_dir.facts().get("text_unchanged"))
        _report_setup(setup, reporter)
        datasets = _prepare_data(setup, run_dir, reporter, ranks)
        checkpoint = latest_checkpoint(run_dir, reporter, ranks) if resume else None
        bundle = load_for_training(setup, checkpoint, parallel)
        stop = GracefulStop(run_dir, signals, ranks)
        callbacks = _callbacks(run_dir, bundle, recipe, reporter, stop)
        trainer = stop.trainer = stage.build_trainer(recipe, config, bundle, datasets, callbacks)
        _report_trainer(trainer, recipe, parallel, reporter)
        text_before = _probe_text_at_start(setup, bundle, run_dir, ranks)
        with explain_failures(run_dir, trainer, ranks):
            _train(trainer, checkpoint, stop)
            metrics = trainer.evaluate() if datasets.eval is not None else {}
        unchanged = _compare_text(text_before, trainer, bundle, reporter) if text_before is not None else None
        _save_final(trainer, bundle, datasets, run_dir, ranks, text_unchanged=unchanged, metrics=metrics)
        reporter.log(f"finished: {run_dir.final}")
        return RunResult(run_dir.path, run_dir.final, metrics, unchanged)


def _report_setup(setup: Setup, reporter: Reporter) -> None:
    for note in setup.notes:
        reporter.log(note)
    for key, value in inherited_defaults(setup.recipe).items():
        reporter.log(f"training.{key} is not set: {value}")
    if setup.architecture.has_vision:
        reporter.log(f"images are converted to pixels by {pixel_backend()}")
    unsharded = setup.stage.needs_unsharded_model(setup.recipe)
    if unsharded and requested_sharding() == "FSDP":
        reporter.log(f"every process reads the whole model: {unsharded}")
    reporter.parameter_summary(setup.parameter_summary)


def _prepare_data(setup: Setup, run_dir: RunDirectory, reporter: Reporter, ranks: RankGroup) -> Datasets:
    """Encode the rows, report on them, and write down everything known before the model is loaded."""
    recipe, summary = setup.recipe, setup.parameter_summary
    datasets = prepare_data(setup, cache=run_dir.cache if ranks.is_main else None)
    example = preview_example(datasets.first(), setup.renderer)
    reporter.sources(datasets.counts)
    reporter.preview(example)
    without_images = sum(count.without_images for count in datasets.counts[: len(recipe.data.train)])
    if summary.trains_only_vision and without_images:
        reporter.log(f"{without_images} training examples have no image: nothing that is trained learns from them")
    batching = setup.stage.batching_summary(recipe, None if recipe.data.streaming else datasets.train["length"][:])
    for line in batching:
        reporter.log(line)
    if ranks.is_main:
        run_dir.write_overview(summary, datasets.counts, format_preview(example), batching)
    return datasets


def _callbacks(
    run_dir: RunDirectory, bundle: Bundle, recipe: Recipe, reporter: Reporter, stop: GracefulStop
) -> list[TrainerCallback]:
    """Return the callbacks. Their order matters: a stop requests a checkpoint, for which disk space is checked next."""
    from ernie_align.runs.callbacks.checkpointer import Checkpointer
    from ernie_align.runs.callbacks.disk_space import DiskSpaceGuard
    from ernie_align.runs.callbacks.speed_monitor import MetricsWriter, SpeedMonitor

    checkpointer = Checkpointer(run_dir, bundle, recipe.training.get("save_total_limit"))
    if not stop.ranks.is_main:
        return [*reporter.progress(), stop, checkpointer]
    speed = SpeedMonitor(reporter.log)
    metrics = MetricsWriter(run_dir, speed)
    return [*reporter.progress(), metrics, stop, checkpointer, DiskSpaceGuard(run_dir, reporter.log), speed]


def _report_trainer(trainer: Trainer, recipe: Recipe, parallel: ParallelLayout | None, reporter: Reporter) -> None:
    """Report the ranks and what a step is, most of which is often TRL's default."""
    config = trainer.args
    reporter.log(check_world(trainer.accelerator, trainer.model))
    length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    batch = f"{examples_per_step(config, parallel)} {'packs' if recipe.training.get('packing') else 'examples'}"
    rate = f"learning rate {config.learning_rate:g}, {config.lr_scheduler_type.value!s}"
    checkpointing = "on" if config.gradient_checkpointing else "off"
    reporter.log(f"{length} of {batch}, {rate}, gradient checkpointing {checkpointing}")
    repeated = repeated_examples(config, parallel, trainer.train_dataset)
    if repeated:
        reporter.log(f"{repeated} examples are repeated at the end of an epoch, so that all ranks have as many batches")


def _train(trainer: Trainer, checkpoint: Path | None, stop: GracefulStop) -> None:
    """Train to the last step. Raises Interrupted if a signal stopped it."""
    from transformers import PrinterCallback

    from ernie_align.runs.callbacks.graceful_stop import AlreadyAtLastStep

    trainer.remove_callback(PrinterCallback)  # it prints every log as a dict
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AlreadyAtLastStep:
        trainer._finalize_training(None, 0, time.time())
    if stop.stopped:
        raise stop.error(trainer.state.global_step)


def _probe_text_at_start(setup: Setup, bundle: Bundle, run_dir: RunDirectory, ranks: RankGroup) -> TextProbe | None:
    """Probe the logits of text before the first step, if nothing is trained that text uses; None otherwise.

    The trainer must have moved the model to its device. A resumed run reads the probe of its first start.
    """
    if not (setup.architecture.has_vision and setup.parameter_summary.trains_only_vision):
        return None
    stored = run_dir.facts().get("text_logits")
    if stored is not None:
        return TextProbe(**stored)
    if rank0_loading_enabled():  # the other ranks have no weights yet
        probe = ranks.broadcast(probe_text(bundle) if ranks.is_main else None)
    else:
        probe = probe_text(bundle)
    if ranks.is_main:
        run_dir.add_facts(text_logits=asdict(probe))
    return probe


def _compare_text(before: TextProbe, trainer: Trainer, bundle: Bundle, reporter: Reporter) -> bool | None:
    """Return if text has the same logits as before training; None if they come from two kinds of machine."""
    # Accelerate has wrapped the forward in autocast, which the first probe did not have.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    after = probe_text(bundle)
    if before.machine != after.machine:
        reporter.log(f"text parity is not checked: the run started on {before.machine} and ended on {after.machine}")
        return None
    unchanged = before.digest == after.digest
    reporter.text_parity(before, unchanged)
    return unchanged


def _save_final(
    trainer: Trainer, bundle: Bundle, datasets: Datasets, run_dir: RunDirectory, ranks: RankGroup, **facts: Any
) -> None:
    """Save the finished model or adapter. facts: added to run.json."""
    from ernie_align.runs.callbacks.speed_monitor import peak_memory

    partial = run_dir.path / "final.partial"
    trainer.save_model(str(partial))
    ranks.barrier()
    if ranks.is_main:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; the run directory has it all as text
        bundle.save_processor(str(partial))
        run_dir.publish_final(partial, datasets.counts, **facts, peak_memory_gb=peak_memory())
    ranks.barrier()
