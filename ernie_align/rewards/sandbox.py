"""Run verifiers that may never finish, math-verify and users' patterns and schemas, in a process with limits."""

from __future__ import annotations

import json
import logging
import multiprocessing.context
import os
import re
import signal
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from ernie_align.errors import RunError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator
    from pebble import ProcessPool

_GRACE = 4.0  # wall-clock limit as a multiple of the limit on computing time
_MEMORY = 4 << 30  # bytes; a power tower allocates all it can get
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)


class _OutOfTime(BaseException):
    """Not an Exception, because math-verify swallows those."""


class _Process(multiprocessing.context.SpawnProcess):
    def start(self) -> None:
        """Start without importing the parent's `__main__`: a training script without a guard would run again."""
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _SpawnContext(multiprocessing.context.SpawnContext):
    """Start processes by spawn, because a fork of a process with torch's threads can deadlock."""

    Process = _Process


class Sandbox:
    """Score answers with `verify` in one separate process; any thread may call `score`.

    A model's answer may be `10^10^10`, or make a pattern backtrack forever: endless work, partly in C code that no
    thread can interrupt. The process starts with the first call. A timer on its computing time interrupts a call after
    `seconds`, so that scores do not depend on the load of the machine; a call that ignores the timer is killed after
    four times as long by the clock, and the next call starts a new process.

    verify: a function at the top level of a module; warm_up: arguments for a first, untimed call.
    """

    def __init__(self, verify: Callable[..., float | None], *, seconds: float, warm_up: tuple[Any, ...] = ()):
        self._verify = verify
        self._seconds = seconds
        self._warm_up = warm_up
        self._pool: ProcessPool | None = None
        self._finalizer: weakref.finalize | None = None
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()  # `timeouts`: calls that took too long and scored 0

    def score(self, *args: Any) -> float | None:
        """Return the verifier's score, or 0 if it takes too long or fails. Raises RunError if no process starts."""
        from pebble import ProcessExpired

        for _ in range(2):  # a process that died between two calls, for lack of memory say, is replaced once
            pool = self._start()
            try:
                call = pool.schedule(_call, (self._verify, args, self._seconds), timeout=self._seconds * _GRACE)
                score, in_time = call.result()
            except (TimeoutError, ProcessExpired):
                score, in_time = 0.0, False
            except RuntimeError:  # pebble: the pool is broken
                self.close()
                continue
            if not in_time:
                self.counts["timeouts"] += 1
            return score
        fix = "its own message is above; pip install 'ernie-align[rewards]' installs what it needs"
        raise RunError.at(f"reward {self._verify.__name__}", "the verifier's process did not start", fix=fix)

    def close(self) -> None:
        """Stop the process. A later call starts another."""
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
            self._pool = self._finalizer = None

    def _start(self) -> ProcessPool:
        from pebble import ProcessPool

        with self._lock:
            if self._pool is None:
                initargs = (self._verify, self._warm_up)
                self._pool = ProcessPool(1, initializer=_initialize, initargs=initargs, context=_SpawnContext())
                self._finalizer = weakref.finalize(self, _stop, self._pool, os.getpid())
            return self._pool


def _stop(pool: ProcessPool, owner: int) -> None:
    if os.getpid() == owner:  # a forked data worker must not stop its parent's process
        pool.stop()
        pool.join()


def _initialize(verify: Callable[..., float | None], warm_up: tuple[Any, ...]) -> None:
    """Set the limits of the worker process."""
    # pebble's handler is Python code, which a call stuck in C never reaches
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "setitimer"):  # Windows has no such timer; there only the clock ends a call
        signal.signal(signal.SIGPROF, _interrupt)
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if hard < 0 else min(_MEMORY, hard), hard))
    if warm_up:
        verify(*warm_up)  # what sympy loads on first use does not count toward the first call's time
    logging.disable(logging.CRITICAL)


def _call(verify: Callable[..., float | None], args: tuple[Any, ...], seconds: float) -> tuple[float | None, bool]:
    """Return (score, whether it was computed in time)."""
    _set_timer(seconds)
    try:
        return verify(*args), True
    except _OutOfTime:
        return 0.0, False
    except Exception:  # nonsense finds bugs in any parser, and is never a right answer
        return 0.0, True
    finally:
        _set_timer(0)


def _set_timer(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _OutOfTime


def math_equal(answer: str, expected: str) -> float | None:
    """Return 1 if some reading of the answer equals the expected one, else 0; None if the latter cannot be parsed."""
    from math_verify import parse, verify

    def read(text: str) -> list:
        return parse(text, parsing_timeout=None)

    gold = read(f"${expected.strip().strip('$')}$") or read(expected)
    if not gold:
        return None
    # math-verify finds LaTeX only between dollars or in \boxed{}: a bare \frac{1}{2} gets its dollars here
    readings = [answer] if "$" in answer or "\\boxed" in answer else [answer, f"${answer}$"]
    return float(any(verify(gold, read(reading), timeout_seconds=None) for reading in readings))


def regex_matches(answer: str, pattern: str, full: bool) -> float:
    """Return 1 if the pattern matches the whole answer (full), or some part of it, else 0."""
    return float(bool(re.fullmatch(pattern, answer) if full else re.search(pattern, answer)))


def json_is_valid(answer: str, schema: dict[str, Any], fenced: bool) -> float:
    """Return 1 if the answer is strict JSON (no NaN, no Infinity) and valid against the schema, else 0.

    fenced: the answer may be one ```json fence.
    """
    fence = _FENCE.fullmatch(answer.strip()) if fenced else None
    try:
        value = json.loads(fence[1] if fence else answer, parse_constant=_refuse_constant)
        return float(json_validator(schema).is_valid(value))
    except (ValueError, RecursionError):  # invalid JSON, too many digits, or nested too deeply
        return 0.0


def json_validator(schema: dict[str, Any]) -> Validator:
    """Build a validator that never fetches a $ref to anything outside the schema."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry

    return validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
