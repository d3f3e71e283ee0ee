"""Fit gates, linear maps and thresholds to a frozen model."""
