"""Mathematical equality, asked of math-verify in a process that may be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ernie_align.errors import RunError

_WORKER = Path(__file__).with_name("math_worker.py")
_GRACE = 4.0  # times the timeout, by the clock: then a comparison that does not heed its timer is ended


class MathVerifier:
    """Compares answers one after the other; any thread may ask.

    A model's answer may be `10^10^10`: work without end, and partly in C, where neither a signal nor a thread can stop
    it. math-verify's own timeout is a signal besides, which only a main thread may set. Hence a process, started with
    the first question, with a timer on its computing time; what does not heed that is killed, and the next question
    starts another.
    """

    def __init__(self, *, timeout: float):
        self._timeout = timeout
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> Mapping[str, int]:
        """Comparisons that took too long; they scored 0."""
        return self._counts

    def equal(self, answer: str, expected: str) -> float | None:
        """1 or 0; None if the expected answer itself is nothing that math-verify can read."""
        with self._lock:
            process = self._running()
            timer = threading.Timer(self._timeout * _GRACE, process.kill)
            timer.start()
            try:
                reply = self._ask(process, answer, expected)
            finally:
                timer.cancel()
        if reply.get("timeout"):
            self._counts["timeouts"] += 1
            return 0.0
        return reply["score"]

    def close(self) -> None:
        """End the process. A later question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        self.close()

    def _ask(self, process: subprocess.Popen, answer: str, expected: str) -> dict:
        try:
            process.stdin.write(json.dumps([answer, expected, self._timeout]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self.close()
        return {"timeout": True}

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # -P: a file of the working directory must not stand in for a library
            command = [sys.executable, "-P", str(_WORKER)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if self._process.stdout.readline() != "ready\n":
                self.close()
                fix = "what it said stands above; pip install 'ernie-align[rewards]' brings what it needs"
                raise RunError.at("reward maths", "the process that compares did not start", fix=fix)
        return self._process
