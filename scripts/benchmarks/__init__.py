"""The pieces of `scripts/benchmark.py`: one file for each table, and what they share."""
