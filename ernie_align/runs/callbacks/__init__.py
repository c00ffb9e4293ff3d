"""Trainer callbacks of a run."""
