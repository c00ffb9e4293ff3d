"""A scope -> the exact tensors it trains, and the coverage table that says so. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ernie_align.errors import Fault, ModelError
from ernie_align.models.architecture import VISION_PARTS, Architecture, ParameterSpec
from ernie_align.recipe import AdapterBlock, Block, PartAdapter, PartTune, TuneBlock
from ernie_align.recipe.schema import parse_layers

# `layers` of an adapter or tune block counts the layers of the language model; these parts stand outside them.
OUTSIDE_THE_DECODER = frozenset({"vision_tower", "resampler", "embeddings", "lm_head"})


@dataclass(frozen=True)
class Target:
    """A tensor that gets a LoRA adapter of this rank, scaled by alpha / rank."""

    tensor: ParameterSpec
    rank: int
    alpha: float


@dataclass(frozen=True)
class ParameterSummaryRow:
    """One part: its parameters, those that are trained (of the adapter, with LoRA), and its tensors likewise."""

    part: str
    parameters: int
    trainable: int
    tensors: int
    trained_tensors: int


@dataclass(frozen=True)
class ParameterSummary:
    """What a run trains, part by part."""

    rows: tuple[ParameterSummaryRow, ...]

    @property
    def parameters(self) -> int:
        """Values of the whole model."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        """Values that are trained."""
        return sum(row.trainable for row in self.rows)

    @property
    def trained_parts(self) -> frozenset[str]:
        """Parts with at least one trained tensor."""
        return frozenset(row.part for row in self.rows if row.trained_tensors)

    @property
    def trains_only_vision(self) -> bool:
        """Only parts are trained that a sequence without images or videos never touches."""
        return bool(self.trained_parts) and self.trained_parts <= VISION_PARTS


def adapter_block_from_config(config: Mapping[str, Any], architecture: Architecture, *, where: str) -> AdapterBlock:
    """The adapter block that a saved adapter_config.json amounts to.

    Raises ModelError where its targets are not named in full, or where a part has not one rank and alpha throughout.
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
        fix = "write adapter: with the scopes, layers, rank and alpha that it has"
        raise ModelError.at(where, "this adapter's config does not say its scope by parts", fix=fix)
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
    """The tensors that get an adapter, in the model's order. Raises ModelError where a scope matches nothing."""
    chosen = _select(architecture, block, block.parts, kinds=("linear", "fused", "router"))
    parts = block.parts
    return [Target(tensor, parts[tensor.part].rank, parts[tensor.part].alpha) for tensor in chosen]


def tuned_parameters(architecture: Architecture, block: TuneBlock) -> list[ParameterSpec]:
    """The tensors trained in full; the correction biases never are. Raises ModelError where a scope matches nothing."""
    return _select(architecture, block, block.parts, kinds=("linear", "fused", "router", "plain"))


def parameter_summary(architecture: Architecture, trained: Iterable[Target | ParameterSpec]) -> ParameterSummary:
    """The table: part, parameters, trainable, tensors."""
    values: dict[str, list[int]] = {part: [] for part in architecture.parts}
    for item in trained:
        tensor = item.tensor if isinstance(item, Target) else item
        size = tensor.lora_size(item.rank) if isinstance(item, Target) else tensor.size
        values[tensor.part].append(size)
    return ParameterSummary(
        tuple(
            ParameterSummaryRow(
                part=part,
                parameters=sum(tensor.size for tensor in architecture.of(part)),
                trainable=sum(sizes),
                tensors=len(architecture.of(part)),
                trained_tensors=len(sizes),
            )
            for part, sizes in values.items()
        )
    )


def _select(
    architecture: Architecture,
    block: AdapterBlock | TuneBlock,
    parts: Mapping[str, PartAdapter | PartTune],
    kinds: tuple[str, ...],
) -> list[ParameterSpec]:
    faults: list[Fault] = []
    chosen: set[str] = set()
    decoder_layers = _layers(block.layers, architecture.num_layers, "the language model", block, faults)
    for part, own in parts.items():
        tensors = [tensor for tensor in architecture.of(part) if tensor.kind in kinds]
        if not tensors:
            if block.scopes != "all":
                faults.append(_missing_part(architecture, part, block))
            continue
        depth = 1 + max((tensor.layer for tensor in tensors if tensor.layer is not None), default=-1)
        if own.layers is not None:
            wanted = _layers(own.layers, depth, part, own, faults)
        else:
            wanted = None if part in OUTSIDE_THE_DECODER else decoder_layers
        matched = [tensor for tensor in tensors if wanted is None or tensor.layer in wanted]
        if not matched and not faults and block.scopes != "all":
            where = (own if own.layers is not None else block).where("layers")
            holds = sorted({tensor.layer for tensor in tensors if tensor.layer is not None})
            fix = f"{part} stands in layers {holds[0]}-{holds[-1]}" if holds else f"{part} has no layers: drop layers"
            faults.append(Fault(where, f"{part} has no tensor in these layers", fix=fix))
        chosen.update(tensor.name for tensor in matched)
    if faults:
        raise ModelError(*faults)
    return [tensor for tensor in architecture.tensors if tensor.name in chosen]


def _layers(layers, depth: int, what: str, block: Block, faults: list[Fault]) -> frozenset[int] | None:
    numbers = parse_layers(layers)
    if numbers is None:
        return None
    if depth == 0:
        faults.append(Fault(block.where("layers"), f"{what} has no layers", fix="drop layers"))
    elif max(numbers) >= depth:
        fix = f"{what} has layers 0-{depth - 1}"
        faults.append(Fault(block.where("layers"), f"layer {max(numbers)} does not exist", fix=fix))
    return frozenset(numbers)


def _missing_part(architecture: Architecture, part: str, block: Block) -> Fault:
    where = block.where("scopes")
    if part == "lm_head" and architecture.tied:
        return Fault(
            where, "lm_head has no weight of its own in this model: it is tied to embeddings", fix="name embeddings"
        )
    what = f"{part} is no part of this model ({architecture.family})"
    return Fault(where, what, fix=f"choose from {', '.join(architecture.parts)}")
