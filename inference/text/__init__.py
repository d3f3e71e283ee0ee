"""Text in, text out: the Python API over the engine, used by `python -m inference.generate`."""
