"""A run from its recipe to its checkpoint, and the folder that keeps it."""

from ernie_align.runs.setup import Setup, examine, go_on, load_recipe, prepare_data, sample_data, set_up
from ernie_align.runs.train import RunResult, run

__all__ = ["RunResult", "Setup", "examine", "go_on", "load_recipe", "prepare_data", "run", "sample_data", "set_up"]
