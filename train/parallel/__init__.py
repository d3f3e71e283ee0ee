"""Processes, FSDP2, compile and activation checkpointing, applied from outside."""
