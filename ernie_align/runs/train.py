"""The life of a run: recipe -> data -> model -> trainer -> checkpoint."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ernie_align.data.load import SourceCount
from ernie_align.data.preview import Stretch, as_text, preview
from ernie_align.errors import AlignError, RunError
from ernie_align.models.certificate import TextLogits, text_logits
from ernie_align.models.environment import environment
from ernie_align.models.load import Bundle, load_model
from ernie_align.models.pixels import pixel_backend
from ernie_align.models.scopes import Coverage, coverage
from ernie_align.models.seal import flush, seal
from ernie_align.models.sharding import Parallel
from ernie_align.recipe import Recipe, to_yaml
from ernie_align.runs.directory import RunDirectory
from ernie_align.runs.launched import asked_for, first_reads, prepare_processes, prepare_zero, prove_processes
from ernie_align.runs.processes import Processes, begin_processes, timeout_of
from ernie_align.runs.setup import Setup, prepare_data, set_up
from ernie_align.stages import Batches
from ernie_align.stages.base import inherited_defaults

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ernie_align.runs.stopping import Signals, StopAtStepEnd


class Reporter(Protocol):
    """Who tells the user what happens."""

    def say(self, line: str) -> None:
        """One line."""

    def coverage(self, table: Coverage) -> None:
        """What is trained."""

    def sources(self, counts: list[SourceCount]) -> None:
        """What became of the rows."""

    def preview(self, parts: dict[str, list[Stretch]]) -> None:
        """One example as the model will see it."""

    def progress(self) -> list[TrainerCallback]:
        """Callbacks that show training as it goes."""

    def certificate(self, probe: TextLogits, unchanged: bool) -> None:
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


def run(recipe: Recipe, *, resume: bool = False, parallel: Parallel | None = None, reporter: Reporter) -> RunResult:
    """Train what the recipe says, into `run.dir`.

    resume: go on from the newest whole checkpoint in run.dir, or begin if there is none; a finished run stays as it is;
    parallel: share the model out over the processes so, beyond what the launcher does.
    Raises the AlignError that fits, Interrupted where a signal stopped it; whatever ends the run, its whole checkpoints
    stay.
    """
    from ernie_align.runs.stopping import listening

    state = begin_processes(recipe)
    directory = RunDirectory(recipe.run.dir, where=recipe.run.where("dir"))
    setup = set_up(recipe)
    recipe = setup.recipe
    adapters = getattr(recipe, "adapter", None) is not None
    where = recipe.model.where("name")
    prepare_processes(
        state,
        setup.anatomy,
        stage=recipe.stage,
        adapters=adapters,
        where=where,
        parallel=parallel,
        beforehand=setup.stage.beforehand(recipe),
    )
    config = setup.stage.configure(recipe, recipe.run.dir)  # what TRL refuses is refused before anything is made
    prepare_zero(config, setup.anatomy, recipe.stage)
    with listening(directory) as signals:
        try:
            processes = Processes(timeout_of(recipe))
            _begin_together(directory, recipe, config, reporter, resume=resume, parallel=parallel, processes=processes)
            if directory.final.exists():
                reporter.say(f"{directory.path} is finished already")
                return RunResult(directory.path, directory.final, {}, directory.facts().get("text_unchanged"))
            how = {"resume": resume, "parallel": parallel, "processes": processes, "signals": signals}
            return _train(setup, config, directory, reporter, **how)
        finally:
            directory.release()


def _begin_together(
    directory: RunDirectory,
    recipe: Recipe,
    config: Any,
    reporter: Reporter,
    *,
    resume: bool,
    parallel: Parallel | None,
    processes: Processes,
) -> None:
    """The first process takes the folder. Where it cannot, none goes on to wait for it."""
    fault: AlignError | None = None
    if processes.is_first:
        try:
            _begin(directory, recipe, reporter, resume=resume, examples_a_step=_examples_a_step(config, parallel))
        except AlignError as error:
            fault = error
    may_begin = processes.of_first(fault is None)
    if fault is not None:
        raise fault
    if not may_begin:
        raise RunError.at(directory.where, "the first process could not begin", fix="see what it says")
    holder = processes.of_first(directory.holder())
    is_here = directory.is_held_by(holder)
    if processes.any(not is_here):
        what = f"{directory.path} is not the folder that the first process holds ({holder})"
        what = "another process finds no such folder" if is_here else what
        raise RunError.at(directory.where, what, fix="name a folder on a disk that all machines share")


def _begin(directory: RunDirectory, recipe: Recipe, reporter: Reporter, *, resume: bool, examples_a_step: int) -> None:
    resolved = to_yaml(recipe)
    goes_on = directory.begin(resolved, resume=resume, examples_a_step=examples_a_step)
    for name in directory.sweep():
        reporter.say(f"removed {name}: left by a run that was killed")
    if directory.final.exists():
        directory.finish()
    elif not goes_on:
        directory.write("recipe.yaml", recipe.as_given)
        directory.write("recipe.resolved.yaml", resolved)
        directory.note(environment=environment(), examples_a_step=examples_a_step)


def _train(
    setup: Setup,
    config: Any,
    directory: RunDirectory,
    reporter: Reporter,
    *,
    resume: bool,
    parallel: Parallel | None,
    processes: Processes,
    signals: Signals,
) -> RunResult:
    from transformers import PrinterCallback

    from ernie_align.runs.endings import explained
    from ernie_align.runs.keep import peak_memory
    from ernie_align.runs.stopping import NothingLeft, StopAtStepEnd

    recipe, is_main = setup.recipe, processes.is_first
    for note in setup.notes:
        reporter.say(note)
    for key, value in inherited_defaults(recipe).items():
        reporter.say(f"training.{key} is not set: {value}")
    if setup.anatomy.has_vision:
        reporter.say(f"images become pixels by {pixel_backend()}")
    reporter.coverage(setup.coverage)

    data = prepare_data(setup, cache=directory.cache if is_main else None)
    example = preview(data.first(), setup.renderer)
    reporter.sources(data.counts)
    reporter.preview(example)
    unseen = sum(count.without_images for count in data.counts[: len(recipe.data.train)])
    if setup.coverage.leaves_text_alone and unseen:
        reporter.say(f"{unseen} training examples show no image: nothing in scope learns from them")
    layout = setup.stage.layout(recipe, None if recipe.data.streaming else data.train["length"][:])
    for line in layout:
        reporter.say(line)
    if is_main:
        if layout:
            directory.note(layout=layout)
        directory.write("coverage.json", [asdict(row) for row in setup.coverage.rows])
        directory.write("data.json", [asdict(count) for count in data.counts])
        directory.write("preview.txt", as_text(example))

    checkpoint = _where_to_go_on(directory, reporter, processes) if resume else None
    why = setup.stage.beforehand(recipe)
    if why and asked_for() == "FSDP":
        reporter.say(f"every process reads the whole model: {why}")
    bundle = _load(setup, checkpoint, parallel)
    batches = Batches(data.train, data.eval, data.row_name, setup.renderer, data.beside)
    stop = StopAtStepEnd(directory, signals, processes)
    callbacks = _callbacks(directory, bundle, recipe, reporter, stop)
    trainer = stop.trainer = setup.stage.build_trainer(recipe, config, bundle, batches, callbacks)
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dict
    reporter.say(prove_processes(trainer.accelerator, trainer.model))
    kind = "packs" if recipe.training.get("packing") else "examples"
    reporter.say(_pace(config, f"{_examples_a_step(config, parallel)} {kind}"))
    repeated = _repeated(config, parallel, trainer.train_dataset)
    if repeated:
        reporter.say(f"the last batches of an epoch see {repeated} examples again, so that all processes have as many")
    probe = _first_text_logits(setup, bundle, directory, processes)
    with explained(directory, trainer, processes):
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
        unchanged = _certify(probe, text_logits(bundle), reporter)

    partial = directory.path / "final.partial"
    trainer.save_model(str(partial))
    processes.wait()
    if is_main:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle of Trainer's; run.dir says it all in text
        bundle.save_processor(str(partial))
        seal(partial)
        directory.write("data.json", [asdict(count) for count in data.counts])  # a stream is counted only now
        directory.note(text_unchanged=unchanged, metrics=metrics, peak_memory_gb=peak_memory())
        partial.replace(directory.final)
        flush(directory.path)
        directory.finish()
    processes.wait()
    reporter.say(f"finished: {directory.final}")
    return RunResult(directory.path, directory.final, metrics, unchanged)


def _batches(config: Any, parallel: Parallel | None) -> int:
    """Processes that have batches of their own: neighbours between which matrices are cut share one."""
    return config.world_size // (parallel.tp_size if parallel else 1)


def _examples_a_step(config: Any, parallel: Parallel | None) -> int:
    """Of all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * _batches(config, parallel)


def _pace(config: Any, of_a_step: str) -> str:
    """What the steps are, most of it often TRL's defaults. of_a_step: how many examples, and what they are called."""
    length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    checkpointing = "on" if config.gradient_checkpointing else "off"
    rate = f"learning rate {config.learning_rate:g}, {config.lr_scheduler_type.value!s}"
    return f"{length} of {of_a_step}, {rate}, gradient checkpointing {checkpointing}"


def _repeated(config: Any, parallel: Parallel | None, examples: Any) -> int:
    """Examples that fill the last batches of an epoch, of several processes, to one size."""
    batches = _batches(config, parallel)
    if batches == 1 or config.dataloader_drop_last or not hasattr(examples, "__len__"):
        return 0
    return -len(examples) % (config.per_device_train_batch_size * batches)


def _where_to_go_on(directory: RunDirectory, reporter: Reporter, processes: Processes) -> Path | None:
    found = directory.newest_whole_checkpoint(hashes=True) if processes.is_first else None
    checkpoint, passed_over = processes.of_first(found)
    for reason in passed_over:
        reporter.say(f"passed over {reason}")
    reporter.say(f"resuming from {checkpoint}" if checkpoint else "no whole checkpoint: beginning at step 0")
    if processes.is_first:
        directory.keep_metrics(_lines_logged(checkpoint) if checkpoint else 0)
    return checkpoint


def _lines_logged(checkpoint: Path) -> int:
    """Trainer remembers every log of the run, and each of them is a line of metrics.jsonl."""
    return len(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"])


def _load(setup: Setup, checkpoint: Path | None, parallel: Parallel | None = None) -> Bundle:
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
        first_reads=first_reads(),
    )
    set_seed(setup.recipe.run.seed)  # a fresh adapter is drawn at random
    trained = setup.stage.wrap(setup.recipe, bundle)
    if coverage(bundle.anatomy, trained) != setup.coverage:
        raise AssertionError("the loaded model trains something else than was shown")
    return bundle


def _callbacks(
    directory: RunDirectory, bundle: Bundle, recipe: Recipe, reporter: Reporter, stop: StopAtStepEnd
) -> list[TrainerCallback]:
    """The order matters: a stop asks for a checkpoint, for which there must be room, and then room for the next."""
    from ernie_align.runs.clock import StepClock
    from ernie_align.runs.keep import CheckpointKeeper, MetricsKeeper
    from ernie_align.runs.space import SpaceKeeper

    clock = StepClock(reporter.say)
    keeper = CheckpointKeeper(directory, bundle, recipe.training.get("save_total_limit"))
    if not stop.processes.is_first:
        return [stop, keeper]
    return [
        *reporter.progress(),
        MetricsKeeper(directory, clock),
        stop,
        keeper,
        SpaceKeeper(directory, reporter.say),
        clock,
    ]


def _first_text_logits(
    setup: Setup, bundle: Bundle, directory: RunDirectory, processes: Processes
) -> TextLogits | None:
    """Where nothing is trained that text touches: what the model said to text when the run began.

    Taken once the trainer has put the model on its device; a resumed run goes by what its first start kept.
    """
    if not (setup.anatomy.has_vision and setup.coverage.leaves_text_alone):
        return None
    kept = directory.facts().get("text_logits")
    if kept is not None:
        return TextLogits(**kept)
    if first_reads():  # and the others have no weights yet
        probe = processes.of_first(text_logits(bundle) if processes.is_first else None)
    else:
        probe = text_logits(bundle)
    if processes.is_first:
        directory.note(text_logits=asdict(probe))
    return probe


def _certify(before: TextLogits, after: TextLogits, reporter: Reporter) -> bool | None:
    if before.machine != after.machine:
        reporter.say(f"no certificate: the run began on {before.machine} and ended on {after.machine}")
        return None
    unchanged = before.digest == after.digest
    reporter.certificate(before, unchanged)
    return unchanged
