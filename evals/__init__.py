"""The paper's benchmarks, one file each; evaluate.py runs them."""
