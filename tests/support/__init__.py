"""What several test modules share; no fixtures (tests/conftest.py)."""
