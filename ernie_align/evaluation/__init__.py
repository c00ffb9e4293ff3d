"""What a checkpoint can do: answers to rows it has not seen, and figures with their intervals."""

from ernie_align.evaluation.generate import Sampling, answer
from ernie_align.evaluation.measure import Figure, Metric, Report, evaluate, write_reports

__all__ = ["Figure", "Metric", "Report", "Sampling", "answer", "evaluate", "write_reports"]
