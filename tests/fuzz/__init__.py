"""What hostile recipes and rows are made of."""
