"""What a checkpoint can do: answers to rows it has not seen, figures with their intervals, and what has changed."""

from ernie_align.evaluation.evaluate import Evaluation, evaluate, load_plan, short_plan
from ernie_align.evaluation.generate import Sampling, answer
from ernie_align.evaluation.measure import Figure, Result
from ernie_align.evaluation.routing import RoutedToken, RoutingPicture, describe, route, routed_tokens

__all__ = [
    "Evaluation",
    "Figure",
    "Result",
    "RoutedToken",
    "RoutingPicture",
    "Sampling",
    "answer",
    "describe",
    "evaluate",
    "load_plan",
    "route",
    "routed_tokens",
    "short_plan",
]
