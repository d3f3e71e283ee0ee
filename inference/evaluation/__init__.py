"""Measure exits and strategies: traces, costs, quality, tables and plots."""
