"""Damaged inputs for benchmarks/fuzz.py, and what has to hold of those that load."""
