"""The bytes of text behind each token id, for ids whose text is not at hand."""

import re

import numpy as np
import numpy.typing as npt
import sentencepiece

from data.token_models import JsonModel
from data.tokenizer import Tokenizer

_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def piece_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Return the UTF-8 bytes that each id adds to a text, (vocab,); special tokens add none.

    Sums over the ids of a text are its bytes, but for the space that some models put before it.
    """
    model = tokenizer.model
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    if not isinstance(model, JsonModel):
        proto = sentencepiece.SentencePieceProcessor()
        proto.load_from_serialized_proto(tokenizer.serialized)
        for i in range(len(lengths)):
            special = proto.is_control(i) or proto.is_unknown(i)
            lengths[i] = 0 if special else _length(proto.id_to_piece(i))
        return lengths
    byte_level = "ByteLevel" in str(model.content.get("decoder"))
    added = {token["id"]: token for token in model.content.get("added_tokens", [])}
    for piece, i in model.vocabulary().items():
        if i in added:
            lengths[i] = 0 if added[i].get("special") else len(piece.encode())
        else:
            lengths[i] = len(piece) if byte_level else _length(piece)
    return lengths


def _length(piece: str) -> int:
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace(_SPACE, " ").encode())
