"""Documents that nearly repeat an earlier one, by MinHash sketches of their words.

A sketch stands for the set of all five words in a row; the share that two of these sets have in
common is estimated from 128 of their hashes (Broder 1997, On the resemblance and containment of
documents).
"""

from base64 import b64decode, b64encode
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.pieces.units import KEY, Unit, read_array, write_array

_WORDS = 5
_HASHES = 128
_SEED = 0


def sketch(text: str) -> bytes:
    """Return the sketch of a text, as one line."""
    import rensa  # An extra, which only near duplicates need.

    words = text.split()
    rows = [" ".join(words[i : i + _WORDS]) for i in range(max(len(words) - _WORDS + 1, 1))]
    found = rensa.RMinHash(num_perm=_HASHES, seed=_SEED)
    found.update(rows)
    return b64encode(found.__getstate__()) + b"\n"


def drop_near_duplicates(units: Sequence[Unit], folder: Path, threshold: float) -> None:
    """Mark as not kept the texts that nearly repeat an earlier one that is.

    Takes about 1.6 KB of memory for each text that is kept.

    Args:
        units: all of the corpus, in order.
        folder: of their files; those of `kept` are there, and are written again.
        threshold: share of five words in a row that two texts must have in common.
    """
    import rensa

    seen = rensa.RMinHashDeduplicator(
        threshold=threshold, num_perm=_HASHES, use_lsh=True, seed=_SEED
    )
    found = rensa.RMinHash(num_perm=_HASHES, seed=_SEED)
    for unit in units:
        keys = read_array(unit.path(folder, "keys"), KEY)
        kept = read_array(unit.path(folder, "kept"), np.dtype("?"))
        with unit.path(folder, "sketches").open("rb") as file:
            for row, line in zip(np.argsort(keys["first"]), file, strict=True):
                if kept[row]:
                    found.__setstate__(b64decode(line))
                    kept[row] = seen.add(str(keys["key"][row]), found)
        write_array(unit.path(folder, "kept"), kept)
