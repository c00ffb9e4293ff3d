"""The errors a user can meet: each says where, what, and the next move."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

# What a row or a path may hold and a terminal must not be handed: controls, and halves of characters.
_CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")
_MAX_CHOICES = 16  # a longer list of valid names does not help the reader of an error


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    where: `file:line:column  key`, `file:line`, a row, a folder; what: what is wrong there;
    why: the reason, where it is not obvious; fix: the next move. Told without secrets: other libraries' words may hold
    an address or a header.
    """

    where: str
    what: str
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        text = redact("\n".join([head, *(f"    {line}" for line in (self.why, self.fix) if line)]))
        return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


class AlignError(Exception):
    """Base of every error this toolkit raises on purpose. Carries one or more faults, all found together."""

    def __init__(self, *faults: Fault):
        if not faults:
            raise AssertionError("an AlignError carries at least one fault")
        self.faults = faults
        super().__init__("\n".join(map(str, faults)))

    def __reduce__(self):  # exceptions cross process borders in data workers, and are rebuilt there from args
        return type(self), self.faults

    @classmethod
    def at(cls, where: str, what: str, *, why: str = "", fix: str = "") -> AlignError:
        """The common case: an error of exactly one fault."""
        return cls(Fault(where, what, why, fix))


class RecipeError(AlignError):
    """The recipe, or an override of it, is wrong."""


class DataError(AlignError):
    """A source, a row or an image is wrong."""


class ModelError(AlignError):
    """The checkpoint, the adapter or the scope does not fit."""


class RunError(AlignError):
    """The run cannot start, go on or be resumed."""


class Interrupted(RunError):
    """The run was asked to stop, and has: --resume goes on with it."""


class ExportError(AlignError):
    """The export cannot be written, or says something else than what it was made from."""


HIDDEN = "***"

# shape -> what it is called. The group `secret` is what is hidden.
_SHAPES = {
    "a password in an address": re.compile(r"\w://[^\s/@:'\"]*:(?P<secret>[^\s/@'\"]+)@"),
    "a token in an address": re.compile(
        r"[?&](?:[\w-]*token|[\w-]*key|key[\w-]*id|password|passwd|pwd|secret|auth|sig|[\w-]*signature|[\w-]*credential)"
        r"=(?P<secret>[^&\s'\"]{4,})",
        re.IGNORECASE,
    ),
    "an authorization header": re.compile(r"\b(?:Bearer|Basic)\s+(?P<secret>[\w.+/=~-]{16,})"),
    "an API token": re.compile(
        r"(?P<secret>\bhf_[A-Za-z0-9]{16,}|\bsk-[\w-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
        r"|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bxox[abprs]-[\w-]{10,}|\bbce-v3/[\w-]+/\w{16,})"
    ),
}
_KEYS = re.compile(r"(?i)(.*_)?(token|api_?key|access_?key|secret(_?key)?|password|passwd|credentials?|authorization)")
# of a tokenizer, which has tokens of another kind
_OTHER_TOKENS = re.compile(r"(?i)(pad|eos|bos|unk|sep|cls|mask|image|video|audio|stop|start|end|special)_token")
_SHORTEST = 8  # characters of an environment variable that are hidden wherever they stand: shorter ones are words


def did_you_mean(word: str, choices: Iterable[str], *, otherwise: str = "") -> str:
    """Return the next move after an unknown name: the closest valid name, or all of them.

    otherwise: returned instead of a list of more than 16 names.
    """
    choices = [choice for choice in choices if choice]
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    if otherwise and len(choices) > _MAX_CHOICES:
        return otherwise
    return f"choose from {', '.join(choices)}" if choices else otherwise


def find_secret(text: str) -> str | None:
    """What a text holds that nobody else should read, or None."""
    return next((name for name, shape in _SHAPES.items() if shape.search(text)), None)


def is_secret_key(key: str) -> bool:
    """Whether a key of that name holds a secret. A variable's name (`api_key_env`) is none."""
    return bool(_KEYS.fullmatch(key)) and not _OTHER_TOKENS.fullmatch(key)


def redact(text: str) -> str:
    """The text with secrets hidden: those of the environment, and whatever looks like one."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret_key(name):
            text = text.replace(value, HIDDEN)
    for shape in _SHAPES.values():
        text = shape.sub(_hide, text)
    return text


def _hide(found: re.Match[str]) -> str:
    start, end = (place - found.start() for place in found.span("secret"))
    return found[0][:start] + HIDDEN + found[0][end:]
