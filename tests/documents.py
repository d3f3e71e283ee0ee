"""Small texts for tokenizers and datasets."""

import random

WORDS = ["self", "return", "def", "token", "layer", "exit", "draft", "verify", "cache", "12 345"]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Return distinct small texts with indentation, blank lines and a little Unicode."""
    rng = random.Random(seed)
    documents = []
    for number in range(count):
        lines = [
            " " * rng.choice((0, 4, 8)) + " ".join(rng.choices(WORDS, k=rng.randint(0, 9)))
            for _ in range(rng.randint(3, 40))
        ]
        documents.append(f"document {number} caf\u00e9\n" + "\n".join(lines) + "\n")
    return documents
