"""One optimizer step, its recipe, and what is measured around it."""
