"""Measurements behind `python bench.py`, one a file, and what they share in measure.py."""
