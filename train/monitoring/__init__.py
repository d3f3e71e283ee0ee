"""Monitor ranks, replicas and optimizer statistics while a run trains."""
