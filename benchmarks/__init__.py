"""What the toolkit costs, measured against the stock stack. See README.md."""
