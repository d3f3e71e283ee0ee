"""A corpus cut into pieces, each surveyed and encoded by any process, in any order."""
