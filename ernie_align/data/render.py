"""A canonical row -> token ids, with the labels decided beside the text that is rendered.

One rule holds it together: what stands before a trained answer is, id for id, what `generate` is given for that turn.
So each answer is rendered behind its own generation prompt and tokenized on its own, as the model will write it.
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
_PROBE = "\ue0a0answer\ue0a0"  # stands for an answer where only the place of its text is asked for
_OPEN_THINKING, _CLOSE_THINKING = "<think>", "</think>"


@dataclass(frozen=True)
class VisionSpec:
    """What rendering has to know of images. placeholder: the id that is repeated; ids: every modality token.

    grid: (height, width) in pixels -> patches (1, rows, columns); tokens: such a grid -> placeholders it takes.
    """

    placeholder: int
    ids: frozenset[int]
    grid: Callable[[int, int], tuple[int, int, int]]
    tokens: Callable[[tuple[int, int, int]], int]


@dataclass
class Example:
    """Token ids with labels.

    media: references to its images, in order (not `images`: TRL takes every data set with a column of that name for
    one that it has to process itself); vision_tokens: those the images ask for, start and end included, by their sizes;
    reasoning_left_out: answers whose reasoning is not trained, because thinking is off; cut: shortened to max_length.
    """

    input_ids: list[int]
    labels: list[int]
    media: list[dict[str, Any]] = field(default_factory=list)
    vision_tokens: int = 0
    reasoning_left_out: int = 0
    cut: bool = False


@dataclass
class _Turns:
    """Turns that share one sequence: ids with one placeholder per image, and where each answer ends."""

    ids: list[int]
    labels: list[int]
    ends: list[tuple[int, int]]  # (length, images so far) after each answer
    reasoning_left_out: int = 0


class Renderer:
    """Renders rows with a checkpoint's tokenizer and its own chat template.

    thinking: the template's enable_thinking, unless a row says otherwise; vision: None for a text model.
    """

    def __init__(self, tokenizer: TokenizersBackend, vision: VisionSpec | None = None, *, thinking: bool = False):
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.vision = vision
        self.thinking = thinking

    def examples(self, row: Row, *, max_length: int, cut: bool = False) -> list[Example]:
        """The row's training examples: one, or one per answer where the template renders history in another way.

        Raises RowFault for a row with nothing to train or broken images, and RowDropped for one that is longer than
        max_length tokens. With `cut` a long row ends after the last answer that fits.
        """
        if row.plain is not None:
            sequences = [self._plain(*row.plain)]
        else:
            if not row.trained_turns:
                raise RowFault("nothing to train: no assistant turn with label 1", "give it an answer, or drop it")
            sequences = self._conversation(row)
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
                example = self._expand(sequence.ids[:length], sequence.labels[:length], row.images[:images], tokens)
                example.reasoning_left_out = sequence.reasoning_left_out
                example.cut = len(fitting) < len(sequence.ends)
                result.append(example)
        if not result:
            raise RowDropped(f"over data.max_length {max_length}")
        return result

    def prompt(self, row: Row) -> Example:
        """What `generate` is given: everything before the last answer (or everything), and the generation prompt."""
        if row.plain is not None:
            ids = self.tokenizer(row.plain[0])["input_ids"]
            return Example(ids, [IGNORE_INDEX] * len(ids))
        messages = row.messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids = self.template.ids(self._text(self.template.marked(messages), row, generation_prompt=True))
        images = row.images[: count_images(messages)]
        return self._expand(ids, [IGNORE_INDEX] * len(ids), images, self._image_tokens(images))

    def opens_thinking(self, row: Row) -> bool:
        """Whether the generation prompt of the row begins the model's reasoning, so that an answer starts within it."""
        if row.plain is not None:
            return False
        messages = self.template.marked(row.messages)
        prompt = self._text(messages, row, generation_prompt=True)
        added = prompt.removeprefix(self._text(messages, row, generation_prompt=False))
        return added.count(_OPEN_THINKING) > added.count(_CLOSE_THINKING)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the end of sequence, and whatever the template closes a turn with."""
        asked: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        text = self._text(asked, Row(), generation_prompt=False)
        tail = text[text.index(_PROBE) + len(_PROBE) :]
        ending = [self.tokenizer.convert_tokens_to_ids(token) for token in self.template.special.findall(tail)]
        return list(dict.fromkeys([*ending, self.tokenizer.eos_token_id]))

    # -- one conversation ---------------------------------------------------------------------------------------

    def _conversation(self, row: Row) -> list[_Turns]:
        sequences: list[_Turns] = []
        messages: list[Message] = []  # marked once, whatever number of turns they stand before
        parts: dict[str, list[int]] = {}  # tokenized once, whatever number of contexts they stand in
        for number in row.trained_turns:
            messages += self.template.marked(row.messages[len(messages) : number + 1])
            before, turn = messages[:number], messages[number]
            context = self._text(before, row, generation_prompt=True)
            answer, reasoning_left_out = self._answer(context, before, turn, row)
            context_ids, answer_ids = self.template.ids(context, parts), self.template.ids_after_text(answer)
            known = sequences[-1].ids if sequences else None
            if known is None or context_ids[: len(known)] != known:
                sequences.append(_Turns([], [], []))
                known = []
            sequence = sequences[-1]
            sequence.labels += [IGNORE_INDEX] * (len(context_ids) - len(known)) + answer_ids
            sequence.ids = context_ids + answer_ids
            sequence.ends.append((len(sequence.ids), count_images(before)))
            sequence.reasoning_left_out += reasoning_left_out
        return sequences

    def _answer(self, context: str, before: list[Message], turn: Message, row: Row) -> tuple[str, bool]:
        """What the model has to write after `context`: the template's rendering of the turn, to its end token.

        And whether the turn has reasoning that this leaves out.
        """
        whole = self._text([*before, turn], row, generation_prompt=False)
        silent = turn
        if not whole.startswith(context):
            # The generation prompt holds more than the rendered turn does: a thinking block, closed when thinking is
            # off. Behind a closed one comes the answer's own text, wherever in the rendering it begins.
            silent = {key: value for key, value in turn.items() if key != "reasoning_content"}
            if silent != turn:
                whole = self._text([*before, silent], row, generation_prompt=False)
            probed = self._text([*before, {**silent, "content": _PROBE}], row, generation_prompt=False)
            header, found, _ = probed.partition(_PROBE)
            if not found or not whole.startswith(header) or not context.startswith(header):
                raise ModelError.at("chat template", "an answer is not rendered behind its generation prompt")
            prefix = context[len(header) :]
            if prefix.count(_OPEN_THINKING) > prefix.count(_CLOSE_THINKING):
                what = "thinking is on, but an answer has no reasoning_content"
                raise RowFault(what, "give it reasoning_content, or set thinking: false for the row")
            context = header
        answer = whole[len(context) :]
        responses = list(self.template.special.finditer(answer))
        if not responses:
            what = "no special token ends an assistant turn: the model would never learn to stop"
            raise ModelError.at("chat template", what, fix="use a template that writes one")
        return answer[: responses[-1].end()], silent != turn

    def _plain(self, prompt: str, completion: str) -> _Turns:
        """A row without turns: the text as it is, special tokens in it included, closed by the end of sequence."""
        ids = self.tokenizer(prompt)["input_ids"]
        end = self.tokenizer.eos_token
        answer = self.template.ids_after_text(completion if completion.endswith(end) else completion + end)
        if self.vision and self.vision.ids & {*ids, *answer}:
            raise RowFault("an image token in plain text", "write the row as messages, with its images")
        if not completion.strip():
            raise RowFault("an empty completion", "drop the row")
        return _Turns(ids + answer, [IGNORE_INDEX] * len(ids) + answer, [(len(ids) + len(answer), 0)])

    def _text(self, messages: list[Message], row: Row, *, generation_prompt: bool) -> str:
        """The template's text of marked messages."""
        if not messages:
            raise RowFault("an answer that nothing stands before", "give the row a question, or drop it")
        thinking = self.thinking if row.thinking is None else row.thinking
        return self.template.text(messages, row.tools, thinking=thinking, generation_prompt=generation_prompt)

    # -- images -------------------------------------------------------------------------------------------------

    def _image_tokens(self, images: list[dict[str, Any]]) -> list[int]:
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

    def _expand(self, ids: list[int], labels: list[int], images: list[dict], tokens: list[int]) -> Example:
        """One placeholder per image -> as many as its grid takes."""
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


class ChatTemplate:
    """The template of a tokenizer, and the ids of what it writes."""

    def __init__(self, tokenizer: TokenizersBackend):
        self.tokenizer = tokenizer

    def marked(self, messages: list[Message]) -> list[Message]:
        """Messages as the template is given them: special tokens that stand in the user's strings marked as text."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        known = [{key: value for key, value in message.items() if key != "label"} for message in messages]
        with _refused_by_template():
            return mark_control_tokens(known, self._controls)

    def text(self, messages: list[Message], tools: Any, *, thinking: bool, generation_prompt: bool) -> str:
        """The template's text of marked messages. Raises RowFault where the template refuses them."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        with _refused_by_template():
            return self.tokenizer.apply_chat_template(
                messages,
                tools=mark_control_tokens(tools, self._controls),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                enable_thinking=thinking,
            )

    def ids(self, text: str, parts: dict[str, list[int]] | None = None) -> list[int]:
        """Ids of rendered text, what is marked in it as text.

        parts: ids of parts that are known, to which those of this text are added: texts that begin alike, as the
        contexts of one conversation do, are then tokenized where they differ.
        """
        backend = self.tokenizer.backend_tokenizer
        # Other calls of the tokenizer leave these set.
        plain = backend.truncation is backend.padding is None
        plain &= backend.encode_special_tokens == self.tokenizer.split_special_tokens
        start, end = self._markers
        if not plain or start in text or end in text:
            return self.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
        # The same ids without what this takes no notice of: offsets, masks. A third of the time.
        if parts is None or self._cuts is None:
            return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        found: list[int] = []
        for begin, stop in pairwise([0, *(match.start() for match in self._cuts.finditer(text)), len(text)]):
            part = text[begin:stop]
            if part not in parts:
                parts[part] = backend.encode_batch_fast([part], add_special_tokens=False)[0].ids
            found += parts[part]
        return found

    def ids_after_text(self, text: str) -> list[int]:
        """Ids of a text that stands behind another: after a line break, where no tokenizer adds a space of its own."""
        behind, newline = self.ids("\n" + text), self._newline_ids
        return behind[len(newline) :] if behind[: len(newline)] == newline else self.ids(text)

    @cached_property
    def special(self) -> re.Pattern:
        """Special tokens that are not part of marked user text."""
        start, end = self._markers
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = _any_of([token.content for token in added if token.special])
        return re.compile(f"(?<!{start})(?:{tokens.pattern})(?!{end})")

    @cached_property
    def _cuts(self) -> re.Pattern | None:
        """Where a text may be cut so that each part has the ids that it has in the whole; None where nowhere is known.

        Before anything else a tokenizer takes the added tokens out of a text, the leftmost and longest first, and goes
        on with each stretch between two of them for itself. So a text may be cut before each of them, unless one heeds
        what stands around it. Only the first stretch is not like the others, and it stays the first.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        if self.tokenizer.split_special_tokens or any(t.lstrip or t.rstrip or t.single_word for t in added):
            return None
        return _any_of([token.content for token in added if not token.normalized])

    @cached_property
    def _controls(self) -> re.Pattern:
        """Tokens that only the template may write; the same choice as transformers' sanitize_control_tokens."""
        return _any_of(self.tokenizer._get_control_tokens(self.tokenizer.chat_template))

    @cached_property
    def _markers(self) -> tuple[str, str]:
        """What stands before and behind a special token that is text."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        start, _, end = mark_control_tokens("\0", re.compile("\0")).partition("\0")
        return start, end

    @cached_property
    def _newline_ids(self) -> list[int]:
        return self.ids("\n")


@contextmanager
def _refused_by_template() -> Iterator[None]:
    """Whatever comes up within is a fault of the row: a checkpoint's template, on a row it was not written for."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        what, kind = f"the chat template refuses it: {reason}", "the chat template refuses it"
        raise RowFault(what, "mend or drop the row", kind=kind) from None


def _any_of(tokens: tuple[str, ...] | list[str]) -> re.Pattern:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
