"""Reports of runs and evaluations: terminal output, pictures for notebooks, and one HTML page."""

from ernie_align.report.console import quiet_libraries
from ernie_align.report.folders import read_metric
from ernie_align.report.page import write_page
from ernie_align.report.pictures import Picture, answers, curves, expert_load, gallery, rates, token_map

__all__ = [
    "Picture",
    "answers",
    "curves",
    "expert_load",
    "gallery",
    "quiet_libraries",
    "rates",
    "read_metric",
    "token_map",
    "write_page",
]
