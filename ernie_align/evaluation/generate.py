"""Prompts -> answers, in left-padded batches, images included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ernie_align.data.collate import Collator, model_inputs
from ernie_align.data.render import Renderer, renderer_of
from ernie_align.data.row import Row
from ernie_align.models.load import Bundle
from ernie_align.models.routing import mm_token_type_ids
from ernie_align.models.routing_stats import check_routing, count_routed_tokens, find_expert_pools

if TYPE_CHECKING:
    from transformers import LogitsProcessorList


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What the model said, its end token left out of the text and kept in the ids."""

    text: str
    ids: list[int]


def answer(
    bundle: Bundle,
    row: Row,
    *,
    sampling: Sampling | None = None,
    thinking: bool = False,
    write: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to one row. write: is given the text piece by piece as it comes.

    Raises RowFault for a row that cannot be asked.
    """
    renderer = renderer_of(bundle, thinking=thinking)
    prompt = vars(renderer.prompt(row)) | {"rows": [0, 0]}
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor, left=True)
    (ids,) = _generate(bundle, renderer, collate([prompt]), sampling or Sampling(), ["0"], write)
    return _said(ids, renderer).text


def generate_answers(
    bundle: Bundle,
    renderer: Renderer,
    rows: Sequence[Row],
    *,
    sampling: Sampling,
    samples: int = 1,
    batch_size: int,
    skip: Callable[[list[tuple[int, int]]], bool] = lambda keys: False,
) -> Iterator[list[tuple[int, int, Answer]]]:
    """(number of the row, number of the sample, answer), batch by batch of similar length, the longest first.

    Which rows share a batch depends on the rows alone, so that a batch gives the same answers whenever it is asked;
    skip: batches of these rows and samples need no answer. A sample is drawn by a seed of its own, made of the plan's,
    the row's number and the sample's: which batch it is in does not matter.
    Raises RowFault for a row that cannot be asked, ModelError where an image does not reach the vision experts.
    """
    prompts = [vars(renderer.prompt(row)) | {"rows": [0, number]} for number, row in enumerate(rows)]
    # the longest first: what does not fit into memory is found at once
    prompts.sort(key=lambda prompt: -len(prompt["input_ids"]))
    asked = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor, left=True)
    for start in range(0, len(asked), batch_size):
        chosen = asked[start : start + batch_size]
        keys = [(prompt["rows"][1], sample) for prompt, sample in chosen]
        if skip(keys):
            continue
        seeds = [f"{sampling.seed} {row} {sample}" for row, sample in keys]
        batch = collate([prompt for prompt, _ in chosen])
        ids = _generate(bundle, renderer, batch, sampling, seeds)
        yield [(*key, _said(own, renderer)) for key, own in zip(keys, ids, strict=True)]


def _generate(
    bundle: Bundle,
    renderer: Renderer,
    batch: dict[str, Any],
    sampling: Sampling,
    seeds: list[str],
    write: Callable[[str], None] | None = None,
) -> list[list[int]]:
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
    with torch.no_grad(), count_routed_tokens(find_expert_pools(model)) as seen:
        output = model.generate(
            **inputs,
            **forbidden,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # draws are made by the noise in the logits, where there is any
            logits_processor=_noise(sampling, seeds, device) if sampling.temperature else None,
            streamer=_streamer(renderer, write) if write else None,
            eos_token_id=renderer.stop_ids,
            pad_token_id=bundle.tokenizer.pad_token_id,
        )
    check_routing(seen, vision_tokens=vision_tokens)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _noise(sampling: Sampling, seeds: list[str], device: Any) -> LogitsProcessorList:
    """Logits -> logits whose largest is a draw from softmax(logits / temperature), cut off at top_p.

    argmax(log p + g) is a draw from p for independent standard Gumbel g: Maddison et al. (2014), A* Sampling, NeurIPS.
    `generate`'s own sampling takes its numbers from one stream for the whole batch: a row's draw would depend on the
    rows beside it. Here each row has a stream of its own.
    """
    import hashlib

    import torch
    from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    class Gumbel(LogitsProcessor):
        def __init__(self):
            digests = [hashlib.sha256(seed.encode()).digest() for seed in seeds]
            self.streams = [
                torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests
            ]

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            drawn = [torch.empty_like(scores[0]).exponential_(generator=stream) for stream in self.streams]
            return scores.log_softmax(dim=-1) - torch.stack(drawn).log()  # -log of an exponential is Gumbel

    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*warpers, Gumbel()])


def _streamer(renderer: Renderer, write: Callable[[str], None]) -> Any:
    """Hands text on as soon as it is whole words."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Streamer(renderer.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _said(ids: list[int], renderer: Renderer) -> Answer:
    stops = set(renderer.stop_ids)
    length = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return Answer(renderer.tokenizer.decode(ids[:length]), ids[: length + 1])
