"""Ask an OpenAI-compatible endpoint many questions at once. Imports openai: import this module where it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from openai import APIConnectionError, APIStatusError, Omit, OpenAI, OpenAIError

_LONGEST_WAIT = 60.0  # seconds


class ChatError(Exception):
    """A request failed, and so did its retries if another try could have helped."""


class _Stopped(OpenAIError):
    """Another request failed for good, or the caller stopped reading."""


class ChatClient(OpenAI):
    """openai's client with the recipe's backoff, used for one batch of requests.

    url: base of the endpoint, or of its chat/completions; key: sent as a bearer token, empty for none; timeout and
    backoff in seconds: the wait doubles with each retry, unless the endpoint's Retry-After asks for more. Raises
    ChatError for an invalid URL.
    """

    def __init__(self, url: str, key: str, *, timeout: float, retries: int, backoff: float):
        try:
            super().__init__(
                api_key="none",  # else it is read from the environment
                base_url=url.rstrip("/").removesuffix("/chat/completions"),
                timeout=timeout,
                max_retries=retries,
            )
        except Exception as error:  # a URL that cannot be parsed; the class belongs to openai's HTTP library
            raise ChatError(f"{type(error).__name__}: {error}") from None
        self._key = key
        # the environment may name the user's own OpenAI account, which must not reach another endpoint
        authorization = f"Bearer {key}" if key else Omit()
        self._headers = {"Authorization": authorization, "OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        self._backoff = backoff
        self._stopped = threading.Event()

    def replies(
        self, requests: Mapping[str, dict[str, Any]], *, concurrency: int, accept: Callable[[str], bool]
    ) -> Iterator[tuple[str, str]]:
        """Yield (name, text of the reply) for each request, in the order in which replies arrive.

        A reply that is not accepted is requested again; after the last retry it is returned as it is. Raises ChatError
        after the last reply that arrived if a request failed for good; requests not sent by then are never sent.
        """
        failures = []
        with ThreadPoolExecutor(concurrency) as pool:
            pending = {pool.submit(self._ask, request, accept): name for name, request in requests.items()}
            try:
                for future in as_completed(pending):
                    try:
                        yield pending[future], future.result()
                    except _Stopped:
                        continue
                    except ChatError as error:
                        failures.append(error)
            finally:
                self._stopped.set()  # also if the caller stops reading
        if failures:
            raise failures[0]

    def _ask(self, request: dict[str, Any], accept: Callable[[str], bool]) -> str:
        for attempt in range(self.max_retries + 1):
            if self._stopped.is_set():
                raise _Stopped
            try:
                raw = self.chat.completions.with_raw_response.create(**request, extra_headers=self._headers)
            except APIStatusError as error:
                raise self._failure(f"status {error.status_code}: {error.response.text[:300]}") from None
            except APIConnectionError as error:
                raise self._failure(f"{type(error.__cause__).__name__}: {error.__cause__}") from None
            response, is_last = raw.http_response, attempt == self.max_retries
            try:
                reply = str(response.json()["choices"][0]["message"]["content"] or "")
            except (ValueError, LookupError, TypeError):
                if is_last:
                    what = f"the reply is not in the chat/completions format: {response.text[:300]}"
                    raise self._failure(what) from None
                self._wait(attempt)
            else:
                if is_last or accept(reply):
                    return reply
        raise AssertionError("the last attempt returns or raises")

    def _failure(self, what: str) -> ChatError:
        self._stopped.set()
        return ChatError(what.replace(self._key, "***") if self._key else what)

    def _sleep_for_retry(self, *, retries_taken: int, max_retries: int, options: Any, response: Any) -> None:
        """Override of openai's private method, whose backoff is fixed and whose sleep nothing interrupts."""
        headers = None if response is None else response.headers
        self._wait(retries_taken, at_least=self._parse_retry_after_header(headers) or 0.0)

    def _wait(self, retries_taken: int, *, at_least: float = 0.0) -> None:
        if self._stopped.wait(min(max(at_least, self._backoff * 2**retries_taken), _LONGEST_WAIT)):
            raise _Stopped
