"""Convert checkpoints to and from Hugging Face folders, and prove the result."""
