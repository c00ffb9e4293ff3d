"""Every row of a recipe's sources read, measured and judged, without a model."""

from ernie_align.doctor.examine import Asked, Examination, examine_sources
from ernie_align.doctor.findings import Findings
from ernie_align.doctor.histogram import Histogram

__all__ = ["Asked", "Examination", "Findings", "Histogram", "examine_sources"]
