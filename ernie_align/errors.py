"""The errors a user can meet, each with its place, its cause and the next move; secrets are hidden in all of them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

# Characters that a row or a path may contain and a terminal must not be sent: controls and unpaired surrogates.
_CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")

HIDDEN = "***"
# name of a kind of secret -> its pattern. The group `secret` is the part to hide.
_SECRETS = {
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
_SECRET_KEYS = re.compile(
    r"(?i)(.*_)?(token|api_?key|access_?key|secret(_?key)?|password|passwd|credentials?|authorization)"
)
_TOKENIZER_KEYS = re.compile(r"(?i)(pad|eos|bos|unk|sep|cls|mask|image|video|audio|stop|start|end|special)_token")
_MIN_SECRET_LENGTH = 8  # shorter values of environment variables are ordinary words, which are not hidden
_MAX_CHOICES = 16  # a longer list of valid names does not help the reader of an error


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    where: `file:line:column  key`, `file:line`, a row or a folder; what: what is wrong there; why: the reason, if it
    is not obvious; fix: the next move. `str()` hides secrets: messages of other libraries may quote an address or a
    header.
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
    """Base of all errors that this toolkit raises on purpose. Carries one or more faults, all found together."""

    def __init__(self, *faults: Fault):
        if not faults:
            raise AssertionError("an AlignError carries at least one fault")
        self.faults = faults
        super().__init__("\n".join(map(str, faults)))

    def __reduce__(self):  # data workers pickle exceptions, which are rebuilt from these arguments
        return type(self), self.faults

    @classmethod
    def at(cls, where: str, what: str, *, why: str = "", fix: str = "") -> AlignError:
        """Make an error with exactly one fault."""
        return cls(Fault(where, what, why, fix))


class RecipeError(AlignError):
    """The recipe, or an override of it, is wrong."""


class DataError(AlignError):
    """A source, a row or an image is wrong."""


class ModelError(AlignError):
    """The checkpoint, the adapter or the scope does not fit."""


class RunError(AlignError):
    """The run cannot start, continue or be resumed."""


class Interrupted(RunError):
    """The run was asked to stop and has stopped; --resume continues it."""


class ExportError(AlignError):
    """The export cannot be written, or its outputs differ from those of its source."""


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


def find_secrets(entries: Iterable[tuple[str, str]]) -> list[str | None]:
    """Return for each (key, text) the kind of secret that the text contains or that the key names, or None."""
    return [
        next((name for name, pattern in _SECRETS.items() if pattern.search(text)), None)
        or ("a secret, by the name of its key" if text and is_secret_key(key) else None)
        for key, text in entries
    ]


def is_secret_key(key: str) -> bool:
    """Return True if values under this key are secrets. `api_key_env` is not one: it holds a variable's name."""
    return bool(_SECRET_KEYS.fullmatch(key)) and not _TOKENIZER_KEYS.fullmatch(key)


def redact(text: str) -> str:
    """Return the text with secrets hidden: those of environment variables, and whatever matches a known pattern."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_SECRET_LENGTH and is_secret_key(name):
            text = text.replace(value, HIDDEN)
    for pattern in _SECRETS.values():
        text = pattern.sub(_hide, text)
    return text


def _hide(match: re.Match[str]) -> str:
    start, end = (position - match.start() for position in match.span("secret"))
    return match[0][:start] + HIDDEN + match[0][end:]
