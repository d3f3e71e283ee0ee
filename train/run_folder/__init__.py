"""What a run writes beside its checkpoints: lock, events, metrics."""
