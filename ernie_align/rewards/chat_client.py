"""An OpenAI-compatible endpoint: many requests at once, with patience for what passes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

_PASSING = (408, 409, 425, 429)  # status codes, beside 5xx, after which the same request may succeed
_LONGEST_WAIT = 60.0  # seconds


class EndpointFailed(Exception):
    """A request failed in a way that trying again does not mend, or not soon."""


@dataclass(frozen=True)
class Endpoint:
    """url: base of the endpoint, or of its chat/completions; api_key_env: the variable with the key, which is read for
    each batch and kept nowhere; timeout and backoff in seconds. A wait doubles with each retry, unless the endpoint
    says how long to wait.
    """

    url: str
    api_key_env: str | None
    concurrency: int
    timeout: float
    retries: int
    backoff: float

    @property
    def address(self) -> str:
        """Where requests go."""
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def replies(
        self, requests: Mapping[str, dict[str, Any]], *, accept: Callable[[str], bool]
    ) -> Iterator[tuple[str, str]]:
        """(key, text of the reply) of each request, in the order in which they come.

        A reply that is not accepted is asked for again; after the last retry it is handed over as it is. Raises
        EndpointFailed after the last reply that came, when a request has failed for good; the rest are not sent.
        """
        if not requests:
            return
        import httpx2

        key = os.environ.get(self.api_key_env, "") if self.api_key_env else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        stop, failures = threading.Event(), []
        with (
            httpx2.Client(timeout=self.timeout, headers=headers) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            under_way = {
                pool.submit(self._ask, client, request, accept, stop): name for name, request in requests.items()
            }
            try:
                for future in as_completed(under_way):
                    try:
                        reply = future.result()
                    except EndpointFailed as error:
                        failures.append(str(error))
                    else:
                        if reply is not None:
                            yield under_way[future], reply
            finally:
                stop.set()  # also when whoever reads the replies stops reading
        if failures:
            raise EndpointFailed(failures[0].replace(key, "***") if key else failures[0])

    def _ask(self, client: Any, request: dict[str, Any], accept: Callable, stop: threading.Event) -> str | None:
        """The reply, or None if another request's failure came first."""
        for attempt in range(self.retries + 1):
            if stop.is_set():
                return None
            reply, failure, wait = self._try(client, request)
            last = attempt == self.retries
            if reply is not None and (last or accept(reply)):
                return reply
            if failure is not None and (last or wait is None):
                stop.set()
                raise EndpointFailed(failure)
            if failure is not None:
                stop.wait(min(max(wait, self.backoff * 2**attempt), _LONGEST_WAIT))
        raise AssertionError("the last attempt returns or raises")

    def _try(self, client: Any, request: dict[str, Any]) -> tuple[str | None, str | None, float | None]:
        """(reply, None, None), or (None, what failed, the least seconds to wait; None where waiting is in vain)."""
        import httpx2

        try:
            response = client.post(self.address, json=request)
        except httpx2.RequestError as error:
            return None, f"{type(error).__name__}: {error}", 0.0
        except httpx2.InvalidURL as error:
            return None, f"InvalidURL: {error}", None
        if response.status_code != 200:
            what = f"status {response.status_code}: {response.text[:300]}"
            passing = response.status_code in _PASSING or response.status_code >= 500
            return None, what, _seconds(response.headers.get("retry-after", "")) if passing else None
        try:
            return str(response.json()["choices"][0]["message"]["content"] or ""), None, None
        except (ValueError, LookupError, TypeError):
            return None, f"its reply is none of the chat/completions form: {response.text[:300]}", 0.0


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isdecimal() else 0.0
