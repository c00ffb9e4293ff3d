"""Compare what two models answer to the same prompts: rows of the run's own data, or synthetic ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_align.data import media
from ernie_align.data.collate import Collator, model_inputs
from ernie_align.data.render import Renderer, renderer_of
from ernie_align.data.row import Row, RowFault
from ernie_align.data.sources import Source, iter_rows
from ernie_align.errors import AlignError
from ernie_align.evaluation.generate import Sampling, generate_answers
from ernie_align.models.load import Bundle
from ernie_align.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS_PER_KIND = 8  # prompts of text alone, and as many with images
_MAX_PROMPT_TOKENS = 2048  # longer rows are skipped
_ROWS_READ = 64  # of each source
POSITIONS = 64  # last positions of each prompt; earlier ones reach them through attention
NEW_TOKENS = 32  # of each greedy continuation

_QUESTIONS = (
    "What is seven plus eight?",
    "Name three rivers and the seas they end in.",
    "Write one sentence about the weather.",
    "为什么天空是蓝色的",
    "Translate into French: the house is old.",
    "List the prime numbers below thirty.",
    "What does a compiler do?",
    "Tell me a short story about a lighthouse.",
)
_IMAGE_QUESTION = "What is shown here?"


@dataclass(frozen=True)
class Prompts:
    """Prompts of text alone, then prompts with images. origins: number of rows from each origin."""

    rows: tuple[Row, ...]
    origins: dict[str, int]
    with_images: int

    def __str__(self) -> str:
        origins = ", ".join(f"{count} {origin}" for origin, count in self.origins.items())
        return f"{len(self.rows)} prompts, {self.with_images} with images ({origins})"


def choose_prompts(recipe: Recipe | None, renderer: Renderer) -> Prompts:
    """Choose PROMPTS_PER_KIND prompts of text and, for a model with vision, as many with images."""
    kinds = (False, True) if renderer.vision is not None else (False,)
    chosen: dict[bool, list[Row]] = {kind: [] for kind in kinds}
    origins: dict[str, int] = {}
    for name, row in _rows_of_run(recipe):
        kind = bool(row.images)
        if kind in chosen and len(chosen[kind]) < PROMPTS_PER_KIND and _is_usable(row, renderer):
            chosen[kind].append(row)
            origins[f"of {name}"] = origins.get(f"of {name}", 0) + 1
    for kind in kinds:
        missing = PROMPTS_PER_KIND - len(chosen[kind])
        chosen[kind] += _synthetic_rows(missing, with_images=kind)
        if missing:
            origins["made up"] = origins.get("made up", 0) + missing
    rows = tuple(row for kind in kinds for row in chosen[kind])
    return Prompts(rows, origins, len(chosen.get(True, ())))


def _rows_of_run(recipe: Recipe | None) -> list[tuple[str, Row]]:
    """Return (source, row) for the first rows of held-out sources, else of training sources; skip missing sources."""
    if recipe is None:
        return []
    rows: list[tuple[str, Row]] = []
    for block in recipe.data.eval or recipe.data.train:
        try:
            rows += [(block.name, row) for row in iter_rows(Source(block, recipe.data, sample=_ROWS_READ))]
        except (AlignError, OSError):
            continue
    return rows


def _is_usable(row: Row, renderer: Renderer) -> bool:
    try:
        return len(renderer.prompt(row).input_ids) <= _MAX_PROMPT_TOKENS
    except RowFault:  # an image that no longer exists
        return False


def _synthetic_rows(count: int, *, with_images: bool) -> list[Row]:
    if not with_images:
        return [Row(messages=[{"role": "user", "content": question}]) for question in _QUESTIONS[:count]]
    content = [{"type": "image"}, {"type": "text", "text": _IMAGE_QUESTION}]
    return [Row(messages=[{"role": "user", "content": content}], images=[_image(seed)]) for seed in range(count)]


def _image(seed: int) -> dict:
    """Make a mosaic of 4 x 6 random colors, 112 x 168 pixels."""
    from PIL import Image

    mosaic = Image.frombytes("RGB", (6, 4), random.Random(seed).randbytes(6 * 4 * 3))
    return media.image_reference(mosaic.resize((168, 112), Image.Resampling.NEAREST), None)


@dataclass(frozen=True)
class Bound:
    """A limit on how far an export may differ from its source. metric: a field of Difference; label: for users."""

    metric: str
    label: str
    value: float
    why: str

    def violation(self, difference: Difference) -> str | None:
        """Return why an export is refused, or None."""
        value = getattr(difference, self.metric)
        if math.isfinite(value) and value <= self.value:
            return None
        return f"{self.label} {value:.3g} is over the bound of {self.value:g}"


# by dtype of the weights
BOUNDS = {
    "float32": Bound(
        "relative_difference",
        "worst difference of two logits over the largest logit",
        1e-5,
        "summing in another order changes float32 results by less; a larger difference has another cause",
    ),
    "bfloat16": Bound(
        "mean_kl",
        "mean KL",
        1e-2,
        "by Pinsker's inequality, samples differ in at most 7 tokens of 100 below it: sqrt(0.01 / 2)",
    ),
}


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for all prompts.

    logits: (t, V) float32 for each prompt, t up to POSITIONS; texts: greedy continuations.
    """

    logits: list[Tensor]
    texts: list[str]


@dataclass(frozen=True)
class Difference:
    """The difference of two models over all prompts.

    worst_difference: between two logits; largest_logit: in absolute value; mean_kl: KL(first ‖ second) of the next
    token, in nats, over all positions; same_top: fraction of positions with the same most likely token; same_texts:
    prompts with identical continuations.
    """

    worst_difference: float
    largest_logit: float
    mean_kl: float
    same_top: float
    same_texts: int
    prompts: int
    positions: int

    @property
    def relative_difference(self) -> float:
        """worst_difference / max(1, largest_logit): float32's rounding grows with the largest logit."""
        return self.worst_difference / max(1.0, self.largest_logit)


def run_prompts(bundle: Bundle, rows: Iterable[Row], *, thinking: bool = False, generate: bool = True) -> Outputs:
    """Compute the logits at the end of each prompt and, with `generate`, its greedy continuation."""
    import torch

    rows = list(rows)
    renderer = renderer_of(bundle, thinking=thinking)
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor)
    device = next(bundle.model.parameters()).device
    bundle.model.eval()
    logits = []
    for number, row in enumerate(rows):  # one by one: padding would change the shapes that are summed over
        batch = model_inputs(collate([vars(renderer.prompt(row)) | {"rows": [0, number]}]))
        inputs = {name: values.to(device) for name, values in batch.items()}
        with torch.no_grad():
            output = bundle.model(**inputs, logits_to_keep=POSITIONS, use_cache=False)
        logits.append(output.logits[0].float().cpu())
    texts: dict[int, str] = {}
    if generate:
        batches = generate_answers(bundle, renderer, rows, sampling=Sampling(NEW_TOKENS), batch_size=len(rows))
        texts = {number: answer.text for batch in batches for number, _, answer in batch}
    return Outputs(logits, [texts[number] for number in sorted(texts)])


def compare(first: Outputs, second: Outputs) -> Difference:
    """Compute how far the second model is from the first."""
    worst, largest, kl, same, positions = 0.0, 0.0, 0.0, 0, 0
    for one, other in zip(first.logits, second.logits, strict=True):
        worst = max(worst, (one - other).abs().max().item())
        largest = max(largest, one.abs().max().item())
        log_p, log_q = one.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        same += int((one.argmax(dim=-1) == other.argmax(dim=-1)).sum())
        positions += len(one)
    same_texts = sum(a == b for a, b in zip(first.texts, second.texts, strict=False))
    # terms that cancel may leave a sum just below zero
    mean_kl = max(kl / positions, 0.0)
    return Difference(worst, largest, mean_kl, same / positions, same_texts, len(first.logits), positions)
