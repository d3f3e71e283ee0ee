"""Token shards on disk, and the shards of one split read as one stream of tokens.

A shard is one file: 1024 bytes of header (8 bytes of magic, then JSON padded with spaces), then
the raw little-endian token ids. Independent of text, batches and ranks.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data.foreign_json import build, parse_object, shown

MAGIC = b"SKIPTOK1"
"""The last character is the version of the format."""

HEADER_BYTES = 1024

MAX_VOCAB_SIZE = 2**24
"""No tokenizer has more ids."""

_DTYPES = ("<u2", "<u4", "<i4")

ID_DTYPES = {"|u1", "<u2", "<i2", "<u4", "<i4", "<i8", "<u8"}
"""numpy names of the types that ids of other programs have."""

_Stored = TypeVar("_Stored", bound=np.integer)

NO_LOSS = -100
"""Label of a position that has no loss; torch's own number for it."""


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """The header of a shard."""

    dtype: str
    """numpy name of the type of one token: "<u2" or "<u4", its id; "<i4", its id or, of a token
    that is read but not learnt, ~id, which is negative."""
    tokens: int
    """Number of token ids in the file."""
    documents: int
    """Number of documents; a shard holds whole ones."""
    text_bytes: int
    """UTF-8 bytes of the text behind the tokens."""
    vocab_size: int
    """Every token id is below this."""
    tokenizer_fingerprint: str
    """sha256 of the tokenizer.model that made the ids."""


@dataclass(frozen=True, kw_only=True)
class TokenRange:
    """Ids in a file that another program wrote, see `data.token_ids.files`."""

    path: str
    offset: int
    """Bytes before the first id."""
    dtype: str
    """numpy name of the type of one id."""
    file_bytes: int
    """Size of the whole file."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """The entry of a shard in `dataset.json`."""

    name: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str
    """Of the whole file, or of the ids alone where `elsewhere` is given, in hex."""
    elsewhere: "TokenRange | None" = None
    """Where the ids are, if in no file of the dataset; `name` is for messages alone."""


def token_dtype(vocab_size: int, *, pairs: bool = False) -> np.dtype[np.integer]:
    """Return the type on disk: the smallest that holds every token id, signed for `pairs`."""
    if pairs:
        return np.dtype("<i4")
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def token_ids(stored: npt.NDArray[_Stored]) -> npt.NDArray[_Stored]:
    """Return the ids of tokens as they are stored, see `ShardHeader.dtype`."""
    return np.where(stored < 0, ~stored, stored)


def write_shard(
    path: Path, header: ShardHeader, blocks: Iterable[npt.NDArray[np.integer]]
) -> ShardRecord:
    """Write one shard aside, rename it into place and return its entry in `dataset.json`.

    Args:
        path: of the shard.
        header: of the shard.
        blocks: its tokens in order, each (tokens,), of the type of the header.
    """
    first = MAGIC + json.dumps(dataclasses.asdict(header)).encode()
    digest = hashlib.sha256()
    aside = path.with_suffix(".partial")
    with aside.open("wb") as file:
        for part in chain([first.ljust(HEADER_BYTES)], (block.tobytes() for block in blocks)):
            file.write(part)
            digest.update(part)
    aside.rename(path)
    return ShardRecord(
        name=path.name,
        tokens=header.tokens,
        documents=header.documents,
        text_bytes=header.text_bytes,
        sha256=digest.hexdigest(),
    )


class ShardTokens:
    """The ids in a shard: the file is opened and read for each slice, and closed again.

    A memory map would hold a file descriptor per shard, of which a large corpus has more than a
    process may open, and SIGBUS would end the process without a message when a file shrinks.
    """

    def __init__(
        self, path: Path, dtype: np.dtype[np.integer], count: int, offset: int = HEADER_BYTES
    ) -> None:
        self._path = path
        self._dtype = dtype
        self._count = count
        self._offset = offset

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> npt.NDArray[np.integer]:
        """Return the ids of a slice without step: (slice,), as stored.

        Raises:
            ValueError: the file has become shorter.
        """
        start, stop, _ = part.indices(self._count)
        offset = self._offset + start * self._dtype.itemsize
        ids = np.fromfile(self._path, self._dtype, max(stop - start, 0), offset=offset)
        if len(ids) < stop - start:
            raise ValueError(
                f"shard {self._path} was cut short while it was in use, prepare the dataset again"
            )
        return ids


class Sliceable(Protocol):
    """Ids in memory, or in a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> npt.NDArray[np.integer]: ...


def open_shard(path: Path) -> tuple[ShardHeader, ShardTokens]:
    """Check the header and the size of a shard.

    Returns:
        The header, and the ids, which are read when sliced.

    Raises:
        ValueError: the file is missing, no shard, or of another length than in its header.
    """
    if not path.is_file():
        raise ValueError(f"shard {path} does not exist, prepare the dataset again")
    with path.open("rb") as file:
        first = file.read(HEADER_BYTES)
    if not first.startswith(MAGIC):
        raise ValueError(f"shard {path} does not begin with {MAGIC!r}, prepare the dataset again")
    try:
        header = build(ShardHeader, parse_object(first[len(MAGIC) :]))
        if header.dtype not in _DTYPES or min(header.tokens, header.documents) < 0:
            raise ValueError(f"{shown(header.dtype)} of {header.tokens} tokens")
    except ValueError as error:
        raise ValueError(
            f"shard {path} has a damaged header ({error}), prepare the dataset again"
        ) from None
    dtype = np.dtype(header.dtype)
    expected = HEADER_BYTES + header.tokens * dtype.itemsize
    actual = path.stat().st_size
    if actual != expected:
        raise ValueError(
            f"shard {path} has {actual} bytes but by its header {expected},"
            " prepare the dataset again"
        )
    return header, ShardTokens(path, dtype, header.tokens)


def open_elsewhere(found: TokenRange, count: int) -> ShardTokens:
    """Check the size of a file that another program wrote; return `count` ids of it.

    Raises:
        ValueError: the file is missing, or of another size than when the dataset was prepared.
    """
    path = Path(found.path)
    actual = path.stat().st_size if path.is_file() else -1
    if actual != found.file_bytes:
        now = f"has {actual} bytes, not {found.file_bytes}" if actual >= 0 else "does not exist"
        raise ValueError(
            f"token file {path} {now}, put it back or prepare the dataset again where it is now"
        )
    return ShardTokens(path, np.dtype(found.dtype), count, found.offset)


class TokenStream:
    """Shards, concatenated, as one array of tokens that is read in ranges.

    Args:
        shards: each (tokens,), as stored.
    """

    def __init__(self, shards: Sequence[Sliceable]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens [start, start + count): (count,) int64, across shards where needed."""
        return self.read_targets(start, count)[0]

    def read_targets(
        self, start: int, count: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return tokens [start, start + count) as inputs and as targets, (count,) int64 each.

        A target is NO_LOSS where the token is not to be learnt.
        """
        stored = self._read(start, count)
        return token_ids(stored), np.where(stored < 0, np.int64(NO_LOSS), stored)

    def _read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        if start < 0 or count < 0 or start + count > len(self):
            raise ValueError(f"tokens [{start}, {start + count}) are outside [0, {len(self)})")
        tokens = np.empty(count, dtype=np.int64)
        done = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while done < count:
            within = start + done - (int(self._ends[shard]) - len(self._shards[shard]))
            part = self._shards[shard][within : within + count - done]
            tokens[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return tokens
