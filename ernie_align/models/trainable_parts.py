"""Resolve the scopes of a recipe to the exact parameters it trains, and summarize them by part. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ernie_align.errors import Fault, ModelError
from ernie_align.models.architecture import VISION_PARTS, Architecture, ParameterSpec
from ernie_align.recipe import AdapterBlock, Block, PartAdapter, PartTune, TuneBlock
from ernie_align.recipe.schema import parse_layers

# `layers` of an adapter or tune block counts the layers of the language model; it does not apply to these parts.
_NON_DECODER_PARTS = frozenset({"vision_tower", "resampler", "embeddings", "lm_head"})


@dataclass(frozen=True)
class Target:
    """A parameter that gets a LoRA adapter of this rank, scaled by alpha / rank. size: values of its adapter."""

    tensor: ParameterSpec
    rank: int
    alpha: float
    size: int = field(init=False)

    def __post_init__(self) -> None:
        *experts, out, inner = self.tensor.shape
        object.__setattr__(self, "size", self.rank * (inner + out) * math.prod(experts))


@dataclass(frozen=True)
class ParameterSummaryRow:
    """One part: its parameters and tensors, and how many are trained (those of the adapter, with LoRA)."""

    part: str
    parameters: int
    trainable: int
    tensors: int
    trained_tensors: int


@dataclass(frozen=True)
class ParameterSummary:
    """The parameters of a model and those that a run trains, part by part."""

    rows: tuple[ParameterSummaryRow, ...]

    @property
    def parameters(self) -> int:
        """Number of values of the whole model."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        """Number of trained values."""
        return sum(row.trainable for row in self.rows)

    @property
    def trains_only_vision(self) -> bool:
        """True if text without images or videos passes through no trained part."""
        trained = {row.part for row in self.rows if row.trained_tensors}
        return bool(trained) and trained <= VISION_PARTS


def adapter_block_from_config(config: Mapping[str, Any], architecture: Architecture, *, where: str) -> AdapterBlock:
    """Return the adapter block that a saved adapter_config.json corresponds to.

    Raises ModelError if a target is not the full name of a parameter, or if ranks or alphas differ within a part.
    """
    named = {*_names(config.get("target_modules")), *_names(config.get("target_parameters"))}
    parts: dict[str, dict[tuple[int, float], list[ParameterSpec]]] = {}
    for tensor in architecture.tensors:
        name = next((name for name in (tensor.name, tensor.name.removesuffix(".weight")) if name in named), None)
        if name is not None:
            rank = (config.get("rank_pattern") or {}).get(re.escape(name), config["r"])
            alpha = (config.get("alpha_pattern") or {}).get(re.escape(name), config["lora_alpha"])
            parts.setdefault(tensor.part, {}).setdefault((rank, float(alpha)), []).append(tensor)
            named.remove(name)
    if named or not parts or any(len(settings) > 1 for settings in parts.values()):
        fix = "write an adapter: block with the scopes, layers, rank and alpha of this adapter"
        raise ModelError.at(where, "the scopes of this adapter cannot be read from its config", fix=fix)
    scopes = {}
    for part, settings in parts.items():
        (((rank, alpha), tensors),) = settings.items()
        layers = sorted({tensor.layer for tensor in tensors if tensor.layer is not None})
        scopes[part] = PartAdapter(rank=rank, alpha=alpha, layers=layers or None)
    return AdapterBlock(
        scopes=scopes,
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora")),
    )


def _names(targets: Any) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets or [])


def adapter_targets(architecture: Architecture, block: AdapterBlock) -> list[Target]:
    """Return the parameters that get an adapter, in the model's order. Raises ModelError if a scope matches nothing."""
    parts = block.parts
    chosen = _select(architecture, block, parts, kinds=("linear", "fused", "router"))
    return [Target(tensor, parts[tensor.part].rank, parts[tensor.part].alpha) for tensor in chosen]


def tuned_parameters(architecture: Architecture, block: TuneBlock) -> list[ParameterSpec]:
    """Return the parameters to train in full, which excludes the correction biases.

    Raises ModelError if a scope matches nothing.
    """
    return _select(architecture, block, block.parts, kinds=("linear", "fused", "router", "plain"))


def parameter_summary(architecture: Architecture, trained: Iterable[Target | ParameterSpec]) -> ParameterSummary:
    """Count parameters and trained parameters of each part."""
    sizes: dict[str, list[int]] = {part: [] for part in architecture.by_part}
    for item in trained:
        part = item.tensor.part if isinstance(item, Target) else item.part
        sizes[part].append(item.size)
    rows = [
        ParameterSummaryRow(
            part=part,
            parameters=sum(tensor.size for tensor in tensors),
            trainable=sum(sizes[part]),
            tensors=len(tensors),
            trained_tensors=len(sizes[part]),
        )
        for part, tensors in architecture.by_part.items()
    ]
    return ParameterSummary(tuple(rows))


def _select(
    architecture: Architecture,
    block: AdapterBlock | TuneBlock,
    parts: Mapping[str, PartAdapter | PartTune],
    kinds: tuple[str, ...],
) -> list[ParameterSpec]:
    faults: list[Fault] = []
    chosen: set[str] = set()
    decoder_layers = _layers(block.layers, architecture.num_layers, "the language model", block, faults)
    for part, settings in parts.items():
        tensors = [tensor for tensor in architecture.by_part.get(part, ()) if tensor.kind in kinds]
        if not tensors:
            if block.scopes != "all":
                faults.append(_missing_part(architecture, part, block))
            continue
        part_layers = sorted({tensor.layer for tensor in tensors if tensor.layer is not None})
        if settings.layers is not None:
            layers = _layers(settings.layers, part_layers[-1] + 1 if part_layers else 0, part, settings, faults)
        else:
            layers = None if part in _NON_DECODER_PARTS else decoder_layers
        matched = [tensor.name for tensor in tensors if layers is None or tensor.layer in layers]
        if not matched and not faults and block.scopes != "all":
            where = (settings if settings.layers is not None else block).where("layers")
            if part_layers:
                fix = f"choose from layers {part_layers[0]}-{part_layers[-1]}, which have {part}"
            else:
                fix = f"{part} is not in the layers: drop layers"
            faults.append(Fault(where, f"none of these layers has {part}", fix=fix))
        chosen.update(matched)
    if faults:
        raise ModelError(*faults)
    return [tensor for tensor in architecture.tensors if tensor.name in chosen]


def _layers(layers: Any, depth: int, owner: str, block: Block, faults: list[Fault]) -> frozenset[int] | None:
    numbers = parse_layers(layers)
    if numbers is None:
        return None
    if depth == 0:
        faults.append(Fault(block.where("layers"), f"{owner} has no layers", fix="drop layers"))
    elif max(numbers) >= depth:
        fix = f"{owner} has layers 0-{depth - 1}"
        faults.append(Fault(block.where("layers"), f"layer {max(numbers)} does not exist", fix=fix))
    return frozenset(numbers)


def _missing_part(architecture: Architecture, part: str, block: Block) -> Fault:
    where = block.where("scopes")
    if part == "lm_head" and architecture.tied:
        what = "lm_head has no weight of its own in this model: it is tied to the embeddings"
        return Fault(where, what, fix="name embeddings instead")
    what = f"this model ({architecture.family}) has no {part}"
    return Fault(where, what, fix=f"choose from {', '.join(architecture.by_part)}")
