"""A run from its recipe to its checkpoint, and the folder that keeps it."""

from ernie_align.runs.prepare import (
    Setup,
    check_data,
    load_recipe,
    prepare_data,
    resolve_adapter_base,
    sample_data,
    set_up,
)
from ernie_align.runs.train import RunResult, run

__all__ = [
    "RunResult",
    "Setup",
    "check_data",
    "load_recipe",
    "prepare_data",
    "resolve_adapter_base",
    "run",
    "sample_data",
    "set_up",
]
