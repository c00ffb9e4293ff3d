"""What a checkpoint can do: answers to rows it has not seen, figures with their intervals, and what has changed."""

from ernie_align.evaluation.evaluate import Evaluation, evaluate, load_eval_config, make_eval_config
from ernie_align.evaluation.generate import Sampling, answer
from ernie_align.evaluation.routing import RoutedToken, RoutingSnapshot, describe, route, routed_tokens
from ernie_align.evaluation.runner import Figure, Result

__all__ = [
    "Evaluation",
    "Figure",
    "Result",
    "RoutedToken",
    "RoutingSnapshot",
    "Sampling",
    "answer",
    "describe",
    "evaluate",
    "load_eval_config",
    "make_eval_config",
    "route",
    "routed_tokens",
]
