"""Where tokens come from: text to shards, and shards to batches."""
