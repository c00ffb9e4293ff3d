"""Routing of a checkpoint on the questions of an evaluation: expert load per layer, and changes from its baseline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.data.collate import Collator, model_inputs
from ernie_align.data.render import Renderer, renderer_of
from ernie_align.evaluation.questions import Question, load_questions
from ernie_align.models.load import Bundle
from ernie_align.recipe.evaluation import DataSetBlock

if TYPE_CHECKING:
    from torch import Tensor

Router = tuple[int, str]  # layer, pool


@dataclass(frozen=True)
class RoutingSnapshot:
    """The experts chosen for every token of some prompts.

    rows: number of prompts; ids: token ids of each; chosen: router -> (N, k) experts of the N tokens of its pool,
    prompt by prompt, in ascending order; experts: router -> number of its experts.
    """

    rows: int
    ids: list[list[int]]
    chosen: dict[Router, Tensor]
    experts: dict[Router, int]


@dataclass(frozen=True)
class RoutedToken:
    """One token of a prompt. pool: text or vision; experts: layer -> the experts of that pool chosen for it."""

    text: str
    pool: str
    experts: dict[int, list[int]]


def route(bundle: Bundle, data: str | Path, *, rows: int = 32) -> RoutingSnapshot | None:
    """Record the routing of the first questions of a file. Return None for a model without routers.

    Raises DataError for a row that cannot be rendered.
    """
    questions = list(load_questions(DataSetBlock(path=str(data), limit=rows)))
    return take_routing_snapshot(bundle, renderer_of(bundle), questions)


def routed_tokens(bundle: Bundle, snapshot: RoutingSnapshot, row: int = 0) -> list[RoutedToken]:
    """Return the tokens of one prompt of a snapshot of `bundle`, with the experts of each."""
    vision = bundle.modality.ids if bundle.modality else frozenset()
    pools = [["vision" if token in vision else "text" for token in ids] for ids in snapshot.ids]
    before = {pool: sum(own.count(pool) for own in pools[:row]) for pool in ("text", "vision")}
    tokens = []
    for token, pool in zip(snapshot.ids[row], pools[row], strict=True):
        experts = {
            layer: chosen[before[pool]].tolist() for (layer, own), chosen in snapshot.chosen.items() if own == pool
        }
        text = bundle.tokenizer.convert_ids_to_tokens(token).replace("▁", " ")
        tokens.append(RoutedToken(text, pool, experts))
        before[pool] += 1
    return tokens


def first_of_each(questions: Sequence[Question], count: int) -> list[Question]:
    """Return the first `count` questions of each data set."""
    names = dict.fromkeys(question.data for question in questions)
    return [question for name in names for question in [q for q in questions if q.data == name][:count]]


def take_routing_snapshot(bundle: Bundle, renderer: Renderer, questions: Sequence[Question]) -> RoutingSnapshot | None:
    """Run each prompt in a forward pass of its own, so that no padding is routed. Return None without routers."""
    import torch

    from ernie_align.models.token_dispatch import record_expert_choices

    device = next(bundle.model.parameters()).device
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)
    bundle.model.eval()
    ids, parts = [], {}
    experts: dict[Router, int] = {}
    for number, question in enumerate(questions):
        prompt = vars(renderer.prompt(question.prompt)) | {"rows": [0, number]}
        ids.append(prompt["input_ids"])
        inputs = {name: values.to(device) for name, values in model_inputs(collate([prompt])).items()}
        with torch.no_grad(), record_expert_choices(bundle.model) as chosen:
            bundle.model(**inputs, use_cache=False)
        for name, calls in chosen.items():
            parts.setdefault(_router(name), []).extend(call.cpu() for call in calls)
            experts[_router(name)] = bundle.model.get_submodule(name).weight.shape[0]
    if not parts:
        return None
    merged = {router: torch.cat(calls) for router, calls in sorted(parts.items())}
    return RoutingSnapshot(len(ids), ids, merged, experts)


def _router(name: str) -> Router:
    """Return the layer and pool of a module name: adapters add prefixes, so whole names differ between models."""
    return int(re.search(r"\blayers\.(\d+)\.", name)[1]), "vision" if ".vision_moe." in name else "text"


def describe(snapshot: RoutingSnapshot, baseline: RoutingSnapshot | None = None) -> dict[str, Any]:
    """Return the load of each expert, unused experts, and the share of tokens routed differently from the baseline.

    load: share of a layer's and pool's (token, expert) choices that each expert gets; sums to 1, and 1 / experts is an
    even load. flipped: share of tokens whose set of experts differs; None without a baseline, or if its tokens differ.
    """
    comparable = baseline is not None and baseline.ids == snapshot.ids and baseline.experts == snapshot.experts
    layers = []
    for (layer, pool), chosen in snapshot.chosen.items():
        counts = chosen.flatten().bincount(minlength=snapshot.experts[layer, pool])
        flips = int((chosen != baseline.chosen[layer, pool]).any(dim=-1).sum()) if comparable else None
        layers.append(
            {
                "layer": layer,
                "pool": pool,
                "tokens": len(chosen),
                "load": (counts / max(1, chosen.numel())).tolist(),
                "unused": [expert for expert, count in enumerate(counts.tolist()) if not count],
                "flipped": flips / len(chosen) if comparable and len(chosen) else None,
            }
        )
    return {"rows": snapshot.rows, "layers": layers, "flipped": _by_pool(layers) if comparable else None}


def _by_pool(layers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return pool -> share of flipped tokens over all its layers, weighted by tokens."""
    shares = {}
    for pool in dict.fromkeys(layer["pool"] for layer in layers):
        own = [layer for layer in layers if layer["pool"] == pool and layer["tokens"]]
        if own:
            shares[pool] = sum(layer["flipped"] * layer["tokens"] for layer in own) / sum(
                layer["tokens"] for layer in own
            )
    return shares
