"""Files of token ids as the shards of a dataset: checked, and split at ends of documents.

Reads each file once and writes nothing. Independent of text.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Literal

import numpy as np

from data.boundaries import Boundaries, Ids, Marks
from data.dataset import DESCRIPTION_NAME, TRAIN, VALIDATION, Split, open_dataset
from data.progress import Progress
from data.shards import ShardRecord, TokenRange, TokenStream, token_dtype
from data.sources.kinds import kind_of
from data.sources.listing import walk
from data.sources.saved_datasets import is_saved_dataset
from data.token_ids.files import (
    TokenDtype,
    TokenFile,
    is_token_file,
    open_token_file,
    refuse_wider_ids,
)
from data.token_ids.piece_lengths import piece_lengths
from data.tokenizer import Tokenizer

_BLOCK = 2**22
_SCAN_FOR_MARKS = 2**24


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """How files and rows of token ids are read."""

    tokens_field: str = ""
    """Rows hold token ids in this column, such as input_ids. Empty: they hold text."""
    token_dtype: TokenDtype = "auto"
    """Of one id in .bin and .npy files that do not name it; auto: uint16 for up to 65536 ids."""
    validation_input: tuple[str, ...] = ()
    """Token files to hold out; none: the last documents of the input."""

    def given(self) -> dict[str, object]:
        """Return the fields that differ from their defaults."""
        mine, defaults = vars(self), vars(TokenOptions())
        return {name: value for name, value in mine.items() if value != defaults[name]}

    def raw_dtype(self, vocab_size: int) -> str:
        """Return the numpy name of the type of one id in files without a header."""
        if self.token_dtype == "auto":
            return token_dtype(vocab_size).str
        return np.dtype(self.token_dtype).newbyteorder("<").str


@dataclass(frozen=True)
class _Part:
    """Some ids of one file, in order."""

    file: TokenFile
    begin: int
    stop: int


def list_token_files(inputs: Sequence[str]) -> list[Path] | None:
    """Return the token files that the inputs are; None where the first is text.

    A folder with a file of text in it is text, unless it is one that `data.prepare` wrote.

    Raises:
        ValueError: some of them are text.
    """
    found: list[Path] = []
    for given in inputs:
        path = Path(given)
        entries = [path] if path.exists() else sorted(map(Path, glob(given, recursive=True)))
        files = [file for entry in entries for file in _token_files(entry)]
        if files:
            found += files
        elif found:
            raise ValueError(f"input {given} holds no token files, prepare it by itself")
        else:
            return None
    return found


def _token_files(entry: Path) -> list[Path]:
    """Return the token files that a file or a folder is; none of a folder of text."""
    if not entry.is_dir():
        return [entry] if is_token_file(entry) else []
    is_own, found = (entry / DESCRIPTION_NAME).is_file(), []
    for file in walk(entry):
        if is_token_file(file):
            found.append(file)
        elif not is_own and (kind_of(file.name) or is_saved_dataset(file)):
            return []
    return found


def split_token_files(
    inputs: Sequence[str], tokenizer: Tokenizer, options: TokenOptions, validation_fraction: float
) -> tuple[dict[str, Split], Marks]:
    """Check the ids of all files, and hold out the last documents, or `validation_input`.

    A folder that `data.prepare` wrote keeps its own split.

    Args:
        inputs: files, folders or globs.
        tokenizer: of the ids.
        options: how they are read.
        validation_fraction: share of the tokens to hold out.

    Raises:
        ValueError: a file is damaged, of another tokenizer, or holds ids that it has not.
    """
    given = {TRAIN: _open(inputs, tokenizer, options)}
    if options.validation_input:
        given[VALIDATION] = _open(options.validation_input, tokenizer, options)
    elif own := [part for part in given[TRAIN] if _own_split(part.file.path) == VALIDATION]:
        given = {TRAIN: [part for part in given[TRAIN] if part not in own], VALIDATION: own}
    boundaries = _find_marks(given[TRAIN], tokenizer)
    if VALIDATION not in given:
        given = _hold_out(given[TRAIN], boundaries, validation_fraction)
    lengths = piece_lengths(tokenizer)
    size = sum(_bytes(part) for parts in given.values() for part in parts)
    splits = {}
    with Progress("checking", size) as progress:
        for name, parts in given.items():
            begins, records = True, []
            for part in parts:
                records.append(_record(part, boundaries, lengths, progress, begins=begins))
                begins = part.file.read()[part.stop - 1 : part.stop][0] == boundaries.eos_id
            splits[name] = Split(shards=tuple(records))
    return splits, boundaries.marks


def _own_split(path: Path) -> str:
    """Return the split of a shard of a dataset of ours; empty for any other file."""
    if path.suffix != ".tokens" or not path.with_name(DESCRIPTION_NAME).is_file():
        return ""
    for name, split in open_dataset(path.parent).splits.items():
        if any(record.name == path.name for record in split.shards):
            return name
    return ""


def _open(inputs: Sequence[str], tokenizer: Tokenizer, options: TokenOptions) -> list[_Part]:
    found = []
    for path in list_token_files(inputs) or []:
        file = open_token_file(path, options.raw_dtype(tokenizer.vocab_size))
        if options.token_dtype == "auto":
            refuse_wider_ids(file)
        if file.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
            raise ValueError(
                f"input {path} was made with tokenizer {file.tokenizer_fingerprint}, name that, "
                f"not {tokenizer.path}"
            )
        if file.tokens:
            found.append(_Part(file, 0, file.tokens))
    if sum(part.file.tokens for part in found) < 2:
        raise ValueError(f"input {', '.join(inputs)} holds no token files with ids in them")
    return found


def _stream(parts: Sequence[_Part]) -> TokenStream:
    return TokenStream([part.file.read() for part in parts])


def _blocks(stream: TokenStream, begin: int, stop: int) -> Iterator[tuple[int, Ids]]:
    for start in range(begin, stop, _BLOCK):
        yield start, stream.read(start, min(_BLOCK, stop - start))


def _find_marks(parts: Sequence[_Part], tokenizer: Tokenizer) -> Boundaries:
    """Return which tokens mark documents, by the first 16 M ids."""
    stream = _stream(parts)
    bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
    first = stream.read(0, min(_SCAN_FOR_MARKS, len(stream)))
    marks: Marks = "last"
    if bos_id == eos_id:
        if first[0] == bos_id:
            ends = np.flatnonzero(first[1:-1] == bos_id) + 1
            marks = "both" if len(ends) and first[ends[0] + 1] == bos_id else "first"
    elif (first == bos_id).any():
        marks = "both" if (first == eos_id).any() else "first"
    return Boundaries(bos_id, eos_id, marks)


def _hold_out(
    parts: Sequence[_Part], boundaries: Boundaries, validation_fraction: float
) -> dict[Literal["train", "validation"] | str, list[_Part]]:
    """Cut the files before the last documents, which hold about this share of the tokens."""
    stream = _stream(parts)
    total = len(stream)
    target = min(max(total - round(total * validation_fraction), 1), total - 1)
    cut = _start_near(stream, target, boundaries)
    train, held_out, begin = [], [], 0
    for part in parts:
        within = min(max(cut - begin, 0), part.stop)
        begin += part.stop
        train += [_Part(part.file, 0, within)] if within else []
        held_out += [_Part(part.file, within, part.stop)] if within < part.stop else []
    return {TRAIN: train, VALIDATION: held_out}


def _start_near(stream: TokenStream, target: int, boundaries: Boundaries) -> int:
    """Return the first start of a document from `target` on, else the last before it, else it."""
    for begin, block in _blocks(stream, target - 1, len(stream)):
        if len(found := np.flatnonzero(boundaries.starts(block)[1:])):
            return begin + 1 + int(found[0])
    for stop in range(target, 1, -_BLOCK):
        begin = max(stop - _BLOCK, 0)
        if len(found := np.flatnonzero(boundaries.starts(stream.read(begin, stop - begin))[1:])):
            return begin + 1 + int(found[-1])
    return target


def _bytes(part: _Part) -> int:
    return (part.stop - part.begin) * np.dtype(part.file.dtype).itemsize


def _record(
    part: _Part, boundaries: Boundaries, lengths: Ids, progress: Progress, *, begins: bool
) -> ShardRecord:
    """Read some ids once: their range, their documents, their checksum.

    With `begins`, no document of the part before goes on in it.
    """
    file, ids = part.file, part.file.read()
    item = np.dtype(file.dtype).itemsize
    digest = hashlib.sha256()
    documents = int(boundaries.marks == "last" and begins)
    text_bytes, before = 0, np.empty(0, np.int64)
    for begin in range(part.begin, part.stop, _BLOCK):
        stored = ids[begin : min(begin + _BLOCK, part.stop)]
        digest.update(stored.tobytes())
        block = stored.astype(np.int64)
        _check_ids(block, len(lengths), file.path, begin)
        joined = np.concatenate([before, block])
        documents += int(boundaries.starts(joined)[len(before) :].sum())
        before = block[-1:]
        text_bytes += int(lengths[block].sum())
        progress.update(stored.nbytes)
    elsewhere = TokenRange(
        path=str(file.path.resolve()),
        offset=file.offset + part.begin * item,
        dtype=file.dtype,
        file_bytes=file.path.stat().st_size,
    )
    return ShardRecord(
        name=file.path.name,
        tokens=part.stop - part.begin,
        documents=documents,
        text_bytes=text_bytes,
        sha256=digest.hexdigest(),
        elsewhere=elsewhere,
    )


def _check_ids(block: Ids, vocab_size: int, path: Path, begin: int) -> None:
    wrong = (block < 0) | (block >= vocab_size)
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(
            f"input {path}: token {begin + index} is {block[index]}, outside of the tokenizer's "
            f"{vocab_size} ids, name the tokenizer of these ids, or their --token_dtype"
        )
