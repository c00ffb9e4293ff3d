"""The process that compares: lines of JSON `[answer, expected, seconds]` in, one line with the verdict out for each."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from types import FrameType

_MEMORY = 4 << 30  # bytes: a power tower asks for all there is


class _TooLong(BaseException):
    """No Exception: math-verify swallows those."""


def equal(answer: str, expected: str) -> float | None:
    """1 if some reading of the answer equals the expected one, else 0; None if the latter cannot be read."""
    from math_verify import parse, verify

    def read(text: str) -> list:
        return parse(text, parsing_timeout=None)

    gold = read(f"${expected.strip().strip('$')}$") or read(expected)
    if not gold:
        return None
    # math-verify finds LaTeX only between dollars or in \boxed{}: a bare \frac{1}{2} gets its dollars here
    readings = [answer] if "$" in answer or "\\boxed" in answer else [answer, f"${answer}$"]
    return float(any(verify(gold, read(reading), timeout_seconds=None) for reading in readings))


def judged(answer: str, expected: str, seconds: float) -> dict:
    """The verdict on one line of input."""
    _set_timer(seconds)
    try:
        return {"score": equal(answer, expected)}
    except _TooLong:
        return {"timeout": True}
    except Exception:  # nonsense finds bugs in any parser, and is no right answer
        return {"score": 0.0}
    finally:
        _set_timer(0)


def _set_timer(seconds: float) -> None:
    """Of computing time, so that a verdict does not hang on what else the machine has to do. 0 ends it."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Answer until the input ends, which it does with the process that asks."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may get among the replies
    logging.disable(logging.CRITICAL)
    _limit()
    equal("$x^2 - 1$", "(x - 1)(x + 1)")  # what sympy loads on first use is not on the first question's time
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(judged(*json.loads(line))), file=replies, flush=True)


def _limit() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, stop)
    try:
        import resource
    except ImportError:  # Windows has neither; there only the asking process ends what takes too long
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if hard < 0 else min(_MEMORY, hard), hard))


if __name__ == "__main__":
    main()
