"""Bytes on each device, by part, and at the worst moment of a step."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_align.models.architecture import Architecture, ParameterSpec
from ernie_align.planning.activations import kept
from ernie_align.planning.setting import Workload
from ernie_align.planning.shape import ModelShape

# TRL's fused head scores tokens in tiles of so many positions by so many words of the vocabulary.
_TILE_TOKENS, _TILE_WORDS = 4096, 32768
# float32 copies of a tile that stand side by side where there is no Triton kernel to fold it in place
_TILES_FORWARD, _TILES_BACKWARD = 3, 7.25
_GROUP = 64  # weights that share a 16-bit scale in a quantised base
_SAMPLING_COPIES = 3  # logits, scores and their softmax, in float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device.

    weights, reference, adapters, optimizer are held all the time; gradients, activations and logits within a step,
    gradients growing while activations shrink, and logits never beside all of the activations; rollout while
    completions are drawn. peak: the worst moment, which is less than their sum.
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
        """Before the first step: what a run holds once its model is there."""
        return self.weights + self.reference + self.adapters

    def parts(self) -> dict[str, float]:
        """The parts that are not empty, by name."""
        found = {name: value for name, value in vars(self).items() if name != "peak"}
        return {name: value for name, value in found.items() if value}


def estimate_memory(setting: Workload, architecture: Architecture, shape: ModelShape) -> MemoryEstimate:
    """Of a run with this setting."""
    share = 1 / setting.gpus
    whole_weights = share if setting.strategy in ("fsdp", "zero3", "ep") else 1.0
    states = 1.0 if setting.strategy == "ddp" else share

    base = weight_bytes(architecture, setting)
    weights = base * whole_weights
    if whole_weights < 1:
        weights += _largest_layer(architecture, setting)  # gathered while it computes
    adapters = setting.trainable * 4.0 * (1 + setting.copies) * whole_weights if setting.is_adapter else 0.0
    gradients = _trained_bytes(architecture, setting) * states
    if setting.gpus > 1 and setting.strategy == "ddp":
        gradients *= 2  # the buckets in which they are reduced
    optimizer = _state_bytes(architecture, setting) * states
    reference = base * whole_weights if setting.reference else 0.0

    found = kept(setting, shape)
    kept_forward = found.held(checkpointing=setting.checkpointing) + _pixels(setting, shape)
    in_a_layer = found.step(checkpointing=setting.checkpointing)
    activations = kept_forward + in_a_layer
    logits = _head(setting, shape)
    rollout = _rollout(setting, shape)

    held_gradients = gradients if setting.is_adapter or setting.accumulation > 1 else 0.0
    of_the_head = _head_gradient(setting, shape)
    in_the_head = held_gradients + kept_forward + logits
    above = held_gradients + kept_forward + in_a_layer + of_the_head
    below = gradients + in_a_layer + (_embedding_gradient(setting, shape) if of_the_head else 0.0)
    asking = held_gradients + kept_forward + _forward(setting, shape, setting.positions)
    moments = [in_the_head, above, below, rollout]
    if setting.asks_reference and setting.stage == "dpo":
        moments.append(asking)
    held = weights + reference + adapters + optimizer
    return MemoryEstimate(
        weights, reference, adapters, optimizer, gradients, activations, logits, rollout, held + max(moments)
    )


def weight_bytes(architecture: Architecture, setting: Workload) -> float:
    """Of the base model. Routers stay in float32; a quantised base keeps embeddings, head, norms and biases as is."""
    return sum(tensor.size * _bits(tensor, setting) / 8 for tensor in architecture.tensors)


def _bits(tensor: ParameterSpec, setting: Workload) -> float:
    if tensor.kind in ("router", "frozen"):
        return 32
    own = 8 * setting.bytes_each
    if setting.base_bits >= own or tensor.kind == "plain" or tensor.part == "lm_head":
        return own
    return setting.base_bits + 16 / _GROUP


def _largest_layer(architecture: Architecture, setting: Workload) -> float:
    """With its adapters, and with their gradients until these are shared out again."""
    adapters = {target.tensor.name: target.size for target in setting.targets or ()}
    layers: dict[tuple[str, int | None], float] = {}
    for tensor in architecture.tensors:
        size = 4.0 * adapters.get(tensor.name, 0) * (2 + setting.copies)
        if setting.strategy != "ep" or tensor.kind != "fused":  # dealt-out experts stay where they are
            size += tensor.size * _bits(tensor, setting) / 8
        stack = "tower" if tensor.part == "vision_tower" else "decoder"
        key = (stack, tensor.layer) if tensor.layer is not None else (tensor.name, None)
        layers[key] = layers.get(key, 0.0) + size
    return max(layers.values())


def _trained_bytes(architecture: Architecture, setting: Workload) -> float:
    """Gradients: adapters are float32, weights are trained in the dtype they are loaded in."""
    if setting.is_adapter:
        return setting.trainable * 4.0
    return float(sum(size * setting.bytes_each for size in setting.trained.values()))


def _state_bytes(architecture: Architecture, setting: Workload) -> float:
    """torch's AdamW keeps two values in the dtype of what it trains."""
    name = setting.optimizer
    if "8bit" in name:
        return 2.0 * setting.trainable
    each = 0 if name in ("sgd", "adafactor") else 1 if "lion" in name else 2
    return each * _trained_bytes(architecture, setting)


def _pixels(setting: Workload, shape: ModelShape) -> float:
    """The images of a batch, float32."""
    if shape.tower is None:
        return 0.0
    return setting.positions * setting.vision * shape.tower.merge * shape.tower.pixels * 4


def _scored(setting: Workload) -> int:
    """Positions that the head scores: of rollouts the completions, otherwise those that predict a trained token."""
    return setting.rows * setting.completion if setting.completion else round(setting.positions * setting.scored)


def _head(setting: Workload, shape: ModelShape) -> float:
    """TRL's fused head at its worst, which is its backward."""
    positions, s = _scored(setting), setting.bytes_each
    tile = min(positions, _TILE_TOKENS) * min(shape.vocabulary, _TILE_WORDS)
    size = positions * shape.hidden * (s + 4 + s) + tile * s  # input, its gradient in float32, and that as s
    if setting.device == "cpu":
        size += _TILES_BACKWARD * tile * 4
    return size + _head_gradient(setting, shape)


def _head_gradient(setting: Workload, shape: ModelShape) -> float:
    """Of the head's weight, which is the embeddings' where the two are tied: float32, from the first backward step."""
    trained = not setting.is_adapter and setting.trained.keys() & {"embeddings", "lm_head"}
    return 4.0 * shape.vocabulary * shape.hidden if trained else 0.0


def _embedding_gradient(setting: Workload, shape: ModelShape) -> float:
    """The embeddings' own, which stands beside the head's until the two are added."""
    return setting.bytes_each * shape.vocabulary * shape.hidden


def _forward(setting: Workload, shape: ModelShape, positions: float) -> float:
    """A forward that learns nothing, at its widest step."""
    widest = 3.0 * max((layer.mlp for layer in shape.layers), default=0)
    for layer in shape.layers:
        for part, pool in layer.pools.items():
            share = setting.vision if part == "vision_experts" else 1 - setting.vision
            widest = max(widest, share * shape.top_k * (2 * shape.hidden + 3 * pool.width))
    return positions * setting.bytes_each * (3 * shape.hidden + widest)


def _rollout(setting: Workload, shape: ModelShape) -> float:
    """Drawing completions: every key and value, the widest step over all prompts at once, and sampling."""
    if not setting.drawn:
        return 0.0
    prompts = setting.drawn * (setting.tokens - setting.completion)
    cache = shape.cache(setting.drawn * setting.tokens, bytes_each=setting.bytes_each)
    sampling = _SAMPLING_COPIES * 4.0 * setting.drawn * shape.vocabulary
    return cache + max(_forward(setting, shape, prompts), sampling)
