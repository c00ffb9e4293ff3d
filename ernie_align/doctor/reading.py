"""One row after another into findings, by the very code that prepares them for training."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from functools import partial
from typing import Any

from ernie_align.data import media
from ernie_align.data.load import Encoder
from ernie_align.data.row import Message, Row, RowDropped, RowFault
from ernie_align.data.sources import Source
from ernie_align.doctor.findings import Findings
from ernie_align.doctor.scripts import letters_by_script
from ernie_align.errors import AlignError


class Reader:
    """Reads rows of one source. A row beyond max_length is measured whole, then judged as training would."""

    def __init__(self, source: Source, encode: Encoder):
        self.source = source
        self.encode = encode
        self.encode_whole = copy.copy(encode)
        self.encode_whole.max_length = sys.maxsize

    def rows(self, start: int, stop: int, into: Findings) -> Findings:
        """Rows start to stop - 1."""
        columns = self.source.rows[start:stop]
        for place in range(stop - start):
            self._row(start + place, {name: column[place] for name, column in columns.items()}, into)
        return into

    def _row(self, number: int, raw: dict[str, Any], into: Findings) -> None:
        name = partial(self.source.row_name, number, raw)
        prompt = whole = 0
        try:
            row = self.source.row(self.source.read(raw))
            prompt, whole = _hashes(row)
            _describe(row, into)
            examples = self.encode_whole(row)
            shown = [media.load(image).size for image in row.images]
            longest = max(map(_tokens, examples))
            into.long(longest, sum(example["length"] for example in examples))
            self._images(shown, into)
            if longest > self.encode.max_length:
                examples = self.encode(row)
            into.count.keep(examples)
        except RowDropped as dropped:
            into.count.drop(dropped.reason, name)
        except RowFault as fault:
            into.fault(fault.kind, name, fault.what, fault.fix)
        except AlignError as error:  # a chat template that cannot render it
            fault = error.faults[0]
            into.fault(f"{fault.where}: {fault.what}", name, f"{fault.where}: {fault.what}", fault.fix)
        into.prompts.append(prompt)
        into.rows.append(whole)

    def _images(self, sizes: list[tuple[int, int]], into: Findings) -> None:
        into.images_in_row.add(len(sizes))
        vision = self.encode.renderer.vision
        for width, height in sizes:
            into.widths.add(width)
            into.heights.add(height)
            into.aspects.add(round(100 * max(width, height) / min(width, height)))
            into.image_tokens.add(vision.tokens(vision.grid(height, width)))


def _tokens(example: dict[str, Any]) -> int:
    """What max_length is held against: of a pair, the prompt with the longer answer."""
    if "input_ids" in example:
        return len(example["input_ids"])
    return len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))


def _describe(row: Row, into: Findings) -> None:
    """Scripts and thinking, of every row that has a canonical form."""
    said = [*row.messages, *(message for ending in row.endings for message in ending.messages)]
    texts = [*(row.plain or ()), *(ending.text for ending in row.endings if ending.text)]
    replies = [message for message in said if message["role"] == "assistant"]
    into.answered += bool(replies) or bool(row.plain and (row.plain[1].strip() or row.endings))
    reasons = any(str(message.get("reasoning_content") or "").strip() for message in replies)
    into.thinking += reasons or any("<think>" in text and text.split("<think>")[1].strip() for text in texts[1:])
    letters = letters_by_script("\n".join([*texts, *map(_text, said)]))
    for script, number in letters.items():
        into.letters[script] = into.letters.get(script, 0) + number
    main = max(letters, key=letters.__getitem__, default="none")
    into.written[main] = into.written.get(main, 0) + 1


def _text(message: Message) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return f"{message.get('reasoning_content') or ''}\n{text}"


def _hashes(row: Row) -> tuple[int, int]:
    """Of the prompt with its images, and of the whole row; never 0, which stands for a row without one."""
    images = [image["path"] or hashlib.blake2b(image["bytes"], digest_size=16).hexdigest() for image in row.images]
    ends_in_answer = not row.endings and row.messages and row.messages[-1]["role"] == "assistant"
    asked = row.plain[0] if row.plain else row.messages[:-1] if ends_in_answer else row.messages
    answers = [*(row.plain or ())[1:], *(row.messages[-1:] if ends_in_answer else ())]
    answers += [[ending.rank, ending.text, ending.messages] for ending in row.endings]
    prompt = [asked, images, row.tools]
    return _hash(prompt), _hash([prompt, answers])


def _hash(values: Any) -> int:
    data = json.dumps(values, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") or 1
