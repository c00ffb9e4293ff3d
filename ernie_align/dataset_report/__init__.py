"""Dataset report: read, measure and validate every row of a recipe's sources, without a model."""

from ernie_align.dataset_report.inspect_sources import DatasetReport, SourceSpec, inspect_sources
from ernie_align.dataset_report.source_report import Histogram, SourceReport

__all__ = ["DatasetReport", "Histogram", "SourceReport", "SourceSpec", "inspect_sources"]
