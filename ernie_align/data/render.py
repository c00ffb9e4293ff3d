"""A canonical row -> token ids with labels, by the checkpoint's own chat template.

Invariant: the tokens before a trained answer are exactly those that `generate` is given for that turn. Therefore each
answer is rendered after its own generation prompt and tokenized separately, as the model will write it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ernie_align.data import media
from ernie_align.data.row import Message, Row, RowDropped, RowFault, count_images
from ernie_align.errors import ModelError

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

IGNORE_INDEX = -100  # label of a token that is not trained
_PROBE = "\ue0a0answer\ue0a0"  # replaces an answer to find where the template puts its text
_OPEN_THINKING, _CLOSE_THINKING = "<think>", "</think>"


@dataclass(frozen=True)
class VisionSpec:
    """Image properties of a model that rendering needs. placeholder: the repeated id; ids: every modality token.

    grid: (height, width) in pixels -> patches (1, rows, columns); tokens: that grid -> number of placeholders.
    """

    placeholder: int
    ids: frozenset[int]
    grid: Callable[[int, int], tuple[int, int, int]]
    tokens: Callable[[tuple[int, int, int]], int]


@dataclass
class Example:
    """Token ids with labels.

    media: references to its images, in order (not `images`: TRL treats every data set with a column of that name as
    one to process itself); vision_tokens: tokens of its images by their sizes, start and end tokens included;
    reasoning_left_out: answers whose reasoning is not trained because thinking is off; cut: shortened to max_length.
    """

    input_ids: list[int]
    labels: list[int]
    media: list[dict[str, Any]] = field(default_factory=list)
    vision_tokens: int = 0
    reasoning_left_out: int = 0
    cut: bool = False


@dataclass
class _Turns:
    """Turns that share one sequence: ids with one placeholder per image, and the end of each answer."""

    ids: list[int]
    labels: list[int]
    ends: list[tuple[int, int]]  # (length, images so far) after each answer
    reasoning_left_out: int = 0


class Renderer:
    """Renders rows with a checkpoint's tokenizer and its own chat template.

    thinking: the template's enable_thinking, unless a row sets it; vision: None for a text model.
    """

    def __init__(self, tokenizer: TokenizersBackend, vision: VisionSpec | None = None, *, thinking: bool = False):
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.vision = vision
        self.thinking = thinking

    def examples(self, row: Row, *, max_length: int, cut: bool = False) -> list[Example]:
        """Return the row's training examples: one, or one per answer if the template renders history differently.

        Raises RowFault for a row with nothing to train or broken images, and RowDropped for one that is longer than
        max_length tokens. With `cut` a long row ends after the last answer that fits.
        """
        if row.plain is not None:
            sequences = [self._plain_turns(*row.plain)]
        else:
            if not row.trained_turns:
                raise RowFault("nothing to train: no assistant turn with label 1", "give it an answer, or drop it")
            sequences = self._conversation_turns(row)
        tokens = self._image_tokens(row.images)
        result = []
        for sequence in sequences:
            fitting = [end for end in sequence.ends if end[0] + sum(tokens[: end[1]]) - end[1] <= max_length]
            if len(fitting) < len(sequence.ends) and not cut:
                raise RowDropped(f"over data.max_length {max_length}")
            if not fitting and result:
                result[-1].cut = True
            if fitting:
                length, images = fitting[-1]
                example = self._expand_images(
                    sequence.ids[:length], sequence.labels[:length], row.images[:images], tokens
                )
                example.reasoning_left_out = sequence.reasoning_left_out
                example.cut = len(fitting) < len(sequence.ends)
                result.append(example)
        if not result:
            raise RowDropped(f"over data.max_length {max_length}")
        return result

    def prompt(self, row: Row) -> Example:
        """Return the input of `generate`: everything before a final answer, and the generation prompt."""
        if row.plain is not None:
            ids = self.tokenizer(row.plain[0])["input_ids"]
            return Example(ids, [IGNORE_INDEX] * len(ids))
        messages = row.messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        marked = self.template.mark_control_tokens(messages)
        ids = self.template.tokenize(self._render(marked, row, generation_prompt=True))
        images = row.images[: count_images(messages)]
        return self._expand_images(ids, [IGNORE_INDEX] * len(ids), images, self._image_tokens(images))

    def opens_thinking(self, row: Row) -> bool:
        """Return True if the row's generation prompt opens a thinking block, so that the answer starts inside it."""
        if row.plain is not None:
            return False
        messages = self.template.mark_control_tokens(row.messages)
        prompt = self._render(messages, row, generation_prompt=True)
        return _leaves_thinking_open(prompt.removeprefix(self._render(messages, row, generation_prompt=False)))

    @cached_property
    def stop_ids(self) -> list[int]:
        """Token ids that end an answer: those the template closes a turn with, and the end of sequence."""
        messages: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        text = self._render(messages, Row(), generation_prompt=False)
        tail = text[text.index(_PROBE) + len(_PROBE) :]
        closing = [self.tokenizer.convert_tokens_to_ids(token) for token in self.template.special.findall(tail)]
        return list(dict.fromkeys([*closing, self.tokenizer.eos_token_id]))

    # -- one conversation ---------------------------------------------------------------------------------------

    def _conversation_turns(self, row: Row) -> list[_Turns]:
        sequences: list[_Turns] = []
        messages: list[Message] = []  # each is marked once, however many turns it precedes
        parts: dict[str, list[int]] = {}  # each is tokenized once, however many contexts contain it
        for number in row.trained_turns:
            messages += self.template.mark_control_tokens(row.messages[len(messages) : number + 1])
            before, turn = messages[:number], messages[number]
            context = self._render(before, row, generation_prompt=True)
            answer, reasoning_left_out = self._render_answer(context, before, turn, row)
            context_ids, answer_ids = self.template.tokenize(context, parts), self.template.tokenize_answer(answer)
            previous = sequences[-1].ids if sequences else None
            if previous is None or context_ids[: len(previous)] != previous:
                sequences.append(_Turns([], [], []))
                previous = []
            sequence = sequences[-1]
            sequence.labels += [IGNORE_INDEX] * (len(context_ids) - len(previous)) + answer_ids
            sequence.ids = context_ids + answer_ids
            sequence.ends.append((len(sequence.ids), count_images(before)))
            sequence.reasoning_left_out += reasoning_left_out
        return sequences

    def _render_answer(self, context: str, before: list[Message], turn: Message, row: Row) -> tuple[str, bool]:
        """Return the text the model has to write after `context`, up to the end token of the turn.

        The flag says that the turn has reasoning which this text leaves out.
        """
        text = self._render([*before, turn], row, generation_prompt=False)
        silent = turn
        if not text.startswith(context):
            # The generation prompt contains more than the rendered turn: a thinking block, closed if thinking is off.
            # After a closed block comes the answer's own text, wherever it begins in the rendered turn.
            silent = {key: value for key, value in turn.items() if key != "reasoning_content"}
            if silent != turn:
                text = self._render([*before, silent], row, generation_prompt=False)
            probed = self._render([*before, {**silent, "content": _PROBE}], row, generation_prompt=False)
            header, probe, _ = probed.partition(_PROBE)
            if not probe or not text.startswith(header) or not context.startswith(header):
                what = "an assistant turn is not rendered as the generation prompt followed by the answer"
                raise ModelError.at("chat template", what, fix="use the template of an ERNIE 4.5 checkpoint")
            if _leaves_thinking_open(context[len(header) :]):
                what = "thinking is on, but an answer has no reasoning_content"
                raise RowFault(what, "give it reasoning_content, or set thinking: false for the row")
            context = header
        answer = text[len(context) :]
        closing = list(self.template.special.finditer(answer))
        if not closing:
            what = "no special token ends an assistant turn, so the model would never learn to stop"
            raise ModelError.at("chat template", what, fix="use a template that writes one")
        return answer[: closing[-1].end()], silent != turn

    def _plain_turns(self, prompt: str, completion: str) -> _Turns:
        """Tokenize a row of plain text, special tokens in it included, and append the end of sequence."""
        ids = self.tokenizer(prompt)["input_ids"]
        end = self.tokenizer.eos_token
        answer = self.template.tokenize_answer(completion if completion.endswith(end) else completion + end)
        if self.vision and self.vision.ids & {*ids, *answer}:
            raise RowFault("an image token in plain text", "write the row as messages, with its images")
        if not completion.strip():
            raise RowFault("an empty completion", "drop the row")
        return _Turns(ids + answer, [IGNORE_INDEX] * len(ids) + answer, [(len(ids) + len(answer), 0)])

    def _render(self, messages: list[Message], row: Row, *, generation_prompt: bool) -> str:
        if not messages:
            raise RowFault("an answer with no message before it", "give the row a question, or drop it")
        thinking = self.thinking if row.thinking is None else row.thinking
        return self.template.render(messages, row.tools, thinking=thinking, generation_prompt=generation_prompt)

    # -- images -------------------------------------------------------------------------------------------------

    def _image_tokens(self, images: list[dict[str, Any]]) -> list[int]:
        """Return the number of placeholders of each image."""
        if images and self.vision is None:
            raise RowFault("an image for a model without vision", "use a vl_moe model, or drop the row")
        counts = []
        for image in images:
            try:
                counts.append(self.vision.tokens(self.vision.grid(*media.image_size(image))))
            except ValueError as error:
                if isinstance(error, RowFault):
                    raise
                what, fix = f"{image['path'] or 'an image'}: {error}", "crop the image, or drop the row"
                raise RowFault(what, fix, kind="an aspect ratio over the limit") from None
        return counts

    def _expand_images(self, ids: list[int], labels: list[int], images: list[dict], tokens: list[int]) -> Example:
        """Repeat the placeholder of each image as often as its grid needs."""
        if self.vision is None:
            return Example(ids, labels)
        placeholder = self.vision.placeholder
        number = ids.count(placeholder)
        if number != len(images):
            what = f"{len(images)} images, but the chat template wrote {number} placeholders"
            raise ModelError.at("chat template", what, fix="use the template of an ERNIE 4.5 VL checkpoint")
        if not images:
            return Example(ids, labels)
        example, start = Example([], [], list(images)), 0
        for repeat in tokens[:number]:
            place = ids.index(placeholder, start)
            example.input_ids += ids[start:place] + [placeholder] * repeat
            example.labels += labels[start:place] + [labels[place]] * repeat
            start = place + 1
        example.input_ids += ids[start:]
        example.labels += labels[start:]
        example.vision_tokens = sum(tokens[: len(images)]) + 2 * len(images)  # each between a start and an end token
        return example


def _leaves_thinking_open(text: str) -> bool:
    return text.count(_OPEN_THINKING) > text.count(_CLOSE_THINKING)


def make_renderer(tokenizer: TokenizersBackend, modality: Any, sizes: Any, *, thinking: bool = False) -> Renderer:
    """Return the renderer of a model. modality, sizes: its ModalityTokens and ImageSizes; None for a text model."""
    vision = None if modality is None else VisionSpec(modality.image, modality.ids, sizes.grid, sizes.tokens)
    return Renderer(tokenizer, vision, thinking=thinking)


def renderer_of(bundle: Any, *, thinking: bool = False) -> Renderer:
    """Return the renderer of a loaded model (models.load.Bundle)."""
    return make_renderer(bundle.tokenizer, bundle.modality, bundle.image_sizes, thinking=thinking)


class ChatTemplate:
    """A tokenizer's chat template: messages -> text -> token ids, with special tokens in user text kept as text."""

    def __init__(self, tokenizer: TokenizersBackend):
        self.tokenizer = tokenizer

    def mark_control_tokens(self, messages: list[Message]) -> list[Message]:
        """Return the messages for the template, with special tokens in the user's strings marked as text."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        unlabeled = [{key: value for key, value in message.items() if key != "label"} for message in messages]
        with _template_errors_as_faults():
            return mark_control_tokens(unlabeled, self._controls)

    def render(self, messages: list[Message], tools: Any, *, thinking: bool, generation_prompt: bool) -> str:
        """Render marked messages. Raises RowFault if the template refuses them."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        with _template_errors_as_faults():
            return self.tokenizer.apply_chat_template(
                messages,
                tools=mark_control_tokens(tools, self._controls),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                enable_thinking=thinking,
            )

    def tokenize(self, text: str, parts: dict[str, list[int]] | None = None) -> list[int]:
        """Return the ids of rendered text; marked special tokens become ordinary text.

        parts: a cache of ids per part of a text, which is extended: texts with a common beginning, such as the
        contexts of one conversation, are then tokenized only where they differ.
        """
        backend = self.tokenizer.backend_tokenizer
        # other calls of the tokenizer may leave these set
        is_default = backend.truncation is backend.padding is None
        is_default &= backend.encode_special_tokens == self.tokenizer.split_special_tokens
        start, end = self._markers
        if not is_default or start in text or end in text:
            return self.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
        # the same ids without the offsets and masks that are not used here: a third of the time
        if parts is None or self._boundaries is None:
            return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        ids: list[int] = []
        for begin, stop in pairwise([0, *(match.start() for match in self._boundaries.finditer(text)), len(text)]):
            part = text[begin:stop]
            if part not in parts:
                parts[part] = backend.encode_batch_fast([part], add_special_tokens=False)[0].ids
            ids += parts[part]
        return ids

    def tokenize_answer(self, text: str) -> list[int]:
        """Return the ids of a text that follows another: after a line break no tokenizer inserts a space of its own."""
        ids, newline = self.tokenize("\n" + text), self._newline_ids
        return ids[len(newline) :] if ids[: len(newline)] == newline else self.tokenize(text)

    @cached_property
    def special(self) -> re.Pattern:
        """Pattern of special tokens that are not part of marked user text."""
        start, end = self._markers
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = _any_of([token.content for token in added if token.special])
        return re.compile(f"(?<!{start})(?:{tokens.pattern})(?!{end})")

    @cached_property
    def _boundaries(self) -> re.Pattern | None:
        """Pattern before whose matches a text can be split without changing any id; None if there is none.

        A tokenizer first splits the added tokens out of a text, the leftmost and longest first, and tokenizes each
        piece between two of them separately. So a text can be split before each added token, unless one of them
        depends on the characters around it. Only the first piece is treated differently, and it stays the first.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        if self.tokenizer.split_special_tokens or any(t.lstrip or t.rstrip or t.single_word for t in added):
            return None
        return _any_of([token.content for token in added if not token.normalized])

    @cached_property
    def _controls(self) -> re.Pattern:
        """Pattern of tokens that only the template may write, as transformers' sanitize_control_tokens chooses them."""
        return _any_of(self.tokenizer._get_control_tokens(self.tokenizer.chat_template))

    @cached_property
    def _markers(self) -> tuple[str, str]:
        """Strings that transformers puts before and after a special token that is text."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        start, _, end = mark_control_tokens("\0", re.compile("\0")).partition("\0")
        return start, end

    @cached_property
    def _newline_ids(self) -> list[int]:
        return self.tokenize("\n")


@contextmanager
def _template_errors_as_faults() -> Iterator[None]:
    """Raise RowFault for any error of a checkpoint's template, which was not written for every possible row."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        what, kind = f"the chat template refuses it: {reason}", "the chat template refuses it"
        raise RowFault(what, "fix or drop the row", kind=kind) from None


def _any_of(tokens: tuple[str, ...] | list[str]) -> re.Pattern:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
