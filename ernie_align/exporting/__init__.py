"""Export a run, an adapter or a model to a folder that can be served, after checking that it gives equal answers."""

from ernie_align.exporting.write import Export, export

__all__ = ["Export", "export"]
