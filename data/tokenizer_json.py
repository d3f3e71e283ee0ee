"""A SentencePiece model written as Hugging Face's `tokenizer.json`, with the same ids.

transformers 5 converts such models wrongly for many strings: it merges unigram models as BPE, and
puts no dummy prefix before a space. Independent of how either file is used.
"""

import itertools
import re
from typing import Any

from sentencepiece import sentencepiece_model_pb2

_SPACE = "\u2581"
_BPE, _UNIGRAM = 2, 1
_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE = 1, 2, 4, 6

# Rust's unigram has no reserved pieces: these names in a text would be read as the pieces
# themselves. A score far below that of any way to spell them keeps them out.
_LONGEST_RESERVED = 32


def tokenizer_json(model: bytes) -> dict[str, Any]:
    """Return the content of the `tokenizer.json` that encodes every text to the ids of `model`.

    BOS is put before a text, as our training and decoding do, and special tokens are named. The
    ids of a unigram model may differ where two ways to cut a text have the same score: each
    program then has its own rounding.

    Args:
        model: The bytes of a SentencePiece model.

    Raises:
        ValueError: If it has a property that cannot be written exactly.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    if problems := _problems(proto):
        raise ValueError(
            f"tokenizer: this SentencePiece model {' and '.join(problems)}, which has no exact "
            "form in tokenizer.json, use one as data.prepare trains them"
        )
    bpe = proto.trainer_spec.model_type == _BPE
    replace: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [{"type": "Prepend", "prepend": _SPACE}] * proto.normalizer_spec.add_dummy_prefix
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto),
        "normalizer": {"type": "Sequence", "normalizers": [*steps, replace]},
        "pre_tokenizer": None if bpe else _isolate_unspellable(proto),
        "post_processor": _bos_first(proto),
        "decoder": _decoder(bool(proto.normalizer_spec.add_dummy_prefix)),
        "model": _bpe(proto) if bpe else _unigram(proto),
    }


def special_tokens(model: bytes) -> dict[str, str]:
    """Return {"bos_token": ..., "eos_token": ..., "unk_token": ...} of a SentencePiece model."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    spec = proto.trainer_spec
    ids = {"bos_token": _bos_id(proto), "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    return {name: proto.pieces[i].piece for name, i in ids.items() if i >= 0}


def _bos_id(proto: Any) -> int:
    """Return the id that begins a text: EOS where there is no BOS."""
    spec = proto.trainer_spec
    return int(spec.bos_id if spec.bos_id >= 0 else spec.eos_id)


def _problems(proto: Any) -> list[str]:
    """Return the properties that have no exact form in `tokenizer.json`."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    dummy = normalizer.add_dummy_prefix
    found = {
        "is neither bpe nor unigram": trainer.model_type not in (_BPE, _UNIGRAM),
        "normalises text": bool(normalizer.precompiled_charsmap),
        "removes extra white space": normalizer.remove_extra_whitespaces,
        "keeps spaces as they are": not normalizer.escape_whitespaces,
        "puts white space behind words": trainer.treat_whitespace_as_suffix,
        "has no byte fallback": _BYTE not in kinds,
        "has unused pieces": 5 in kinds,
        "has user-defined symbols and a dummy prefix": dummy and _USER_DEFINED in kinds,
        "has merges of the same score": trainer.model_type == _BPE and _ties(proto),
        "has pieces of characters that are no piece": bool(_spelled_out(proto) - _alphabet(proto)),
    }
    return [problem for problem, holds in found.items() if holds]


def _ties(proto: Any) -> bool:
    """Whether merges have the same score, but for runs of one character, as Llama 2's spaces."""
    groups: dict[float, set[str]] = {}
    for piece in proto.pieces:
        if piece.type == _NORMAL and len(piece.piece) > 1:
            run = piece.piece[0] * len(piece.piece) == piece.piece
            key = piece.piece[0] if run else piece.piece
            groups.setdefault(piece.score, set()).add(key)
    return any(len(kinds) > 1 for kinds in groups.values())


def _alphabet(proto: Any) -> set[str]:
    return {piece.piece for piece in proto.pieces if piece.type == _NORMAL and not piece.piece[1:]}


def _spelled_out(proto: Any) -> set[str]:
    return {char for piece in proto.pieces if piece.type == _NORMAL for char in piece.piece}


def _added_tokens(proto: Any) -> list[dict[str, Any]]:
    """List the tokens that no merge makes: special tokens and user-defined symbols."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {"id": i, "content": piece.piece, "special": special, "normalized": not special, **flags}
        for i, piece in enumerate(proto.pieces)
        if piece.type not in (_NORMAL, _BYTE)
        for special in [piece.type != _USER_DEFINED]
    ]


def _bos_first(proto: Any) -> dict[str, Any]:
    i = _bos_id(proto)
    bos = proto.pieces[i].piece
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
    }


def _decoder(dummy_prefix: bool) -> dict[str, Any]:
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * dummy_prefix
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "type": "Sequence",
        "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
    }


def _bpe(proto: Any) -> dict[str, Any]:
    """Return the merges: each piece's own, best score first, in every way to cut it in two.

    SentencePiece merges any two neighbours that make a piece, the best score first, and of the
    same score the leftmost pair. In a run of one character the leftmost pair that merges is the
    one with the longest left part, for the text to the left of it has merged before.
    """
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    pieces = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    merges.sort(key=lambda pair: (-pieces["".join(pair)], -len(pair[0])))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _unigram(proto: Any) -> dict[str, Any]:
    scores = [piece.score for piece in proto.pieces if piece.type == _NORMAL]
    reserved = min(scores) * _LONGEST_RESERVED - 1e4
    rows = [
        [piece.piece, piece.score if piece.type == _NORMAL else reserved] for piece in proto.pieces
    ]
    unk_id = proto.trainer_spec.unk_id
    return {"type": "Unigram", "unk_id": unk_id, "vocab": rows, "byte_fallback": True}


def _isolate_unspellable(proto: Any) -> dict[str, Any] | None:
    """Cut a text at the characters of reserved names that no piece has.

    With such a character the name might cost less than its spelling; no piece crosses the cuts.
    """
    reserved = (p.piece for p in proto.pieces if p.type not in (_NORMAL, _USER_DEFINED))
    unknown = sorted(set(itertools.chain.from_iterable(reserved)) - _alphabet(proto))
    if not unknown:
        return None
    pattern = "[" + "".join(map(re.escape, unknown)) + "]"
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
