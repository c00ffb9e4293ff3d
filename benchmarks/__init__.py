"""Time and memory, measured against the stock stack."""
