"""The page of a report: what was read or measured of a run, as HTML and pictures."""
