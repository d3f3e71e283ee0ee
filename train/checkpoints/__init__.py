"""Write, verify and load checkpoints."""
