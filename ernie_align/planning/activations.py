"""Compute what autograd saves in a forward pass for its backward pass, layer by layer.

Derived from the code of transformers' ERNIE 4.5 classes, TRL's fused head and PEFT, and tested against what autograd
really saves (tests/model/test_plan.py). Symbols: s bytes of a value in the compute dtype, k experts per token; values
that are float32 in any dtype take 4 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ernie_align.planning.workload import Layer, ModelShape, Tower, Workload

_ROUTED_INDICES = 24  # bytes of the three index tensors of a routed token


@dataclass(frozen=True)
class SavedActivations:
    """Bytes of the activations that a training forward saves.

    layers: of each decoder layer; outside: of tower, resampler and final norm; layer_input: of one layer's input, which
    is all that checkpointing saves of it; working: the gradients in the widest step of a layer's backward.
    """

    layers: tuple[float, ...]
    outside: float
    layer_input: float
    working: float

    def after_forward(self, *, checkpointing: bool) -> float:
        """Bytes held from the end of the forward on."""
        if not checkpointing:
            return sum(self.layers) + self.outside
        return self.layer_input * sum(size > 0 for size in self.layers) + self.outside

    def in_backward(self, *, checkpointing: bool) -> float:
        """Additional bytes in the backward of a layer: its gradients, and the layer itself if it is recomputed."""
        return self.working + (max(self.layers) if checkpointing else 0.0)


def saved_activations(workload: Workload, shape: ModelShape) -> SavedActivations:
    """Compute the bytes saved by a training forward."""
    trained = _TrainedWeights.of(workload)
    first = _first_layer_with_gradient(workload, trained)
    layers = tuple(
        _layer(workload, shape, layer, number, trained) if number >= first else 0.0
        for number, layer in enumerate(shape.layers)
    )
    outside = _norm(workload, shape.hidden, "norms" in trained.parts) * workload.positions if any(layers) else 0.0
    if shape.tower is not None and workload.vision:
        outside += _vision(workload, shape, shape.tower, trained)
    layer_input = workload.positions * shape.hidden * workload.bytes_each
    return SavedActivations(layers, outside, layer_input, working=_working(workload, shape))


@dataclass(frozen=True)
class _TrainedWeights:
    """The trained weights by place.

    parts: parts whose own weights are trained; ranks: (layer, part, weight) -> rank of its adapter; materialized:
    adapted parts that PEFT adapts as parameters, where W + BA is built.
    """

    parts: frozenset[str]
    ranks: Mapping[tuple[int | None, str, str], int]
    materialized: frozenset[str]

    @classmethod
    def of(cls, workload: Workload) -> _TrainedWeights:
        if workload.targets is None:
            return cls(frozenset(workload.trained), {}, frozenset())
        tensors = [target.tensor for target in workload.targets]
        ranks = {(t.layer, t.part, t.name): target.rank for t, target in zip(tensors, workload.targets, strict=True)}
        is_text_family = not any(tensor.name.startswith("model.language_model.") for tensor in tensors)
        if not is_text_family or not any(tensor.name.startswith("model.layers.") for tensor in tensors):
            return cls(frozenset(), ranks, frozenset())
        return cls(frozenset(), ranks, frozenset({"shared_experts", "dense_mlp"} & {tensor.part for tensor in tensors}))

    def ranks_in(self, layer: int | None, part: str) -> list[int]:
        """Return the ranks of the part's adapted weights in a layer."""
        return [rank for (place, name, _), rank in self.ranks.items() if place == layer and name == part]

    def includes(self, part: str) -> bool:
        return part in self.parts or any(name == part for _, name, _ in self.ranks)


def _first_layer_with_gradient(workload: Workload, trained: _TrainedWeights) -> int:
    """Autograd saves nothing below the first trained weight; with checkpointing, gradients start at the embeddings."""
    inputs = ("embeddings", "resampler", "vision_tower")
    if workload.checkpointing or any(trained.includes(part) for part in inputs) or trained.parts:
        return 0
    return min((layer for layer, _, _ in trained.ranks if layer is not None), default=0)


def _norm(workload: Workload, width: int, trained: bool) -> float:
    """Bytes of an RMSNorm per position: its input in float32, the root, and the weight's input if it is trained."""
    return 4 * width + 4 + (workload.bytes_each * width if trained else 0)


def _lora_inputs(workload: Workload, width: int, count: int) -> float:
    """Bytes per position of the inputs of `count` adapted linear layers that share one input.

    In bfloat16 each adapter casts its own copy to float32 and autocast casts it back; in float32 they share it.
    """
    return workload.bytes_each * width * (count if workload.bytes_each == 2 else min(count, 1))


def _layer(workload: Workload, shape: ModelShape, layer: Layer, number: int, trained: _TrainedWeights) -> float:
    norms = 2 * _norm(workload, shape.hidden, "norms" in trained.parts)
    size = workload.positions * (norms + _attention(workload, shape, number, trained))
    if layer.mlp:
        size += workload.positions * _swiglu(workload, shape, layer, number, trained)
        if layer.mlp_part in trained.materialized and trained.ranks_in(number, layer.mlp_part):
            size += 3 * layer.mlp * shape.hidden * workload.bytes_each  # W + BA
    for part, pool in layer.pools.items():
        share = workload.vision if part == "vision_experts" else 1 - workload.vision
        size += workload.positions * share * _routed(workload, shape, part, pool.width, pool.experts, number, trained)
        if share:  # the kernel's copies of the LoRA factors
            ranks = sum(trained.ranks_in(number, part))
            local_experts = pool.experts / (workload.gpus if workload.strategy == "ep" else 1)
            size += local_experts * ranks * (shape.hidden + 1.5 * pool.width) * workload.bytes_each
    return size


def _attention(workload: Workload, shape: ModelShape, number: int, trained: _TrainedWeights) -> float:
    s = workload.bytes_each
    # rotated queries, their output, keys and values; with a mask, transformers repeats keys and values for each query
    # head, and torch converts the mask (T, T) to numbers in every layer
    keys = shape.queries if workload.masked else shape.keys
    size = s * (2 * shape.queries + 2 * keys) + 4 * shape.heads + (s * workload.tokens if workload.masked else 0)
    if workload.flat and not workload.eager:
        size += s * shape.queries  # outputs of single documents, in addition to their concatenation
    if workload.eager:
        size += shape.heads * workload.tokens * (4 + s)
    if "attention" in trained.parts:
        return size + s * shape.hidden
    ranks = trained.ranks_in(number, "attention")
    if ranks:
        size += _lora_inputs(workload, shape.hidden, 3) + s * sum(ranks)
        size += s * shape.queries if s == 2 else 0  # the output projection copies its input
    return size


def _swiglu(workload: Workload, shape: ModelShape, layer: Layer, number: int, trained: _TrainedWeights) -> float:
    s, width = workload.bytes_each, layer.mlp
    size = 3 * s * width  # gate, its activation, up projection
    ranks = trained.ranks_in(number, layer.mlp_part)
    if layer.mlp_part in trained.parts or (layer.mlp_part in trained.materialized and ranks):
        return size + s * (width + shape.hidden)
    if ranks:
        size += _lora_inputs(workload, shape.hidden, 2) + s * (width + sum(ranks))
    return size


def _routed(
    workload: Workload, shape: ModelShape, part: str, width: int, experts: int, number: int, trained: _TrainedWeights
) -> float:
    """Bytes of one pool per token that it processes: its router, and top_k routed copies."""
    s, k, router = workload.bytes_each, shape.top_k, part.replace("experts", "router")
    size = 4 * experts + 12 * k + 8
    ranks = trained.ranks_in(number, part)
    if router in trained.parts or trained.ranks_in(number, router):
        size += 4 * shape.hidden
    if ranks:  # models.grouped_gemm
        return size + s * (shape.hidden + k * (2 * width + sum(ranks)))
    size += k * (_ROUTED_INDICES + s * (1 + 3 * width + shape.hidden))  # gate and up, activation, output
    if part in trained.parts:
        size += k * s * (width + shape.hidden)  # inputs of the weights' gradients
    return size


def _vision(workload: Workload, shape: ModelShape, tower: Tower, trained: _TrainedWeights) -> float:
    s, tokens = workload.bytes_each, workload.positions * workload.vision
    size = 0.0
    if trained.includes("vision_tower"):
        block = s * (11 * tower.width + 3 * tower.mlp) + 4 * tower.heads + 16
        patches = tokens * tower.merge
        saved_blocks = 1 if workload.checkpointing else tower.depth
        size += patches * (block * saved_blocks + s * tower.width * (tower.depth if workload.checkpointing else 1))
    if trained.includes("vision_tower") or trained.includes("resampler"):
        size += tokens * (10 * s * tower.spatial + 2 * 4 * shape.hidden)
    return size


def _working(workload: Workload, shape: ModelShape) -> float:
    """Bytes of the gradients held at once in the widest step of a backward: of the routed tokens, or of a SwiGLU."""
    s = workload.bytes_each
    steps = [workload.positions * s * (2 * shape.hidden + 3 * shape.queries)]
    for layer in shape.layers:
        if layer.mlp:
            steps.append(workload.positions * s * (shape.hidden + 4 * layer.mlp))
        for part, pool in layer.pools.items():
            share = workload.vision if part == "vision_experts" else 1 - workload.vision
            rows = workload.positions * share * shape.top_k
            steps.append(rows * s * (2 * shape.hidden + 4 * pool.width))
    return max(steps)
