"""Plan a recipe on given hardware: parameters, memory, time, and the smallest change that fits if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ernie_align.models.architecture import Architecture
from ernie_align.models.trainable_parts import ParameterSummary, parameter_summary
from ernie_align.planning.compute import EFFICIENCY, Gpu, StepCost, parse_gpu, step_cost
from ernie_align.planning.memory import MemoryEstimate, estimate_memory, weight_bytes
from ernie_align.planning.workload import ModelShape, Strategy, Workload, load_config
from ernie_align.recipe import Recipe
from ernie_align.stages import STAGES

BITS = (16, 8, 4, 2)
_CONTEXTS = (4096, 32768, 131072)
_VISION = 0.5
_MIN_LENGTH = 512  # tokens: a shorter data.max_length changes the task
_MAX_GPUS = 64


@dataclass(frozen=True)
class Change:
    """A change of a recipe. description: in the words of the recipe or the command line; peak: bytes with it."""

    description: str
    workload: Workload
    peak: float


@dataclass(frozen=True)
class CalculatorRow:
    """A row of the calculator, in bytes.

    serving: weights and the cache of one sequence of `context` tokens; training: the peak of this recipe on such a
    base with rows of that length, if it trains adapters.
    """

    bits: int
    context: int
    weights: float
    cache: float
    serving: float
    training: float | None


@dataclass(frozen=True)
class Plan:
    """The resources that a recipe needs, in bytes on each device. sizes_from: where the model's sizes were read."""

    sizes_from: str
    workload: Workload
    parameter_summary: ParameterSummary
    memory: MemoryEstimate
    work: StepCost
    gpu: Gpu
    efficiency: float
    fits: bool
    change: Change | None
    calculator: tuple[CalculatorRow, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        setting = asdict(replace(self.workload, targets=None))
        del setting["targets"]
        summary = self.parameter_summary
        return {
            "sizes_from": self.sizes_from,
            "parameters": {row.part: row.parameters for row in summary.rows} | {"all": summary.parameters},
            "trainable": summary.trainable,
            "setting": setting,
            "memory": asdict(self.memory),
            "gpu": asdict(self.gpu),
            "fits": self.fits,
            "change": {"says": self.change.description, "peak": self.change.peak} if self.change else None,
            "work": asdict(self.work) | {"efficiency": self.efficiency},
            "calculator": [asdict(row) for row in self.calculator],
        }


def plan(
    recipe: Recipe,
    *,
    gpu: str = "80GB",
    gpus: int = 1,
    strategy: Strategy = "ddp",
    base_bits: int | None = None,
    vision_share: float = _VISION,
    trained_share: float = 1.0,
    context: int | None = None,
    efficiency: float = EFFICIENCY,
) -> Plan:
    """Plan a recipe without loading torch or weights.

    gpu: `80GB` or a name in compute.GPUS; strategy: how several GPUs share the work; base_bits: of a frozen base;
    vision_share: fraction of image tokens in a row, for a model with vision; trained_share: fraction of trained tokens,
    which the head scores; context: one more for the calculator; efficiency: fraction of the GPU's peak reached.
    Raises ModelError for an unknown model, RecipeError for an unknown GPU.
    """
    config, sizes_from = load_config(recipe.model.name, recipe.model.revision, where=recipe.model.where("name"))
    architecture = Architecture.from_config(config, where=sizes_from)
    shape = ModelShape.of(architecture, config)
    workload = Workload.of(recipe, architecture, vision=vision_share)
    workload = replace(workload, gpus=gpus, strategy=strategy, scored=trained_share)
    if base_bits is not None and workload.is_adapter:
        workload = replace(workload, base_bits=base_bits)
    device = parse_gpu(gpu)
    memory = estimate_memory(workload, architecture, shape)
    fits = memory.peak <= device.memory
    trained = STAGES[recipe.stage].trained_parameters(recipe, architecture)
    return Plan(
        sizes_from=sizes_from,
        workload=workload,
        parameter_summary=parameter_summary(architecture, trained),
        memory=memory,
        work=step_cost(workload, architecture, shape, device, efficiency),
        gpu=device,
        efficiency=efficiency,
        fits=fits,
        change=None if fits else smallest_change(workload, architecture, shape, device.memory),
        calculator=_calculate(workload, architecture, shape, context),
    )


def _calculate(
    workload: Workload, architecture: Architecture, shape: ModelShape, context: int | None
) -> tuple[CalculatorRow, ...]:
    longest = max(shape.context, context or 0)
    contexts = sorted({length for length in (*_CONTEXTS, context or 0) if 0 < length <= longest})
    rows = []
    for bits in BITS:
        base = replace(workload, bytes_each=2, base_bits=bits)
        weights = weight_bytes(architecture, base)
        for length in contexts:
            cache = shape.cache_bytes(length, bytes_each=2)
            training = None
            if workload.is_adapter:
                training = estimate_memory(base.with_max_length(length), architecture, shape).peak
            rows.append(CalculatorRow(bits, length, weights, cache, weights + cache, training))
    return tuple(rows)


def smallest_change(workload: Workload, architecture: Architecture, shape: ModelShape, budget: float) -> Change | None:
    """Find the first single change that fits in the budget (bytes), else the fewest changes combined in order.

    Returns None if nothing fits.
    """

    def peak(changed: Workload) -> float:
        return estimate_memory(changed, architecture, shape).peak

    for variants in _CHANGES:
        for description, changed in variants(workload):
            if peak(changed) <= budget:
                return Change(description, changed, peak(changed))
    descriptions: list[str] = []
    combined = workload
    for variants in _CHANGES:
        last = None
        for description, changed in variants(combined):
            last = (description, changed)
            if peak(changed) <= budget:
                return Change(", ".join([*descriptions, description]), changed, peak(changed))
        if last is not None:
            descriptions.append(last[0])
            combined = last[1]
    return None


Variants = Iterator[tuple[str, Workload]]


def _enable_checkpointing(workload: Workload) -> Variants:
    if not workload.checkpointing:
        yield "training.gradient_checkpointing=true", replace(workload, checkpointing=True)


def _shrink_batch(workload: Workload) -> Variants:
    """Smaller batches with as many rows per step. A pair stays in one batch, and a rollout keeps its size."""
    rows, factor = workload.rows, 1
    while rows % 2 == 0 and rows > workload.min_rows:
        rows, factor = rows // 2, factor * 2
        batch, accumulation = rows // workload.rows_per_example, workload.accumulation * factor
        keys = f"training.per_device_train_batch_size={batch} training.gradient_accumulation_steps={accumulation}"
        yield keys, replace(workload, rows=rows, accumulation=accumulation)


def _shrink_rollout(workload: Workload) -> Variants:
    if workload.drawn > workload.rows and workload.rows % workload.generations == 0:
        yield "training.steps_per_generation=1", replace(workload, drawn=workload.rows)


def _shorten_rows(workload: Workload) -> Variants:
    length = workload.max_length
    while length >= 2 * _MIN_LENGTH:
        length //= 2
        yield f"data.max_length={length}", workload.with_max_length(length)


def _lower_rank(workload: Workload) -> Variants:
    rank = max((target.rank for target in workload.targets or ()), default=0)
    while rank >= 16:
        rank //= 2
        targets = tuple(replace(target, rank=min(target.rank, rank)) for target in workload.targets)
        sizes: dict[str, int] = {}
        for target in targets:
            part = target.tensor.part
            sizes[part] = sizes.get(part, 0) + target.size
        yield f"adapter.rank={rank}", replace(workload, targets=targets, trained=sizes)


def _add_gpus(workload: Workload) -> Variants:
    gpus = max(2, workload.gpus if workload.strategy != "fsdp" else 2 * workload.gpus)
    while gpus <= _MAX_GPUS:
        yield f"--gpus {gpus} --strategy fsdp", replace(workload, gpus=gpus, strategy="fsdp")
        gpus *= 2


def _quantize_base(workload: Workload) -> Variants:
    for bits in (8, 4):
        if workload.is_adapter and bits < workload.base_bits:
            yield f"--base-bits {bits} (training is not supported yet)", replace(workload, base_bits=bits)


# in the order in which they are tried
_CHANGES: tuple[Callable[[Workload], Variants], ...] = (
    _enable_checkpointing,
    _shrink_batch,
    _shrink_rollout,
    _shorten_rows,
    _lower_rank,
    _add_gpus,
    _quantize_base,
)
