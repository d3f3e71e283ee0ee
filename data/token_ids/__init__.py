"""Token ids that other programs made: files read where they are, rows that are copied."""
