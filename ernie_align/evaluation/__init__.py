"""What a checkpoint can do: answers to rows it has not seen, figures with their intervals, and what has changed."""

from ernie_align.evaluation.evaluate import Evaluation, evaluate, load_plan, short_plan
from ernie_align.evaluation.generate import Sampling, answer
from ernie_align.evaluation.measure import Figure, Result

__all__ = ["Evaluation", "Figure", "Result", "Sampling", "answer", "evaluate", "load_plan", "short_plan"]
