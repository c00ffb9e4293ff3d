"""Floating-point operations of a step, and the time they take at a stated share of a GPU's peak."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_align.errors import AlignError, RecipeError
from ernie_align.models.architecture import Architecture
from ernie_align.planning.setting import Workload
from ernie_align.planning.shape import ModelShape

EFFICIENCY = 0.35
_OUTSIDE_THE_DECODER = ("embeddings", "vision_tower", "resampler", "lm_head")


@dataclass(frozen=True)
class Gpu:
    """memory: bytes; peak: bfloat16 operations a second, dense, by its data sheet."""

    name: str
    memory: float
    peak: float


GPUS = (
    Gpu("L4", 24e9, 121e12),
    Gpu("A100-40GB", 40e9, 312e12),
    Gpu("L40S", 48e9, 362e12),
    Gpu("A100-80GB", 80e9, 312e12),
    Gpu("H100", 80e9, 989e12),
    Gpu("H200", 141e9, 989e12),
    Gpu("B200", 180e9, 2250e12),
)


def gpu_of(text: str) -> Gpu:
    """`80GB` (the first that has so much, its speed for the time) or a name. Raises RecipeError."""
    for gpu in GPUS:
        if text.lower() == gpu.name.lower():
            return gpu
    digits = text.lower().removesuffix("gb")
    try:
        memory = float(digits) * 1e9
    except ValueError:
        fix = f"write 80GB, or one of {', '.join(gpu.name for gpu in GPUS)}"
        raise RecipeError.at("--gpu", f"{text!r} is no GPU", fix=fix) from None
    like = next((gpu for gpu in GPUS if gpu.memory >= memory), GPUS[-1])
    return Gpu(text, memory, like.peak) if like.memory != memory else like


@dataclass(frozen=True)
class Work:
    """forward: operations of one token's forward; step: of one optimizer step on all devices; seconds: of a step."""

    forward: float
    step: float
    seconds: float
    tokens: int


def work(
    setting: Workload, architecture: Architecture, shape: ModelShape, gpu: Gpu, efficiency: float = EFFICIENCY
) -> Work:
    """Two operations a weight that a token meets, and attention; backward twice that, or once under adapters.

    Rows are taken at their full length. Generation is bound by memory and not by this: of a rollout only the
    operations are counted, and its time is a lower bound.
    """
    if not 0 < efficiency <= 1:
        raise _bad_efficiency(efficiency)
    forward = _forward(setting, architecture, shape)
    passes = 1 + (1 if setting.is_adapter else 2) + (1 if setting.checkpointing else 0)
    tokens = setting.positions * setting.accumulation * setting.gpus
    operations = forward * tokens * (passes + (1 if setting.asks_reference else 0))
    if setting.drawn:
        operations += forward * tokens  # each token is fed once while completions are drawn
    return Work(forward, operations, operations / (gpu.peak * setting.gpus * efficiency), tokens)


def _bad_efficiency(value: float) -> AlignError:
    return RecipeError.at("--efficiency", f"{value} is no share", fix="write a number above 0 and up to 1")


def _forward(setting: Workload, architecture: Architecture, shape: ModelShape) -> float:
    always = sum(
        tensor.size
        for tensor in architecture.tensors
        if (tensor.kind == "linear" and tensor.part not in _OUTSIDE_THE_DECODER) or tensor.kind == "router"
    )
    chosen = 0.0
    for tensor in architecture.tensors:
        if tensor.kind == "fused":
            share = setting.vision if tensor.part == "vision_experts" else 1.0 - setting.vision
            chosen += share * tensor.size * shape.top_k / tensor.shape[0]
    attention = 2 * len(shape.layers) * shape.queries * setting.tokens  # causal: half of all pairs, two products
    head = shape.vocabulary * shape.hidden
    seen = sum(t.size for t in architecture.tensors if t.part == "vision_tower" and t.kind == "linear")
    resampled = sum(t.size for t in architecture.tensors if t.part == "resampler" and t.kind == "linear")
    merge = shape.tower.merge if shape.tower is not None else 0
    return 2 * (always + chosen + head + setting.vision * (merge * seen + resampled)) + attention
