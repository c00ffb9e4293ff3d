"""The stage upo."""
