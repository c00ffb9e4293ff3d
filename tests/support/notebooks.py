"""Stored walkthroughs and their outputs."""

from __future__ import annotations

import re


def unexpected_stderr(outputs):
    """Return the lines on stderr, except the warnings of reward hacking that 401 provokes."""
    text = "".join("".join(output["text"]) for output in outputs if output.get("name") == "stderr")
    return [line for line in text.splitlines() if not re.match(r"step \d+: (completions have|KL) ", line)]
