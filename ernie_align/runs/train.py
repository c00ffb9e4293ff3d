"""The life of a run: recipe -> data -> model -> trainer -> checkpoint."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ernie_align.checkpoints import flush_to_disk, write_manifest
from ernie_align.data.load import SourceStats
from ernie_align.data.preview import TokenSpan, format_preview, preview_example
from ernie_align.models.distributed.layout import ParallelLayout
from ernie_align.models.load import Bundle, load_model
from ernie_align.models.pixels import pixel_backend
from ernie_align.models.text_parity import TextProbe, probe_text
from ernie_align.models.trainable_parts import ParameterSummary, parameter_summary
from ernie_align.recipe import Recipe
from ernie_align.runs.batch_size import examples_per_step, repeated_examples, training_summary
from ernie_align.runs.distributed import (
    RankGroup,
    check_world,
    collective_timeout,
    configure_deepspeed,
    configure_launch,
    init_distributed_state,
    rank0_loading_enabled,
    requested_sharding,
)
from ernie_align.runs.prepare import Setup, prepare_data, set_up
from ernie_align.runs.run_dir import RunDirectory, begin_together, latest_checkpoint
from ernie_align.stages.base import inherited_defaults

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ernie_align.runs.callbacks.graceful_stop import GracefulStop, Signals


class Reporter(Protocol):
    """Who tells the user what happens."""

    def log(self, line: str) -> None:
        """One line."""

    def parameter_summary(self, table: ParameterSummary) -> None:
        """What is trained."""

    def sources(self, counts: list[SourceStats]) -> None:
        """What became of the rows."""

    def preview_example(self, parts: dict[str, list[TokenSpan]]) -> None:
        """One example as the model will see it."""

    def progress(self) -> list[TrainerCallback]:
        """Callbacks that show training as it goes."""

    def text_parity(self, probe: TextProbe, unchanged: bool) -> None:
        """Whether text is answered as before, bit for bit."""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    final: folder of the model or adapter; metrics: of the evaluation at its end, if there is one;
    text_unchanged: whether text logits are bit-identical before and after, where the scope promises it.
    """

    directory: Path
    final: Path
    metrics: dict[str, float]
    text_unchanged: bool | None = None


def run(
    recipe: Recipe, *, resume: bool = False, parallel: ParallelLayout | None = None, reporter: Reporter
) -> RunResult:
    """Train what the recipe says, into `run.dir`.

    resume: go on from the newest whole checkpoint in run.dir, or begin if there is none; a finished run stays as it is;
    parallel: share the model out over the processes so, beyond what the launcher does.
    Raises the AlignError that fits, Interrupted where a signal stopped it; whatever ends the run, its whole checkpoints
    stay.
    """
    from ernie_align.runs.callbacks.graceful_stop import handle_signals

    state = init_distributed_state(recipe)
    directory = RunDirectory(recipe.run.dir, where=recipe.run.where("dir"))
    setup = set_up(recipe)
    recipe = setup.recipe
    adapters = getattr(recipe, "adapter", None) is not None
    where = recipe.model.where("name")
    configure_launch(
        state,
        setup.architecture,
        stage=setup.stage,
        adapters=adapters,
        where=where,
        parallel=parallel,
        beforehand=setup.stage.needs_unsharded_model(recipe),
    )
    config = setup.stage.configure(recipe, recipe.run.dir)  # what TRL refuses is refused before anything is made
    configure_deepspeed(config, setup.architecture, setup.stage)
    with handle_signals(directory) as signals:
        try:
            processes = RankGroup(collective_timeout(recipe))
            begin_together(directory, recipe, config, reporter, resume=resume, parallel=parallel, processes=processes)
            if directory.final.exists():
                reporter.log(f"{directory.path} is finished already")
                return RunResult(directory.path, directory.final, {}, directory.facts().get("text_unchanged"))
            how = {"resume": resume, "parallel": parallel, "processes": processes, "signals": signals}
            return _train(setup, config, directory, reporter, **how)
        finally:
            directory.release()


def _train(
    setup: Setup,
    config: Any,
    directory: RunDirectory,
    reporter: Reporter,
    *,
    resume: bool,
    parallel: ParallelLayout | None,
    processes: RankGroup,
    signals: Signals,
) -> RunResult:
    from transformers import PrinterCallback

    from ernie_align.runs.callbacks.checkpointer import peak_memory
    from ernie_align.runs.callbacks.graceful_stop import GracefulStop, NothingLeft
    from ernie_align.runs.failures import explain_failures

    recipe, is_main = setup.recipe, processes.is_first
    for note in setup.notes:
        reporter.log(note)
    for key, value in inherited_defaults(recipe).items():
        reporter.log(f"training.{key} is not set: {value}")
    if setup.architecture.has_vision:
        reporter.log(f"images become pixels by {pixel_backend()}")
    reporter.parameter_summary(setup.parameter_summary)

    data = prepare_data(setup, cache=directory.cache if is_main else None)
    example = preview_example(data.first(), setup.renderer)
    reporter.sources(data.counts)
    reporter.preview(example)
    unseen = sum(count.without_images for count in data.counts[: len(recipe.data.train)])
    if setup.parameter_summary.trains_only_vision and unseen:
        reporter.log(f"{unseen} training examples show no image: nothing in scope learns from them")
    layout = setup.stage.batching_summary(recipe, None if recipe.data.streaming else data.train["length"][:])
    for line in layout:
        reporter.log(line)
    if is_main:
        if layout:
            directory.note(layout=layout)
        directory.write("coverage.json", [asdict(row) for row in setup.parameter_summary.rows])
        directory.write("data.json", [asdict(count) for count in data.counts])
        directory.write("preview.txt", format_preview(example))

    checkpoint = latest_checkpoint(directory, reporter, processes) if resume else None
    why = setup.stage.needs_unsharded_model(recipe)
    if why and requested_sharding() == "FSDP":
        reporter.log(f"every process reads the whole model: {why}")
    bundle = load_for_training(setup, checkpoint, parallel)
    stop = GracefulStop(directory, signals, processes)
    callbacks = _callbacks(directory, bundle, recipe, reporter, stop)
    trainer = stop.trainer = setup.stage.build_trainer(recipe, config, bundle, data, callbacks)
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dict
    reporter.log(check_world(trainer.accelerator, trainer.model))
    kind = "packs" if recipe.training.get("packing") else "examples"
    reporter.log(training_summary(config, f"{examples_per_step(config, parallel)} {kind}"))
    again = repeated_examples(config, parallel, trainer.train_dataset)
    if again:
        reporter.log(f"the last batches of an epoch see {again} examples again, so that all processes have as many")
    probe = _first_text_logits(setup, bundle, directory, processes)
    with explain_failures(directory, trainer, processes):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except NothingLeft:
            trainer._finalize_training(None, 0, time.time())
        if stop.stopped:
            raise stop.ended(trainer.state.global_step)
        metrics = trainer.evaluate() if data.eval is not None else {}
    unchanged = None
    if probe is not None:
        # accelerate has wrapped the forward in autocast: like is compared with like
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        unchanged = _certify(probe, probe_text(bundle), reporter)

    partial = directory.path / "final.partial"
    trainer.save_model(str(partial))
    processes.wait()
    if is_main:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle of Trainer's; run.dir says it all in text
        bundle.save_processor(str(partial))
        write_manifest(partial)
        directory.write("data.json", [asdict(count) for count in data.counts])  # a stream is counted only now
        directory.note(text_unchanged=unchanged, metrics=metrics, peak_memory_gb=peak_memory())
        partial.replace(directory.final)
        flush_to_disk(directory.path)
        directory.finish()
    processes.wait()
    reporter.log(f"finished: {directory.final}")
    return RunResult(directory.path, directory.final, metrics, unchanged)


def load_for_training(setup: Setup, checkpoint: Path | None, parallel: ParallelLayout | None = None) -> Bundle:
    from transformers import set_seed

    block = setup.recipe.model
    holds_model = checkpoint is not None and not (checkpoint / "adapter_config.json").exists()
    bundle = load_model(
        block.name,
        dtype=block.dtype,
        revision=block.revision,
        attention=block.attention,
        where=block.where("name"),
        # Trainer restores a full model with strict=False, which finds 3 of 98 tensors of a VL checkpoint: so the model
        # is built from the checkpoint, and what Trainer then finds changes nothing
        weights=str(checkpoint) if holds_model else None,
        parallel=parallel,
        adapters=getattr(setup.recipe, "adapter", None) is not None,
        first_reads=rank0_loading_enabled(),
    )
    set_seed(setup.recipe.run.seed)  # a fresh adapter is drawn at random
    trained = setup.stage.prepare_model(setup.recipe, bundle)
    if parameter_summary(bundle.architecture, trained) != setup.parameter_summary:
        raise AssertionError("the loaded model trains something else than was shown")
    return bundle


def _callbacks(
    directory: RunDirectory, bundle: Bundle, recipe: Recipe, reporter: Reporter, stop: GracefulStop
) -> list[TrainerCallback]:
    """The order matters: a stop asks for a checkpoint, for which there must be room, and then room for the next."""
    from ernie_align.runs.callbacks.checkpointer import Checkpointer, MetricsWriter
    from ernie_align.runs.callbacks.disk_space import DiskSpaceGuard
    from ernie_align.runs.callbacks.speed_monitor import SpeedMonitor

    clock = SpeedMonitor(reporter.log)
    keeper = Checkpointer(directory, bundle, recipe.training.get("save_total_limit"))
    if not stop.processes.is_first:
        return [stop, keeper]
    return [
        *reporter.progress(),
        MetricsWriter(directory, clock),
        stop,
        keeper,
        DiskSpaceGuard(directory, reporter.log),
        clock,
    ]


def _first_text_logits(setup: Setup, bundle: Bundle, directory: RunDirectory, processes: RankGroup) -> TextProbe | None:
    """Where nothing is trained that text touches: what the model said to text when the run began.

    Taken once the trainer has put the model on its device; a resumed run goes by what its first start kept.
    """
    if not (setup.architecture.has_vision and setup.parameter_summary.trains_only_vision):
        return None
    kept = directory.facts().get("text_logits")
    if kept is not None:
        return TextProbe(**kept)
    if rank0_loading_enabled():  # and the others have no weights yet
        probe = processes.of_first(probe_text(bundle) if processes.is_first else None)
    else:
        probe = probe_text(bundle)
    if processes.is_first:
        directory.note(text_logits=asdict(probe))
    return probe


def _certify(before: TextProbe, after: TextProbe, reporter: Reporter) -> bool | None:
    if before.machine != after.machine:
        reporter.log(f"no certificate: the run began on {before.machine} and ended on {after.machine}")
        return None
    unchanged = before.digest == after.digest
    reporter.text_parity(before, unchanged)
    return unchanged
