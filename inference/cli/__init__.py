"""Terminal and command line: arguments, one-line errors, tables, progress."""
