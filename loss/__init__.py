"""What is minimised: the early-exit loss, its curriculum and the cross entropy."""
