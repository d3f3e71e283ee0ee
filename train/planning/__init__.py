"""Plan a run without a GPU: its memory and its work, for --dry_run."""
