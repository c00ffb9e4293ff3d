"""What is a secret, by its shape, its key or its environment variable; and text without any."""

from __future__ import annotations

import os
import re

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


def secret_in(text: str) -> str | None:
    """What a text holds that nobody else should read, or None."""
    return next((name for name, shape in _SHAPES.items() if shape.search(text)), None)


def is_secret_key(key: str) -> bool:
    """Whether a key of that name holds a secret. A variable's name (`api_key_env`) is none."""
    return bool(_KEYS.fullmatch(key)) and not _OTHER_TOKENS.fullmatch(key)


def redacted(text: str) -> str:
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
