"""The blocks of benchmarks/gpu.py."""
