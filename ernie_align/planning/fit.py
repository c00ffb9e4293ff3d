"""What to change so that a run fits: the mildest change first, then changes together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ernie_align.models.architecture import Architecture
from ernie_align.planning.memory import estimate_memory
from ernie_align.planning.setting import Workload
from ernie_align.planning.shape import ModelShape

_SHORTEST = 512  # tokens: below it a change of length is a change of task
_MOST_GPUS = 64


@dataclass(frozen=True)
class Change:
    """says: in the recipe's or the command line's words."""

    says: str
    setting: Workload
    peak: float


def smallest_change(setting: Workload, architecture: Architecture, shape: ModelShape, budget: float) -> Change | None:
    """The first single change that fits in the budget (bytes), else the fewest of them in their order; None if none."""

    def tried(says: str, changed: Workload) -> Change:
        return Change(says, changed, estimate_memory(changed, architecture, shape).peak)

    for says, changed in _alone(setting):
        change = tried(says, changed)
        if change.peak <= budget:
            return change
    said: list[str] = []
    together = setting
    for steps in _ORDER:
        last = None
        for says, changed in steps(together):
            last = (says, changed)
            if estimate_memory(changed, architecture, shape).peak <= budget:
                return tried(", ".join([*said, says]), changed)
        if last is not None:
            said.append(last[0])
            together = last[1]
    return None


def _alone(setting: Workload) -> Iterator[tuple[str, Workload]]:
    for steps in _ORDER:
        yield from steps(setting)


def _checkpointing(setting: Workload) -> Iterator[tuple[str, Workload]]:
    if not setting.checkpointing:
        yield "training.gradient_checkpointing=true", replace(setting, checkpointing=True)


def _batch(setting: Workload) -> Iterator[tuple[str, Workload]]:
    """Smaller batches, as many rows a step. A pair stays together, and a rollout stays as large."""
    sides = 2 if setting.stage in ("dpo", "upo") and not setting.shared else 1
    rows, factor = setting.rows, 1
    while rows % 2 == 0 and rows > sides:
        rows, factor = rows // 2, factor * 2
        batch = rows // 2 if setting.stage == "dpo" and not setting.shared else rows
        accumulation = setting.accumulation * factor
        says = f"training.per_device_train_batch_size={batch} training.gradient_accumulation_steps={accumulation}"
        yield says, replace(setting, rows=rows, accumulation=accumulation)


def _rollout(setting: Workload) -> Iterator[tuple[str, Workload]]:
    if setting.drawn > setting.rows and setting.rows % setting.generations == 0:
        yield "training.steps_per_generation=1", replace(setting, drawn=setting.rows)


def _length(setting: Workload) -> Iterator[tuple[str, Workload]]:
    length = setting.max_length
    while length >= 2 * _SHORTEST:
        length //= 2
        yield f"data.max_length={length}", setting.of_length(length)


def _rank(setting: Workload) -> Iterator[tuple[str, Workload]]:
    rank = max((target.rank for target in setting.targets or ()), default=0)
    while rank >= 16:
        rank //= 2
        targets = tuple(replace(target, rank=min(target.rank, rank)) for target in setting.targets)
        sizes: dict[str, int] = {}
        for target in targets:
            part = target.tensor.part
            sizes[part] = sizes.get(part, 0) + target.size
        yield f"adapter.rank={rank}", replace(setting, targets=targets, trained=sizes)


def _bits(setting: Workload) -> Iterator[tuple[str, Workload]]:
    for bits in (8, 4):
        if setting.is_adapter and bits < setting.base_bits:
            yield f"--base-bits {bits} (not trained by this toolkit yet)", replace(setting, base_bits=bits)


def _gpus(setting: Workload) -> Iterator[tuple[str, Workload]]:
    gpus = max(2, setting.gpus if setting.strategy != "fsdp" else 2 * setting.gpus)
    while gpus <= _MOST_GPUS:
        yield f"--gpus {gpus} --strategy fsdp", replace(setting, gpus=gpus, strategy="fsdp")
        gpus *= 2


_ORDER: tuple[Callable[[Workload], Iterator[tuple[str, Workload]]], ...] = (
    _checkpointing,
    _batch,
    _rollout,
    _length,
    _rank,
    _gpus,
    _bits,
)
