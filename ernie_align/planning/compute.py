"""Count the floating-point operations of a step, and the time they take at a given fraction of a GPU's peak."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_align.errors import RecipeError
from ernie_align.models.architecture import Architecture
from ernie_align.planning.workload import ModelShape, Workload

EFFICIENCY = 0.35
_OUTSIDE_THE_DECODER = ("embeddings", "vision_tower", "resampler", "lm_head")


@dataclass(frozen=True)
class Gpu:
    """A GPU. memory: bytes; peak: dense bfloat16 operations per second, from its data sheet."""

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


def parse_gpu(text: str) -> Gpu:
    """Parse a name, or a size such as `80GB`, with the speed of the first GPU that has as much. Raises RecipeError."""
    for gpu in GPUS:
        if text.lower() == gpu.name.lower():
            return gpu
    digits = text.lower().removesuffix("gb")
    try:
        memory = float(digits) * 1e9
    except ValueError:
        fix = f"write 80GB, or one of {', '.join(gpu.name for gpu in GPUS)}"
        raise RecipeError.at("--gpu", f"unknown GPU {text!r}", fix=fix) from None
    like = next((gpu for gpu in GPUS if gpu.memory >= memory), GPUS[-1])
    return Gpu(text, memory, like.peak) if like.memory != memory else like


@dataclass(frozen=True)
class StepCost:
    """forward: operations of one token's forward; step: of an optimizer step on all devices; seconds: of a step;
    tokens: of a step."""

    forward: float
    step: float
    seconds: float
    tokens: int


def step_cost(
    workload: Workload, architecture: Architecture, shape: ModelShape, gpu: Gpu, efficiency: float = EFFICIENCY
) -> StepCost:
    """Count two operations for each weight that a token uses, plus attention; a backward is twice a forward, or once
    with adapters.

    Rows are counted at their maximum length. The time of generation is limited by memory bandwidth, not by operations,
    so with rollouts the time is a lower bound. Raises RecipeError for an efficiency outside (0, 1].
    """
    if not 0 < efficiency <= 1:
        what = f"invalid value {efficiency}; expected a number above 0 and up to 1"
        raise RecipeError.at("--efficiency", what, fix="write a fraction such as 0.35")
    forward = _forward(workload, architecture, shape)
    passes = 1 + (1 if workload.is_adapter else 2) + (1 if workload.checkpointing else 0)
    tokens = workload.positions * workload.accumulation * workload.gpus
    operations = forward * tokens * (passes + (1 if workload.asks_reference else 0))
    if workload.drawn:
        operations += forward * tokens  # each token is processed once while completions are generated
    return StepCost(forward, operations, operations / (gpu.peak * workload.gpus * efficiency), tokens)


def _forward(workload: Workload, architecture: Architecture, shape: ModelShape) -> float:
    dense = sum(
        tensor.size
        for tensor in architecture.tensors
        if (tensor.kind == "linear" and tensor.part not in _OUTSIDE_THE_DECODER) or tensor.kind == "router"
    )
    routed = 0.0
    for tensor in architecture.tensors:
        if tensor.kind == "fused":
            share = workload.vision if tensor.part == "vision_experts" else 1.0 - workload.vision
            routed += share * tensor.size * shape.top_k / tensor.shape[0]
    attention = 2 * len(shape.layers) * shape.queries * workload.tokens  # causal: half of all pairs, two products
    head = shape.vocabulary * shape.hidden
    tower = sum(t.size for t in architecture.tensors if t.part == "vision_tower" and t.kind == "linear")
    resampler = sum(t.size for t in architecture.tensors if t.part == "resampler" and t.kind == "linear")
    merge = shape.tower.merge if shape.tower is not None else 0
    return 2 * (dense + routed + head + workload.vision * (merge * tower + resampler)) + attention
