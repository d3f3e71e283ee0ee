"""Decoding of trained models: strategies over one shared KV cache.

The loose files are commands. For text from Python:

    import inference
    model = inference.load("outputs/demo")
    print(model.generate("def main(").text)
"""

from inference.text.continuation import Continuation, Piece
from inference.text.model import Model, load
from inference.text.stream import TextStream

__all__ = ["Continuation", "Model", "Piece", "TextStream", "load"]
