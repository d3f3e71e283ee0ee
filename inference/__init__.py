"""How a trained model speaks: decoding strategies over one shared KV cache."""
