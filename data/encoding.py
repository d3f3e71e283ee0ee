"""The second pass over a unit, in any process: its tokens, written to files of its own."""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.chat_template import ChatError, ChatTemplate, Message
from data.pieces.units import (
    DOCUMENT,
    ENCODED,
    KEY,
    Unit,
    read_array,
    read_unit,
    write_array,
    written_aside,
)
from data.row_layout import RowLayout
from data.shards import token_dtype
from data.survey import HeldOut
from data.text_keys import text_digest, text_key
from data.tokenizer import Tokenizer

_Tokens = npt.NDArray[np.integer]


def encode_document(
    tokenizer: Tokenizer, text: str, spans: Sequence[int] | None = None, special: Sequence[int] = ()
) -> _Tokens:
    """Return BOS, the ids of the text, EOS: (seq,) as they are stored.

    What is read and what is learnt are encoded each by itself, as they are for generation; BOS and
    what is read are marked as not to be learnt, see `data.shards.ShardHeader`.

    Args:
        tokenizer: the tokenizer.
        text: of the document.
        spans: where reading and learning alternate, see `data.row_layout.Document`.
        special: start and end of each special token in the text.
    """
    dtype = token_dtype(tokenizer.vocab_size, pairs=spans is not None)
    bos, eos = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], dtype=dtype)
    if spans is None:
        pieces = [np.array(ids, dtype=dtype) for ids in tokenizer.encode_pieces(text)]
        return np.concatenate([bos, *pieces, eos])
    parts = [~bos]
    is_learnt = False
    for start, end in pairwise((0, *spans, len(text))):
        ids = np.array(encode_part(tokenizer, text, start, end, special), dtype=dtype)
        parts.append(ids if is_learnt else ~ids)
        is_learnt = not is_learnt
    return np.concatenate([*parts, ~eos if is_learnt else eos])


def encode_part(
    tokenizer: Tokenizer, text: str, start: int, end: int, special: Sequence[int]
) -> list[int]:
    """Return the ids of a part of a text, without BOS and EOS.

    Args:
        tokenizer: the tokenizer.
        text: the whole text.
        start: of the part, in characters.
        end: likewise.
        special: start and end of each special token in the whole text.
    """
    ids: list[int] = []
    starts, stops = special[::2], special[1::2]
    inside = slice(bisect_left(starts, start), bisect_left(starts, end))
    for begin, stop in zip(starts[inside], stops[inside], strict=True):
        ids += tokenizer.encode(text[start:begin])
        ids.append(tokenizer.special[text[begin:stop]])
        start = stop
    return ids + tokenizer.encode(text[start:end])


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]
) -> list[int]:
    """Return BOS and the ids of a chat up to where an answer begins.

    Raises:
        ValueError: the template refuses it.
    """
    try:
        text, special, _ = template.render(messages, prompt=True)
    except ChatError as reason:
        raise ValueError(f"chat: {template.name} refuses it ({reason}), give another") from None
    return [tokenizer.bos_id, *encode_part(tokenizer, text, 0, len(text), special)]


@dataclass
class EncodeUnit:
    """Encodes a unit where it is called; nothing where that has been done.

    Args:
        folder: of the files, those of the survey among them.
        layout: the fields of rows.
        tokenizer: its file.
        held_out: which documents are the validation split.
        drop_duplicates: whether to leave out what is not marked as kept.
    """

    folder: Path
    layout: RowLayout
    tokenizer: Path
    held_out: HeldOut
    drop_duplicates: bool

    def __call__(self, unit: Unit) -> int:
        """Encode the unit; return the bytes of its text that are in the dataset.

        Raises:
            ValueError: its text is not that of the survey.
        """
        done = unit.path(self.folder, "encoded")
        if not done.exists():
            write_array(done, self._encode(unit))
        return int(read_array(done, ENCODED)["bytes"].sum())

    def _encode(self, unit: Unit) -> npt.NDArray[np.void]:
        """Write the tokens of a unit; return what its documents are."""
        surveyed = read_array(unit.path(self.folder, "documents"), DOCUMENT)
        kept = self._kept(unit, len(surveyed))
        rows, digests = [], bytearray()
        with ExitStack() as stack:
            train, validation = (
                stack.enter_context(written_aside(unit.path(self.folder, split)))
                for split in ("train", "validation")
            )
            for number, document in enumerate(read_unit(unit, self.folder, self.layout)):
                digest = text_digest(document.text)
                digests += digest
                if number < len(kept) and not kept[number]:
                    continue
                for part in self.held_out.parts(document):
                    if part is not document:
                        digest = text_digest(part.text)
                    size = len(part.text.encode())
                    tokens = encode_document(self._tokenizer, part.text, part.spans, part.special)
                    is_held_out = self.held_out.holds(text_key(digest), size)
                    (validation if is_held_out else train).write(tokens.tobytes())
                    rows.append((is_held_out, len(tokens), size))
            if bytes(digests) != surveyed["digest"].tobytes():
                raise ValueError(
                    "input changed while it was read, run again when nothing writes to it (of the"
                    " stages, the survey first)"
                )
        return np.array(rows, ENCODED)

    def _kept(self, unit: Unit, documents: int) -> npt.NDArray[np.bool_]:
        """Return which documents of a unit are in the dataset: (documents,)."""
        if not self.drop_duplicates:
            return np.ones(documents, np.bool_)
        kept = np.zeros(documents, np.bool_)
        keys = read_array(unit.path(self.folder, "keys"), KEY)
        kept[keys["first"][read_array(unit.path(self.folder, "kept"), np.dtype("?"))]] = True
        return kept

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer)
