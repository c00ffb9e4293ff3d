"""Evaluate checkpoints: responses to held-out rows, metrics with confidence intervals, and changes from a baseline."""

from ernie_align.evaluation.evaluate import Evaluation, evaluate, load_eval_config, make_eval_config
from ernie_align.evaluation.generate import Sampling, generate_answer
from ernie_align.evaluation.routing import RoutedToken, RoutingSnapshot, describe, route, routed_tokens
from ernie_align.evaluation.runner import CheckpointResult, Figure

__all__ = [
    "CheckpointResult",
    "Evaluation",
    "Figure",
    "RoutedToken",
    "RoutingSnapshot",
    "Sampling",
    "describe",
    "evaluate",
    "generate_answer",
    "load_eval_config",
    "make_eval_config",
    "route",
    "routed_tokens",
]
