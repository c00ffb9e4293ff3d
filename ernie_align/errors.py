"""The errors a user can meet: each says where, what, and the next move."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ernie_align.redact import redacted

# What a row or a path may hold and a terminal must not be handed: controls, and halves of characters.
_CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


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
        text = redacted("\n".join([head, *(f"    {line}" for line in (self.why, self.fix) if line)]))
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
