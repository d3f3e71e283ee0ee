"""Options that commands share, tables, progress, streamed text."""
