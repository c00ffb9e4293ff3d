"""A recipe on given hardware -> parameters, memory, time, and what to change where it does not fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ernie_align.models.architecture import Architecture
from ernie_align.models.trainable_parts import ParameterSummary, parameter_summary
from ernie_align.planning.compute import EFFICIENCY, Gpu, Work, gpu_of, work
from ernie_align.planning.configs import config_of
from ernie_align.planning.fit import Change, smallest_change
from ernie_align.planning.memory import MemoryEstimate, estimate_memory, weight_bytes
from ernie_align.planning.setting import Strategy, Workload
from ernie_align.planning.shape import ModelShape
from ernie_align.recipe import Recipe
from ernie_align.stages import STAGES

BITS = (16, 8, 4, 2)
_CONTEXTS = (4096, 32768, 131072)
_VISION = 0.5


@dataclass(frozen=True)
class Row:
    """One line of the calculator. serving: weights and the cache of one sequence of `context` tokens; training: the
    peak of this recipe on such a base, of rows of that length, where it trains adapters."""

    bits: int
    context: int
    weights: float
    cache: float
    serving: float
    training: float | None


@dataclass(frozen=True)
class Plan:
    """What a recipe needs. All sizes in bytes, on each device; sizes_from: what was read to know the model."""

    sizes_from: str
    setting: Workload
    parameter_summary: ParameterSummary
    memory: MemoryEstimate
    work: Work
    gpu: Gpu
    efficiency: float
    fits: bool
    change: Change | None
    calculator: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        setting = asdict(replace(self.setting, targets=None))
        del setting["targets"]
        return {
            "sizes_from": self.sizes_from,
            "parameters": {row.part: row.parameters for row in self.parameter_summary.rows}
            | {"all": self.parameter_summary.parameters},
            "trainable": self.parameter_summary.trainable,
            "setting": setting,
            "memory": asdict(self.memory),
            "gpu": asdict(self.gpu),
            "fits": self.fits,
            "change": {"says": self.change.says, "peak": self.change.peak} if self.change else None,
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

    gpu: `80GB` or a name of compute.GPUS; strategy: how several share the work; base_bits: of a frozen base;
    vision_share: of a row's tokens that are image tokens, for a model with vision; trained_share: of them that are
    trained, all of which the head scores; context: a further one for the calculator; efficiency: share of the GPU's
    peak that training reaches.
    Raises ModelError where the model is not known, RecipeError for a GPU that is not.
    """
    config, sizes_from = config_of(recipe.model.name, recipe.model.revision, where=recipe.model.where("name"))
    architecture = Architecture.from_config(config, where=sizes_from)
    shape = ModelShape.of(architecture, config)
    setting = replace(
        Workload.of(recipe, architecture, vision=vision_share), gpus=gpus, strategy=strategy, scored=trained_share
    )
    if base_bits is not None and setting.is_adapter:
        setting = replace(setting, base_bits=base_bits)
    device = gpu_of(gpu)
    needed = estimate_memory(setting, architecture, shape)
    fits = needed.peak <= device.memory
    return Plan(
        sizes_from,
        setting,
        parameter_summary(architecture, STAGES[recipe.stage].trained_parameters(recipe, architecture)),
        needed,
        work(setting, architecture, shape, device, efficiency),
        device,
        efficiency,
        fits,
        None if fits else smallest_change(setting, architecture, shape, device.memory),
        _calculator(setting, architecture, shape, context),
    )


def _calculator(
    setting: Workload, architecture: Architecture, shape: ModelShape, context: int | None
) -> tuple[Row, ...]:
    contexts = sorted(
        {length for length in (*_CONTEXTS, context or 0) if 0 < length <= max(shape.context, context or 0)}
    )
    rows = []
    for bits in BITS:
        base = replace(setting, bytes_each=2, base_bits=bits)
        weights = weight_bytes(architecture, base)
        for length in contexts:
            cache = shape.cache(length, bytes_each=2)
            training = estimate_memory(base.of_length(length), architecture, shape).peak if setting.is_adapter else None
            rows.append(Row(bits, length, weights, cache, weights + cache, training))
    return tuple(rows)
