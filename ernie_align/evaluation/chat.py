"""A conversation with a checkpoint: its history, images that wait for the next message, and the loop around both."""

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
from ernie_align.evaluation.generate import Sampling, answer
from ernie_align.models.load import Bundle
from ernie_align.rewards.completion import parse_completion

COMMANDS = {
    "/image": "PATH  shown with the next message; may be given several times",
    "/thinking": "on or off  whether the model reasons before it answers",
    "/reset": "      forget everything that was said",
    "/help": "       these lines",
    "/quit": "       leave; so does the end of the input",
}


class Chat:
    """What was said so far. system: the system prompt; thinking: enable_thinking of the template."""

    def __init__(self, bundle: Bundle, *, system: str | None = None, sampling: Sampling, thinking: bool = False):
        self.bundle = bundle
        self.sampling = sampling
        self.thinking = thinking
        self._system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said, and the images that wait."""
        self.messages: list[dict[str, Any]] = list(self._system)
        self.images: list[str] = []
        self.waiting: list[str] = []

    def attach(self, path: str | Path) -> None:
        """Show an image with the next message. Raises DataError where there is none, or the model has no vision."""
        if self.bundle.modality is None:
            fix = "use a vl_moe model, or drop the image"
            raise DataError.at(str(path), "an image for a model without vision", fix=fix)
        try:
            media.image_size(media.image_reference(str(path), None))
        except RowFault as fault:
            raise DataError.at(str(path), fault.what, fix="name an image file") from None
        self.waiting.append(str(path))

    def ask(self, text: str, *, write: Callable[[str], None] | None = None) -> str:
        """The model's answer to everything said so far and this; both are then history, the reasoning apart.

        write: is given the answer piece by piece. Raises DataError for what cannot be asked; nothing is then kept.
        """
        parts = [*({"type": "image"} for _ in self.waiting), {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": parts}]
        images = [*self.images, *self.waiting]
        try:
            row = canonicalize({"messages": messages, "images": images}, "messages")
            said = answer(self.bundle, row, sampling=self.sampling, thinking=self.thinking, write=write)
            opened = renderer_of(self.bundle, thinking=self.thinking).opens_thinking(row)
        except RowFault as fault:
            raise DataError.at("this message", fault.what, fix=fault.fix) from None
        reply = parse_completion(said, opened=opened)
        reply["content"] = reply["content"] or "..."  # an answer that was not reached still was a turn
        self.messages, self.images, self.waiting = [*messages, reply], images, []
        return said

    def loop(self, lines: TextIO | None = None, out: TextIO | None = None) -> None:
        """Read messages and commands until /quit or the end. Answers stream; an error is told, and the talk goes on."""
        out = out or sys.stdout

        def log(text: str, end: str = "\n") -> None:
            print(text, end=end, file=out, flush=True)

        while (line := _read(lines)) is not None:
            line = line.strip()
            if line == "/quit":
                return
            if not line:
                continue
            try:
                if line.startswith("/"):
                    log(self._command(*line.split(maxsplit=1)))
                else:
                    self.ask(line, write=lambda text: log(text, end=""))
                    log("")
            except AlignError as error:
                log(str(error))

    def _command(self, name: str, argument: str = "") -> str:
        argument = argument.strip().strip("'\"")
        if name == "/image" and argument:
            self.attach(Path(argument).expanduser())
            return f"{len(self.waiting)} waiting for the next message"
        if name == "/thinking" and argument in ("on", "off"):
            self.thinking = argument == "on"
            return f"thinking is {argument}"
        if name == "/reset":
            self.reset()
            return "forgotten"
        known = "\n".join(f"  {command} {what}" for command, what in COMMANDS.items())
        return known if name == "/help" else f"{' '.join((name, argument)).strip()}: not understood\n{known}"


def _read(lines: TextIO | None) -> str | None:
    """The next line, or None at the end. On a terminal `input` edits it, with readline if that is loaded."""
    if lines is None and sys.stdin.isatty():
        import readline  # noqa: F401

        try:
            return input("> ")
        except (EOFError, KeyboardInterrupt):
            return None
    return next(iter((lines or sys.stdin).readline, ""), None)
