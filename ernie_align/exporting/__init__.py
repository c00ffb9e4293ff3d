"""A run, an adapter or a model -> a folder that serves it, proved equal before it appears."""

from ernie_align.exporting.write import Export, export

__all__ = ["Export", "export"]
