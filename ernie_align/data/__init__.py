"""Rows of the world -> canonical rows -> token ids with labels -> batches."""
