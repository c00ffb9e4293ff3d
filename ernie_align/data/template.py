"""A checkpoint's chat template and tokenizer: messages -> text -> token ids, in which what a user wrote is text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ernie_align.data.row import Message, RowFault

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend


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
