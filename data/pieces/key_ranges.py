"""The different texts of all units by their keys, in memory a range of keys at a time."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.pieces.units import KEY, Unit, map_array, read_array

KEY_RANGE = 2**64
KEYS_AT_ONCE = 1_000_000


class Texts(NamedTuple):
    """Different texts in the dataset, sorted by their keys."""

    keys: npt.NDArray[np.uint64]
    bytes: npt.NDArray[np.uint64]
    """Size of each."""
    all_bytes: npt.NDArray[np.uint64]
    """Size of all documents with this text that are in the dataset."""


class KeyRanges:
    """The texts of all units, a range of keys at a time."""

    def __init__(self, units: Sequence[Unit], folder: Path, *, drop_duplicates: bool) -> None:
        self._units = units
        self._folder = folder
        self._drop_duplicates = drop_duplicates
        paths = [unit.path(folder, "keys") for unit in units]
        count = sum(path.stat().st_size for path in paths) // KEY.itemsize
        ranges = count // KEYS_AT_ONCE + 1
        inner = np.array([i * KEY_RANGE // ranges for i in range(1, ranges)], np.uint64)
        # (units, ranges + 1): where in its table the keys of each range begin.
        self._bounds = np.array([_bounds(map_array(path, KEY)["key"], inner) for path in paths])

    def __iter__(self) -> Iterator[Texts]:
        """Yield the texts of each range that has any."""
        for number in range(self._bounds.shape[1] - 1):
            rows = self._rows(number, "keys", KEY)
            if self._drop_duplicates:
                rows = rows[self._rows(number, "kept", np.dtype("?"))]
            rows, starts = _grouped(rows)[1:]
            if len(starts):
                weights = np.add.reduceat(rows["all_bytes"], starts)
                sizes = rows["bytes"][starts]
                yield Texts(rows["key"][starts], sizes, sizes if self._drop_duplicates else weights)

    def mark_first(self) -> None:
        """Write of which texts a unit has the first document: a boolean for each of its keys."""
        for number in range(self._bounds.shape[1] - 1):
            order, _, starts = _grouped(self._rows(number, "keys", KEY))
            is_first = np.zeros(len(order), np.bool_)
            is_first[order[starts]] = True
            lengths = np.diff(self._bounds[:, number : number + 2]).ravel()
            for unit, part in zip(
                self._units, np.split(is_first, np.cumsum(lengths)[:-1]), strict=True
            ):
                with unit.path(self._folder, "kept").open("ab" if number else "wb") as file:
                    file.write(part.tobytes())

    def _rows(self, number: int, kind: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return one range of a kind of file, of all units in their order."""
        bounds = self._bounds[:, number : number + 2].tolist()
        return np.concatenate(
            [
                read_array(unit.path(self._folder, kind), dtype, start, end)
                for unit, (start, end) in zip(self._units, bounds, strict=True)
            ]
        )


def _bounds(keys: npt.NDArray[np.uint64], inner: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return where ranges of keys begin in a sorted table, and its length."""
    return np.concatenate([[0], np.searchsorted(keys, inner), [len(keys)]])


def _grouped(
    rows: npt.NDArray[np.void],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.void], npt.NDArray[np.int64]]:
    """Return the order of rows by key, earlier units first, the rows so, and where keys begin."""
    order = np.argsort(rows["key"], kind="stable")
    rows = rows[order]
    keys = rows["key"]
    return order, rows, np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])


def kept_keys(units: Sequence[Unit], folder: Path, wanted: Collection[int]) -> set[int]:
    """Return those of some keys whose text is kept."""
    among = np.array([*wanted], np.uint64)
    found: set[int] = set()
    for unit in units:
        keys = read_array(unit.path(folder, "keys"), KEY)["key"]
        kept = keys[read_array(unit.path(folder, "kept"), np.dtype("?"))]
        found.update(kept[np.isin(kept, among)].tolist())
    return found
