"""Open a checkpoint for decoding: weights, packing, quantization, fitted files."""
