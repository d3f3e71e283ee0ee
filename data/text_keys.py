"""What identifies a text: the sha256 of its bytes, and a short key that decides its split."""

import hashlib


def text_digest(text: str) -> bytes:
    """Return the sha256 of the UTF-8 bytes of a text."""
    return hashlib.sha256(text.encode()).digest()


def text_key(digest: bytes) -> int:
    """Return the first 64 bits of a digest as an integer: uniform in [0, 2**64)."""
    return int.from_bytes(digest[:8], "big")
