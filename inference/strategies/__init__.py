"""The decoding strategies, by name in `registry`."""
