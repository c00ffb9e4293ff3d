"""Data: rows of any format -> canonical rows -> token ids with labels -> batches."""
