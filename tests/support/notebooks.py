"""Stored walkthroughs and their outputs."""

from __future__ import annotations

import re


def stumbles(outputs):
    """What stands on stderr, but for the warnings of a run about itself: 401 hacks a reward on purpose."""
    text = "".join("".join(output["text"]) for output in outputs if output.get("name") == "stderr")
    return [line for line in text.splitlines() if not re.match(r"step \d+: (completions of|KL) ", line)]
