"""What autograd keeps of one forward until its backward, layer by layer.

Read off the code of transformers' ERNIE 4.5 classes, TRL's fused head and PEFT, and held against what autograd really
saves (tests/unit/test_plan.py). Symbols: N positions, H hidden, M width of a SwiGLU, W width of an expert, k experts a
token, E experts, r rank; s bytes of a value in the compute dtype, 4 where a value is float32 whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ernie_align.models.trainable_parts import Target
from ernie_align.planning.setting import Workload
from ernie_align.planning.shape import Layer, ModelShape, Tower

_ROUTED_INDICES = 24  # bytes of the three index tensors of one routed row


@dataclass(frozen=True)
class Kept:
    """Bytes.

    layers: of each decoder layer; outside: tower, resampler and final norm; entry: of one layer's input, which is all
    that checkpointing keeps of it; working: transient, of the widest step of a layer's backward.
    """

    layers: tuple[float, ...]
    outside: float
    entry: float
    working: float

    def held(self, *, checkpointing: bool) -> float:
        """From the end of the forward on."""
        if not checkpointing:
            return sum(self.layers) + self.outside
        return self.entry * sum(size > 0 for size in self.layers) + self.outside

    def step(self, *, checkpointing: bool) -> float:
        """Beside it, while the backward is in a layer: its gradients, and the layer itself if it is computed again."""
        return self.working + (max(self.layers) if checkpointing else 0.0)


def kept(setting: Workload, shape: ModelShape) -> Kept:
    """Of the forward that learns."""
    places = _Places.of(setting)
    flows = _first_layer_with_gradient(setting, places)
    layers = tuple(
        _layer(setting, shape, layer, number, places) if number >= flows else 0.0
        for number, layer in enumerate(shape.layers)
    )
    outside = _norm(setting, shape.hidden, "norms" in places.whole) * setting.positions if any(layers) else 0.0
    if shape.tower is not None and setting.vision:
        outside += _vision(setting, shape, shape.tower, places)
    return Kept(
        layers,
        outside,
        entry=setting.positions * shape.hidden * setting.bytes_each,
        working=_working(setting, shape),
    )


@dataclass(frozen=True)
class _Places:
    """What is trained, by place. whole: parts whose weights are trained; ranks: (layer, part, weight) -> rank."""

    whole: frozenset[str]
    ranks: Mapping[tuple[int | None, str, str], int]
    bare: frozenset[str]  # adapted parts that PEFT adapts as parameters: W + BA is built

    @classmethod
    def of(cls, setting: Workload) -> _Places:
        if setting.targets is None:
            return cls(frozenset(setting.trained), {}, frozenset())
        ranks = {_place(target): target.rank for target in setting.targets}
        text_family = not any(target.tensor.name.startswith("model.language_model.") for target in setting.targets)
        sparse = any(target.tensor.name.startswith("model.layers.") for target in setting.targets) and text_family
        bare = {part for _, part, _ in ranks if part in ("shared_experts", "dense_mlp") and sparse}
        return cls(frozenset(), ranks, frozenset(bare))

    def adapted(self, layer: int | None, part: str) -> list[int]:
        """Ranks of the part's adapted weights in a layer."""
        return [rank for (where, name, _), rank in self.ranks.items() if where == layer and name == part]

    def touches(self, part: str) -> bool:
        return part in self.whole or any(name == part for _, name, _ in self.ranks)


def _place(target: Target) -> tuple[int | None, str, str]:
    return target.tensor.layer, target.tensor.part, target.tensor.name


def _first_layer_with_gradient(setting: Workload, places: _Places) -> int:
    """Nothing is kept below the first trained weight; checkpointing makes gradients flow from the embeddings on."""
    before = ("embeddings", "resampler", "vision_tower")
    if setting.checkpointing or any(places.touches(part) for part in before) or places.whole:
        return 0
    return min((layer for layer, _, _ in places.ranks if layer is not None), default=0)


def _norm(setting: Workload, width: int, trained: bool) -> float:
    """RMSNorm, a position: its input in float32, the root, and what the weight multiplies if that is trained."""
    return 4 * width + 4 + (setting.bytes_each * width if trained else 0)


def _lora_inputs(setting: Workload, width: int, count: int) -> float:
    """Inputs of `count` adapted linear layers that share one input, a position.

    In bfloat16 each adapter casts its own copy to float32 and autocast casts it back; in float32 they share it.
    """
    return setting.bytes_each * width * (count if setting.bytes_each == 2 else min(count, 1))


def _layer(setting: Workload, shape: ModelShape, layer: Layer, number: int, places: _Places) -> float:
    norms = 2 * _norm(setting, shape.hidden, "norms" in places.whole)
    size = setting.positions * (norms + _attention(setting, shape, number, places))
    if layer.mlp:
        size += setting.positions * _swiglu(setting, shape, layer, number, places)
        if layer.mlp_part in places.bare and places.adapted(number, layer.mlp_part):
            size += 3 * layer.mlp * shape.hidden * setting.bytes_each  # W + BA
    for part, pool in layer.pools.items():
        share = setting.vision if part == "vision_experts" else 1 - setting.vision
        size += setting.positions * share * _routed(setting, shape, part, pool.width, pool.experts, number, places)
        if share:  # the adapters' factors as the kernel wants them: of each weight, r values in and r out for an expert
            ranks = sum(places.adapted(number, part))
            here = pool.experts / (setting.gpus if setting.strategy == "ep" else 1)
            size += here * ranks * (shape.hidden + 1.5 * pool.width) * setting.bytes_each
    return size


def _attention(setting: Workload, shape: ModelShape, number: int, places: _Places) -> float:
    s = setting.bytes_each
    # rotated queries, their output, keys and values; under a mask transformers repeats these for each query head, and
    # torch makes numbers of the mask (T, T) in every layer
    keys = shape.queries if setting.masked else shape.keys
    size = s * (2 * shape.queries + 2 * keys) + 4 * shape.heads + (s * setting.tokens if setting.masked else 0)
    if setting.flat and not setting.eager:
        size += s * shape.queries  # the output of each document, beside all of them in one
    if setting.eager:
        size += shape.heads * setting.tokens * (4 + s)
    if "attention" in places.whole:
        return size + s * shape.hidden
    ranks = places.adapted(number, "attention")
    if ranks:
        size += _lora_inputs(setting, shape.hidden, 3) + s * sum(ranks)
        size += s * shape.queries if s == 2 else 0  # the output projection's own copy of its input
    return size


def _swiglu(setting: Workload, shape: ModelShape, layer: Layer, number: int, places: _Places) -> float:
    s, width = setting.bytes_each, layer.mlp
    size = 3 * s * width  # gate, its activation, up
    ranks = places.adapted(number, layer.mlp_part)
    if layer.mlp_part in places.whole or (layer.mlp_part in places.bare and ranks):
        return size + s * (width + shape.hidden)
    if ranks:
        size += _lora_inputs(setting, shape.hidden, 2) + s * (width + sum(ranks))
    return size


def _routed(
    setting: Workload, shape: ModelShape, part: str, width: int, experts: int, number: int, places: _Places
) -> float:
    """One pool, a position of its own: its router, and top_k routed rows."""
    s, k, router = setting.bytes_each, shape.top_k, part.replace("experts", "router")
    size = 4 * experts + 12 * k + 8
    ranks = places.adapted(number, part)
    if router in places.whole or places.adapted(number, router):
        size += 4 * shape.hidden
    if ranks:  # models.grouped
        return size + s * (shape.hidden + k * (2 * width + sum(ranks)))
    size += k * (_ROUTED_INDICES + s * (1 + 3 * width + shape.hidden))  # gate and up, activation, output
    if part in places.whole:
        size += k * s * (width + shape.hidden)  # what the weights' gradients are made of
    return size


def _vision(setting: Workload, shape: ModelShape, tower: Tower, places: _Places) -> float:
    s, tokens = setting.bytes_each, setting.positions * setting.vision
    size = 0.0
    if places.touches("vision_tower"):
        block = s * (11 * tower.width + 3 * tower.mlp) + 4 * tower.heads + 16
        patches = tokens * tower.merge
        kept_blocks = 1 if setting.checkpointing else tower.depth
        size += patches * (block * kept_blocks + s * tower.width * (tower.depth if setting.checkpointing else 1))
    if places.touches("vision_tower") or places.touches("resampler"):
        size += tokens * (10 * s * tower.spatial + 2 * 4 * shape.hidden)
    return size


def _working(setting: Workload, shape: ModelShape) -> float:
    """The gradients that stand side by side in the widest step of a backward: of the routed rows, or of a SwiGLU."""
    s = setting.bytes_each
    steps = [setting.positions * s * (2 * shape.hidden + 3 * shape.queries)]
    for layer in shape.layers:
        if layer.mlp:
            steps.append(setting.positions * s * (shape.hidden + 4 * layer.mlp))
        for part, pool in layer.pools.items():
            share = setting.vision if part == "vision_experts" else 1 - setting.vision
            rows = setting.positions * share * shape.top_k
            steps.append(rows * s * (2 * shape.hidden + 4 * pool.width))
    return max(steps)
