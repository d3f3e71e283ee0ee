"""A keyed permutation of range(size) in constant memory: which window a training step reads.

An index is split into a left and a right half of its bits and goes through a Feistel network,
which is a bijection for any round function; an image outside the range goes through again (cycle
walking) until it falls inside. Nothing is stored, so any step can be computed at any time.
"""

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, as in splitmix64.

_Words = npt.NDArray[np.uint64]


def mix(words: _Words) -> _Words:
    """Scramble 64-bit words: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permute(
    slots: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], *, size: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return the image of each slot under the permutation of range(size) of its key.

    Args:
        slots: (count,) int64 in [0, size).
        keys: (count,) int64; each key, the epoch for one, has a permutation of its own.
        size: at least 1.
        seed: any integer.

    Returns:
        (count,) int64 in [0, size).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    seeds = np.full(len(slots), seed % 2**64, dtype=np.uint64)
    round_keys = mix(mix(seeds) ^ keys.astype(np.uint64))
    images = slots.astype(np.uint64)
    outside = np.arange(len(slots))
    while len(outside):
        images[outside] = _feistel(images[outside], round_keys[outside], half_bits)
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _feistel(words: _Words, keys: _Words, half_bits: np.uint64) -> _Words:
    """Permute words of 2 * half_bits bits."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = words >> half_bits, words & mask
    for _ in range(_ROUNDS):
        keys = keys + _GOLDEN
        left, right = right, left ^ (mix(keys ^ right) & mask)
    return (left << half_bits) | right
