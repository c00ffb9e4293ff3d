"""Private parts of openai, pebble and multiprocessing that the rewards use; an upgrade that moves one fails here."""

from __future__ import annotations

import inspect
from multiprocessing import spawn

import openai
from openai._base_client import SyncAPIClient
from pebble.common import process


def test_the_retry_methods_of_openais_client():
    """ChatClient overrides the first for the recipe's backoff, and calls the second. No public hook covers either."""
    parameters = inspect.signature(SyncAPIClient._sleep_for_retry).parameters
    assert list(parameters) == ["self", "retries_taken", "max_retries", "options", "response"]
    assert "self._sleep_for_retry(" in inspect.getsource(SyncAPIClient.request)
    assert list(inspect.signature(openai.OpenAI._parse_retry_after_header).parameters) == ["self", "response_headers"]


def test_spawn_still_imports_the_main_module_that_it_finds():
    """Sandbox hides it. If a start method without it appears, use that one."""
    assert "sys.modules['__main__']" in inspect.getsource(spawn.get_preparation_data)
    assert "mp_context.Process(" in inspect.getsource(process.launch_process)
