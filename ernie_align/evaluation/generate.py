"""Prompts -> answers, in left-padded batches, images included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ernie_align.data.collate import Collator, model_inputs
from ernie_align.data.render import Renderer, Vision
from ernie_align.data.row import Row
from ernie_align.models.load import Bundle
from ernie_align.models.modality import ModalityTokens, mm_token_type_ids
from ernie_align.models.pixels import ImageSizes
from ernie_align.models.routing import check_routing, count_routed_tokens, pool_blocks

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def as_kwargs(self) -> dict[str, Any]:
        """`generate`'s own arguments."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }


def make_renderer(
    tokenizer: TokenizersBackend, modality: ModalityTokens | None, sizes: ImageSizes | None, *, thinking: bool = False
) -> Renderer:
    """The renderer of a model, from what is known of its tokens and images (None: a text model)."""
    if modality is None:
        return Renderer(tokenizer, thinking=thinking)
    return Renderer(tokenizer, Vision(modality.image, modality.ids, sizes.grid, sizes.tokens), thinking=thinking)


def renderer_of(bundle: Bundle, *, thinking: bool = False) -> Renderer:
    """The renderer that belongs to a loaded model."""
    return make_renderer(bundle.tokenizer, bundle.modality, bundle.image_sizes, thinking=thinking)


def answer(bundle: Bundle, row: Row, *, sampling: Sampling | None = None, thinking: bool = False) -> str:
    """The model's answer to one row. Raises RowFault for a row that cannot be asked."""
    renderer = renderer_of(bundle, thinking=thinking)
    ((_, text),) = answers(bundle, renderer, [row], sampling=sampling or Sampling(), batch_size=1)
    return text


def answers(
    bundle: Bundle, renderer: Renderer, rows: list[Row], *, sampling: Sampling, batch_size: int
) -> Iterator[tuple[int, str]]:
    """(number of the row, the model's answer without its end token), batch by batch of similar length.

    The order is that of the batches, not of the rows. Raises RowFault for a row that cannot be asked, ModelError where
    an image does not reach the vision experts.
    """
    prompts = [vars(renderer.prompt(row)) | {"rows": [0, number]} for number, row in enumerate(rows)]
    prompts.sort(key=lambda prompt: len(prompt["input_ids"]))
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor, left=True)
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        for prompt, ids in zip(chosen, _generate(bundle, renderer, collate(chosen), sampling), strict=True):
            yield prompt["rows"][1], _decode(ids, renderer)


def _generate(bundle: Bundle, renderer: Renderer, batch: dict[str, Any], sampling: Sampling) -> list[list[int]]:
    import torch

    model = bundle.model
    device = next(model.parameters()).device
    vision_tokens = int(batch["vision_tokens"])
    inputs = {name: values.to(device) for name, values in model_inputs(batch).items()}
    forbidden = {}
    if bundle.modality is not None:
        # `generate` places images (3-D rope) before the backbone is called, so it has to be told here
        inputs["mm_token_type_ids"] = mm_token_type_ids(inputs["input_ids"], bundle.modality)
        # a sampled placeholder would ask the next forward for an image that is not there
        forbidden["suppress_tokens"] = sorted(bundle.modality.ids)
    model.eval()
    with torch.no_grad(), count_routed_tokens(pool_blocks(model)) as seen:
        output = model.generate(
            **inputs,
            **sampling.as_kwargs(),
            **forbidden,
            eos_token_id=renderer.stop_ids,
            pad_token_id=bundle.tokenizer.pad_token_id,
        )
    check_routing(seen, vision_tokens=vision_tokens)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _decode(ids: list[int], renderer: Renderer) -> str:
    stops = set(renderer.stop_ids)
    length = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return renderer.tokenizer.decode(ids[:length])
