"""Pretraining: configuration, parallelism, the loop, checkpoints and metrics."""
