"""The optimizer step, its recipe, its data and its metrics."""
