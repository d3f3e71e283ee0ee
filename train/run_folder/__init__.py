"""The run folder beside its checkpoints: lock, events, status, metrics, checks before a run."""
