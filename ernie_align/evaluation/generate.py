"""Generate answers to prompts in left-padded batches, images included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ernie_align.data.collate import Collator, model_inputs
from ernie_align.data.render import Renderer, renderer_of
from ernie_align.data.row import Row
from ernie_align.models.load import Bundle
from ernie_align.models.routing import mm_token_type_ids

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

Key = tuple[int, int]  # (row number, sample number)
Skip = Callable[[list[Key]], bool]


@dataclass(frozen=True)
class Sampling:
    """Generation settings. temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A generated answer: text without the end token, ids with it. opened: the prompt ended inside the reasoning."""

    text: str
    ids: list[int]
    opened: bool


def iter_batches(
    examples: Sequence[tuple[Key, dict[str, Any]]], *, batch_size: int, skip: Skip
) -> Iterator[tuple[list[Key], list[dict[str, Any]]]]:
    """Yield the keys and the examples of each batch, except batches whose keys `skip` accepts.

    The batches depend on the examples alone, so an interrupted evaluation repeats the same batches.
    """
    for start in range(0, len(examples), batch_size):
        keys, batch = zip(*examples[start : start + batch_size], strict=True)
        if not skip(list(keys)):
            yield list(keys), list(batch)


def generate_answer(
    bundle: Bundle,
    row: Row,
    *,
    sampling: Sampling | None = None,
    thinking: bool = False,
    write: Callable[[str], None] | None = None,
) -> str:
    """Return the model's answer to one row. write: called with each piece of the text as it is generated.

    Raises RowFault if the row cannot be rendered as a prompt.
    """
    renderer = renderer_of(bundle, thinking=thinking)
    prompt = vars(renderer.prompt(row)) | {"rows": [0, 0]}
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor, left=True)
    (ids,) = _generate(bundle, renderer, collate([prompt]), sampling or Sampling(), ["0"], write)
    return _decode(ids, renderer, row).text


def generate_answers(
    bundle: Bundle,
    renderer: Renderer,
    rows: Sequence[Row],
    *,
    sampling: Sampling,
    samples: int = 1,
    batch_size: int,
    skip: Skip = lambda keys: False,
) -> Iterator[list[tuple[int, int, Answer]]]:
    """Yield batches of (row number, sample number, answer), longest prompts first.

    Each sample has its own seed, made of the config's seed, the row number and the sample number, so its answer does
    not depend on its batch. skip: returns True for batches whose answers are not needed.
    Raises RowFault if a row cannot be rendered as a prompt, ModelError if an image does not reach the vision experts.
    """
    prompts = [vars(renderer.prompt(row)) | {"rows": [0, number]} for number, row in enumerate(rows)]
    # longest first: a batch that does not fit into memory fails at the start
    prompts.sort(key=lambda prompt: -len(prompt["input_ids"]))
    examples = [((prompt["rows"][1], sample), prompt) for prompt in prompts for sample in range(samples)]
    collate = Collator(bundle.tokenizer.pad_token_id, image_processor=bundle.image_processor, left=True)
    for keys, batch in iter_batches(examples, batch_size=batch_size, skip=skip):
        seeds = [f"{sampling.seed} {row} {sample}" for row, sample in keys]
        answers = _generate(bundle, renderer, collate(batch), sampling, seeds)
        yield [
            (row, sample, _decode(ids, renderer, rows[row])) for (row, sample), ids in zip(keys, answers, strict=True)
        ]


def _generate(
    bundle: Bundle,
    renderer: Renderer,
    batch: dict[str, Any],
    sampling: Sampling,
    seeds: list[str],
    write: Callable[[str], None] | None = None,
) -> list[list[int]]:
    import torch

    from ernie_align.models.token_dispatch import check_routing, count_routed_tokens, find_expert_pools

    model = bundle.model
    device = next(model.parameters()).device
    vision_tokens = int(batch["vision_tokens"])
    inputs = {name: values.to(device) for name, values in model_inputs(batch).items()}
    if bundle.modality is not None:
        # `generate` computes 3-D rope positions before it calls the backbone, whose hook derives this otherwise
        inputs["mm_token_type_ids"] = mm_token_type_ids(inputs["input_ids"], bundle.modality)
        # after a sampled placeholder the next forward pass would need an image that does not exist
        inputs["suppress_tokens"] = sorted(bundle.modality.ids)
    model.eval()
    with torch.no_grad(), count_routed_tokens(find_expert_pools(model)) as counts:
        output = model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # sampling, if any, is done by noise added to the logits
            logits_processor=_gumbel_noise(sampling, seeds, device) if sampling.temperature else None,
            streamer=_streamer(renderer, write) if write else None,
            eos_token_id=renderer.stop_ids,
            pad_token_id=bundle.tokenizer.pad_token_id,
        )
    check_routing(counts, vision_tokens=vision_tokens)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _gumbel_noise(sampling: Sampling, seeds: list[str], device: Any) -> LogitsProcessorList:
    """Return processors after which the argmax is a sample from softmax(logits / temperature), truncated at top_p.

    argmax(log p + g) is a sample from p for independent standard Gumbel g: Maddison et al. (2014), A* Sampling,
    NeurIPS. `generate` samples the whole batch from one random stream, so a row's sample would depend on the other rows
    of its batch. Here each row has its own stream.
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
            noise = [torch.empty_like(scores[0]).exponential_(generator=stream) for stream in self.streams]
            return scores.log_softmax(dim=-1) - torch.stack(noise).log()  # -log of an exponential is Gumbel

    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*warpers, Gumbel()])


def _streamer(renderer: Renderer, write: Callable[[str], None]) -> Any:
    """Return a streamer that calls `write` with each complete word."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Streamer(renderer.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _decode(ids: list[int], renderer: Renderer, row: Row) -> Answer:
    """Cut generated ids after the first end token and decode them."""
    stops = set(renderer.stop_ids)
    length = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return Answer(renderer.tokenizer.decode(ids[:length]), ids[: length + 1], renderer.opens_thinking(row))
