"""Decode prompts round by round: batch, KV cache, sampling. Imports no strategy."""
