"""The training objective: the early-exit loss, its curriculum and the cross entropy."""
