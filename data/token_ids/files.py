"""Files of token ids that other programs wrote, read where they are: no id is copied.

- `.bin` of nanoGPT: ids alone; of llm.c and its descendants: 1024 bytes of header, then ids.
- `.bin` of Megatron, with an `.idx` of the same name beside it, which lists its documents.
- `.npy` of OLMo: ids alone in spite of the suffix; or an array that numpy saved.
- `.tokens`: shards of `data.prepare`.

Independent of tokenizers and of datasets.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError  # numpy cleans a header with Python's tokenizer.
from typing import Literal

import numpy as np
import numpy.typing as npt

from data.shards import HEADER_BYTES, ID_DTYPES, ShardTokens, open_shard

SUFFIXES = (".bin", ".npy", ".tokens")

TokenDtype = Literal["auto", "uint16", "uint32", "int32", "int64", "uint64"]

# llm.c: int32 magic, version, tokens; https://github.com/karpathy/llm.c/blob/master/dev/data
_LOOKED_AT = 4096
_LLMC_HEADER_BYTES = 1024
_LLMC = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
# Megatron-LM, megatron/core/datasets/indexed_dataset.py: magic, version, dtype code, counts.
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER_BYTES = len(_MEGATRON_MAGIC) + 8 + 1 + 8 + 8
_MEGATRON_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """The ids of one file."""

    path: Path
    offset: int
    """Bytes before the first id."""
    dtype: str
    """numpy name of the type of one id."""
    tokens: int
    """Number of ids."""
    lengths: npt.NDArray[np.int32] | None = None
    """Tokens of each document, where the format lists them."""
    tokenizer_fingerprint: str | None = None
    """sha256 of the tokenizer of the ids, where the format names it."""

    def read(self) -> ShardTokens:
        """Return the ids, which are read when sliced."""
        return ShardTokens(self.path, np.dtype(self.dtype), self.tokens, self.offset)


def is_token_file(path: Path) -> bool:
    """Whether a file holds token ids, by its suffix."""
    return path.suffix in SUFFIXES


def open_token_file(path: Path, dtype: str) -> TokenFile:
    """Read how a file is laid out.

    Args:
        path: One of SUFFIXES.
        dtype: numpy name of the type of one id, where the file does not name it.

    Raises:
        ValueError: The file is damaged, or of ids that are no integers.
        OSError: It cannot be read.
    """
    if path.suffix == ".tokens":
        header, ids = open_shard(path)
        if header.dtype == "<i4":
            raise ValueError(f"input {path} holds pairs, name its folder as --data.path or also")
        return TokenFile(
            path=path,
            offset=HEADER_BYTES,
            dtype=header.dtype,
            tokens=len(ids),
            tokenizer_fingerprint=header.tokenizer_fingerprint,
        )
    if path.suffix == ".npy":
        return _open_npy(path, dtype)
    index = path.with_suffix(".idx")
    if index.is_file():
        return _open_megatron(path, index)
    with path.open("rb") as file:
        first = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4").tolist()
    if (kind := _LLMC.get((first[0], first[1]))) is not None:
        return _check_tokens(path, kind, _LLMC_HEADER_BYTES, first[2])
    return _raw(path, dtype)


def refuse_wider_ids(file: TokenFile) -> None:
    """Raise a ValueError for a file whose ids look as if each took more bytes than was assumed."""
    first = file.read()[:_LOOKED_AT]
    if len(first) > 1 and not first[1::2].any() and first[0::2].any():
        raise ValueError(
            f"input {file.path}: every second id is 0 as {file.dtype}, give the --token_dtype of "
            "its ids"
        )


def _raw(path: Path, dtype: str) -> TokenFile:
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if size % item:
        raise ValueError(
            f"input {path} has {size} bytes, no multiple of {item}, give its --token_dtype"
        )
    return TokenFile(path=path, offset=0, dtype=dtype, tokens=size // item)


def _check_tokens(path: Path, kind: str, offset: int, tokens: int) -> TokenFile:
    """Return a file whose header gives a number of ids, if it has as many."""
    expected = offset + tokens * np.dtype(kind).itemsize
    actual = path.stat().st_size
    if tokens < 0 or actual != expected:
        raise ValueError(
            f"input {path} has {actual} bytes but by its header {expected}, copy it again"
        )
    return TokenFile(path=path, offset=offset, dtype=kind, tokens=tokens)


def _open_npy(path: Path, dtype: str) -> TokenFile:
    with path.open("rb") as file:
        if file.read(6) != np.lib.format.MAGIC_PREFIX:
            return _raw(path, dtype)
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version}")
            shape, _, saved = np.lib.format.read_array_header_1_0(file)
        except (ValueError, EOFError, SyntaxError, TokenError) as error:
            raise ValueError(f"input {path} has a damaged header, save it again") from error
        offset = file.tell()
    if len(shape) != 1 or saved.str not in ID_DTYPES:
        raise ValueError(
            f"input {path} holds {saved.name} of shape {shape}, save one row of integers"
        )
    return _check_tokens(path, saved.str, offset, shape[0])


def _open_megatron(path: Path, index: Path) -> TokenFile:
    """Return a `.bin` of Megatron; the sequences of its index follow each other without a gap."""
    with index.open("rb") as file:
        header = file.read(_MEGATRON_HEADER_BYTES)
        version = int.from_bytes(header[9:17], "little")
        if not header.startswith(_MEGATRON_MAGIC) or version != 1 or len(header) < 34:
            raise ValueError(f"input {index} is no index of Megatron of version 1, remove it")
        kind = _MEGATRON_DTYPES.get(header[17])
        if kind not in ID_DTYPES:
            raise ValueError(f"input {path} holds ids of type {header[17]}, give integers")
        count = int.from_bytes(header[18:26], "little")
        if index.stat().st_size < _MEGATRON_HEADER_BYTES + 12 * count:
            raise ValueError(f"input {index} is cut short, copy it again")
        lengths = np.fromfile(file, "<i4", count)
        starts = np.fromfile(file, "<i8", count)
    item = np.dtype(kind).itemsize
    ends = np.cumsum(lengths, dtype=np.int64)
    whole = (lengths >= 0).all() and np.array_equal(starts, (ends - lengths) * item)
    if not whole:
        raise ValueError(f"input {index} is damaged or leaves gaps, write it again")
    found = _check_tokens(path, kind, 0, int(ends[-1]) if count else 0)
    return replace(found, lengths=lengths)
