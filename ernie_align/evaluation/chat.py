"""An interactive conversation with a checkpoint: its history, attached images and the input loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ernie_align.data import media
from ernie_align.data.formats import canonicalize
from ernie_align.data.render import renderer_of
from ernie_align.data.row import RowFault
from ernie_align.errors import AlignError, DataError
from ernie_align.evaluation.generate import Sampling, generate_answer
from ernie_align.models.load import Bundle
from ernie_align.rewards.reward import parse_completion

COMMANDS = {
    "/image": "PATH  attach an image to the next message; repeat for several",
    "/thinking": "on or off  turn reasoning before the answer on or off",
    "/reset": "      clear the conversation",
    "/help": "       list the commands",
    "/quit": "       quit (also at the end of the input)",
}


class Chat:
    """A conversation: messages, the images in them, and pending images for the next message.

    system: the system prompt; thinking: enable_thinking of the chat template.
    """

    def __init__(self, bundle: Bundle, *, system: str | None = None, sampling: Sampling, thinking: bool = False):
        self.bundle = bundle
        self.sampling = sampling
        self.thinking = thinking
        self._system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Clear the conversation and the pending images; keep the system prompt."""
        self.messages: list[dict[str, Any]] = list(self._system)
        self.images: list[str] = []
        self.pending: list[str] = []

    def attach(self, path: str | Path) -> None:
        """Attach an image to the next message.

        Raises DataError if the file is not a readable image, or if the model has no vision.
        """
        if self.bundle.modality is None:
            fix = "use a vl_moe model, or drop the image"
            raise DataError.at(str(path), "this model has no vision and cannot use an image", fix=fix)
        try:
            media.image_size(media.image_reference(str(path), None))
        except RowFault as fault:
            raise DataError.at(str(path), fault.what, fix="name an image file") from None
        self.pending.append(str(path))

    def ask(self, text: str, *, write: Callable[[str], None] | None = None) -> str:
        """Send a message and return the answer; both join the history, the answer with separate reasoning.

        write: called with each piece of the answer as it is generated. Raises DataError if the message cannot be
        rendered; the history is then unchanged.
        """
        parts = [*({"type": "image"} for _ in self.pending), {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": parts}]
        images = [*self.images, *self.pending]
        try:
            row = canonicalize({"messages": messages, "images": images}, "messages")
            answer = generate_answer(self.bundle, row, sampling=self.sampling, thinking=self.thinking, write=write)
            opened = renderer_of(self.bundle, thinking=self.thinking).opens_thinking(row)
        except RowFault as fault:
            raise DataError.at("this message", fault.what, fix=fault.fix) from None
        reply = parse_completion(answer, opened=opened)
        reply["content"] = reply["content"] or "..."  # reasoning used up all tokens: the turn still needs content
        self.messages, self.images, self.pending = [*messages, reply], images, []
        return answer

    def loop(self, lines: TextIO | None = None, out: TextIO | None = None) -> None:
        """Read messages and commands until /quit or the end of input, and stream answers.

        An error is printed and does not end the conversation.
        """
        out = out or sys.stdout

        def write(text: str, end: str = "") -> None:
            print(text, end=end, file=out, flush=True)

        while (line := _read_line(lines)) is not None:
            line = line.strip()
            if line == "/quit":
                return
            if not line:
                continue
            try:
                if line.startswith("/"):
                    write(self._command(*line.split(maxsplit=1)), "\n")
                else:
                    self.ask(line, write=write)
                    write("", "\n")
            except AlignError as error:
                write(str(error), "\n")

    def _command(self, name: str, argument: str = "") -> str:
        argument = argument.strip().strip("'\"")
        if name == "/image" and argument:
            self.attach(Path(argument).expanduser())
            return f"images attached to the next message: {len(self.pending)}"
        if name == "/thinking" and argument in ("on", "off"):
            self.thinking = argument == "on"
            return f"thinking is {argument}"
        if name == "/reset":
            self.reset()
            return "conversation cleared"
        known = "\n".join(f"  {command} {description}" for command, description in COMMANDS.items())
        return known if name == "/help" else f"unknown command: {' '.join((name, argument)).strip()}\n{known}"


def _read_line(lines: TextIO | None) -> str | None:
    """Return the next line, or None at the end. On a terminal, `input` supports line editing through readline."""
    if lines is None and sys.stdin.isatty():
        import readline  # noqa: F401

        try:
            return input("> ")
        except (EOFError, KeyboardInterrupt):
            return None
    return next(iter((lines or sys.stdin).readline, ""), None)
