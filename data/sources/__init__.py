"""Documents out of the files that people have, one file for each kind."""
