"""Measurements behind `python bench.py`: kernels.py, step.py, and what they share in measure.py."""
