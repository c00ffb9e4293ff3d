"""Estimate the bytes on each device, by part, and at the peak of a step."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_align.models.architecture import Architecture, ParameterSpec
from ernie_align.planning.activations import saved_activations
from ernie_align.planning.workload import ModelShape, Workload

# TRL's fused head scores tokens in tiles of this many positions by this many vocabulary entries.
_TILE_TOKENS, _TILE_WORDS = 4096, 32768
# float32 copies of a tile held at once in the backward pass without a Triton kernel, which works in place
_TILES_BACKWARD = 7.25
_GROUP = 64  # weights that share a 16-bit scale in a quantized base
_SAMPLING_COPIES = 3  # logits, scores and their softmax, in float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device.

    weights, reference, adapters and optimizer are held all the time; gradients, activations and logits within a step:
    gradients grow while activations shrink, and logits never coexist with all activations; rollout while completions
    are generated. peak: the maximum over time, which is less than the sum.
    """

    weights: float
    reference: float
    adapters: float
    optimizer: float
    gradients: float
    activations: float
    logits: float
    rollout: float
    peak: float

    @property
    def loaded(self) -> float:
        """Bytes held before the first step."""
        return self.weights + self.reference + self.adapters

    def parts(self) -> dict[str, float]:
        """Return the parts that are not empty, by name."""
        return {name: value for name, value in vars(self).items() if name != "peak" and value}


def estimate_memory(workload: Workload, architecture: Architecture, shape: ModelShape) -> MemoryEstimate:
    """Estimate the memory of a run."""
    weight_share = 1 / workload.gpus if workload.strategy in ("fsdp", "zero3", "ep") else 1.0
    state_share = 1.0 if workload.strategy == "ddp" else 1 / workload.gpus

    base = weight_bytes(architecture, workload)
    weights = base * weight_share
    if weight_share < 1:
        weights += _largest_layer(architecture, workload)  # gathered while it computes
    adapters = workload.trainable * 4.0 * (1 + workload.copies) * weight_share if workload.is_adapter else 0.0
    gradients = _gradient_bytes(workload) * state_share
    if workload.gpus > 1 and workload.strategy == "ddp":
        gradients *= 2  # DDP's buckets
    optimizer = _optimizer_bytes(workload) * state_share
    reference = base * weight_share if workload.reference else 0.0

    saved = saved_activations(workload, shape)
    after_forward = saved.after_forward(checkpointing=workload.checkpointing) + _pixels(workload, shape)
    in_backward = saved.in_backward(checkpointing=workload.checkpointing)
    logits = _head(workload, shape)
    rollout = _rollout(workload, shape)

    # gradients that exist before the backward: of a loaded adapter, or of earlier batches of the step
    early_gradients = gradients if workload.is_adapter or workload.accumulation > 1 else 0.0
    head_gradient = _head_gradient(workload, shape)
    moments = [
        early_gradients + after_forward + logits,  # in the head
        early_gradients + after_forward + in_backward + head_gradient,  # in the last layer
        gradients + in_backward + (_embedding_gradient(workload, shape) if head_gradient else 0.0),  # in the first
        rollout,
    ]
    if workload.reference_in_step:
        moments.append(early_gradients + after_forward + _inference(workload, shape, workload.positions))
    return MemoryEstimate(
        weights=weights,
        reference=reference,
        adapters=adapters,
        optimizer=optimizer,
        gradients=gradients,
        activations=after_forward + in_backward,
        logits=logits,
        rollout=rollout,
        peak=weights + reference + adapters + optimizer + max(moments),
    )


def weight_bytes(architecture: Architecture, workload: Workload) -> float:
    """Bytes of the base model. Routers are float32; a quantized base has unquantized embeddings, head and norms."""
    return sum(tensor.size * _bits(tensor, workload) / 8 for tensor in architecture.tensors)


def _bits(tensor: ParameterSpec, workload: Workload) -> float:
    if tensor.kind in ("router", "frozen"):
        return 32
    unquantized = 8 * workload.bytes_each
    if workload.base_bits >= unquantized or tensor.kind == "plain" or tensor.part == "lm_head":
        return unquantized
    return workload.base_bits + 16 / _GROUP


def _largest_layer(architecture: Architecture, workload: Workload) -> float:
    """Bytes of the largest layer with its adapters, and with their gradients until these are sharded again."""
    adapters = {target.tensor.name: target.size for target in workload.targets or ()}
    layers: dict[tuple[str, int | None], float] = {}
    for tensor in architecture.tensors:
        size = 4.0 * adapters.get(tensor.name, 0) * (2 + workload.copies)
        if workload.strategy != "ep" or tensor.kind != "fused":  # experts sharded by EP are never gathered
            size += tensor.size * _bits(tensor, workload) / 8
        stack = "tower" if tensor.part == "vision_tower" else "decoder"
        key = (stack, tensor.layer) if tensor.layer is not None else (tensor.name, None)
        layers[key] = layers.get(key, 0.0) + size
    return max(layers.values())


def _gradient_bytes(workload: Workload) -> float:
    """Adapters are float32; weights are trained in the dtype in which they are loaded."""
    if workload.is_adapter:
        return workload.trainable * 4.0
    return float(sum(size * workload.bytes_each for size in workload.trained.values()))


def _optimizer_bytes(workload: Workload) -> float:
    """torch's AdamW holds two values for each trained one, in its dtype."""
    name = workload.optimizer
    if "8bit" in name:
        return 2.0 * workload.trainable
    per_value = 0 if name in ("sgd", "adafactor") else 1 if "lion" in name else 2
    return per_value * _gradient_bytes(workload)


def _pixels(workload: Workload, shape: ModelShape) -> float:
    """Bytes of a batch's images, in float32."""
    if shape.tower is None:
        return 0.0
    return workload.positions * workload.vision * shape.tower.merge * shape.tower.pixels * 4


def _scored(workload: Workload) -> int:
    """Positions that the head scores: the completions of rollouts, otherwise those that predict a trained token."""
    return workload.rows * workload.completion if workload.completion else round(workload.positions * workload.scored)


def _head(workload: Workload, shape: ModelShape) -> float:
    """Bytes of TRL's fused head in its backward, where it takes the most."""
    positions, s = _scored(workload), workload.bytes_each
    tile = min(positions, _TILE_TOKENS) * min(shape.vocabulary, _TILE_WORDS)
    size = positions * shape.hidden * (s + 4 + s) + tile * s  # input, its gradient in float32 and in s bytes
    if workload.device == "cpu":
        size += _TILES_BACKWARD * tile * 4
    return size + _head_gradient(workload, shape)


def _head_gradient(workload: Workload, shape: ModelShape) -> float:
    """Bytes of the gradient of the head's weight (tied or not): float32, from the first step of the backward."""
    trained = not workload.is_adapter and workload.trained.keys() & {"embeddings", "lm_head"}
    return 4.0 * shape.vocabulary * shape.hidden if trained else 0.0


def _embedding_gradient(workload: Workload, shape: ModelShape) -> float:
    """Bytes of the embeddings' own gradient, held together with the head's until the two are added."""
    return workload.bytes_each * shape.vocabulary * shape.hidden


def _inference(workload: Workload, shape: ModelShape, positions: float) -> float:
    """Bytes of a forward without gradients, at its widest step."""
    widest = 3.0 * max((layer.mlp for layer in shape.layers), default=0)
    for layer in shape.layers:
        for part, pool in layer.pools.items():
            share = workload.vision if part == "vision_experts" else 1 - workload.vision
            widest = max(widest, share * shape.top_k * (2 * shape.hidden + 3 * pool.width))
    return positions * workload.bytes_each * (3 * shape.hidden + widest)


def _rollout(workload: Workload, shape: ModelShape) -> float:
    """Bytes while completions are generated: the KV cache, the widest step over all prompts at once, and sampling."""
    if not workload.drawn:
        return 0.0
    prompts = workload.drawn * (workload.tokens - workload.completion)
    cache = shape.cache_bytes(workload.drawn * workload.tokens, bytes_each=workload.bytes_each)
    sampling = _SAMPLING_COPIES * 4.0 * workload.drawn * shape.vocabulary
    return cache + max(_inference(workload, shape, prompts), sampling)
