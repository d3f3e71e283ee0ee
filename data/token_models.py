"""The two kinds of tokenizer file: a SentencePiece model, and Hugging Face's `tokenizer.json`.

Each is read from one string of bytes. Independent of files, documents and where text is cut.
"""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from data.foreign_json import MAX_BYTES, parse_object, read_object, take, typed

_CONFIG = "tokenizer_config.json"

# How vocabularies write white space: bytes as GPT-2 does, or as SentencePiece.
_WRITTEN = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\n"})

_PANIC = "PanicException"
"""What a panic of a library in Rust raises, which is no Exception and has no module to import."""


class TokenModel(Protocol):
    """Encodes text as ids and decodes it."""

    vocab_size: int
    """One more than the largest id."""
    ids: Container[int]
    """The ids that have a piece."""
    bos_id: int
    eos_id: int
    """Negative where there is none."""
    special: Mapping[str, int]
    """Ids by name of the tokens that no text is encoded as."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS; names of special tokens are text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids, each with a piece; BOS and EOS are left out."""
        ...

    def pieces(self) -> list[str]:
        """Return every token's text, white space as itself."""
        ...


class SentencePieceModel:
    """A SentencePiece model.

    Raises:
        ValueError: the bytes are no such model.
    """

    def __init__(self, serialized: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(serialized)
        except RuntimeError as error:
            raise ValueError("is not a SentencePiece model, give one (a .model file)") from error
        self.vocab_size = int(self._processor.vocab_size())
        self.ids: Container[int] = range(self.vocab_size)
        self.bos_id = int(self._processor.bos_id())
        self.eos_id = int(self._processor.eos_id())
        controls = filter(self._processor.is_control, range(self.vocab_size))
        self.special: Mapping[str, int] = {self._processor.id_to_piece(i): i for i in controls}

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))

    def pieces(self) -> list[str]:
        pieces = self._processor.id_to_piece(list(range(self.vocab_size)))
        return [piece.replace("\u2581", " ") for piece in pieces]


class JsonModel:
    """A `tokenizer.json` with the names of its BOS and EOS, as `with_special_tokens` makes it.

    Raises:
        ValueError: the bytes are no such file, or name no such tokens.
    """

    def __init__(self, serialized: bytes) -> None:
        import tokenizers  # Imported here: only this kind of file needs it.

        try:
            content = parse_object(serialized)
            self.bos_token: str = take(content, "bos_token", str)
            self.eos_token: str = take(content, "eos_token", str)
            self.content: dict[str, Any] = take(content, "tokenizer", dict[str, Any])
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self.content))
        except BaseException as error:  # The library raises bare Exceptions, and its panics.
            if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                raise
            raise ValueError(f"is not a tokenizer.json ({str(error):.200}), give one") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # A text may not write BOS.
        self.ids: Container[int] = {*self._tokenizer.get_vocab().values()}
        self.vocab_size = max(self.ids) + 1
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special: Mapping[str, int] = {
            token.content: number for number, token in added if token.special
        }
        self.bos_id, self.eos_id = map(self._id, (self.bos_token, self.eos_token))

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"has no token {token!r}, which its {_CONFIG} names, mend that")
        return int(found)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def pieces(self) -> list[str]:
        return [piece.translate(_WRITTEN) for piece in self._tokenizer.get_vocab()]

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every piece as the file writes it, white space and bytes included."""
        return dict(self._tokenizer.get_vocab())


def is_json(serialized: bytes) -> bool:
    """Whether these bytes are JSON: a SentencePiece model never begins like this."""
    return serialized.lstrip().startswith(b"{")


def with_special_tokens(path: Path) -> bytes:
    """Return a tokenizer's file as it is kept in datasets and checkpoints, one file by itself.

    A `tokenizer.json` does not name BOS and EOS, the `tokenizer_config.json` beside it does: they
    become one JSON {"bos_token", "eos_token", "tokenizer": content}. Any other file is returned as
    it is.

    Where no BOS is named, EOS begins a document too.

    Raises:
        ValueError: a tokenizer.json has no such file beside it, or that names no EOS.
    """
    with path.open("rb") as file:
        serialized = file.read(MAX_BYTES + 1)
    if len(serialized) > MAX_BYTES:
        raise ValueError(f"tokenizer {path} has more than {MAX_BYTES} bytes, give another")
    if not is_json(serialized):
        return serialized
    try:
        content = parse_object(serialized)
    except ValueError as error:
        raise ValueError(
            f"tokenizer {path} is not a tokenizer.json ({error}), download it again"
        ) from None
    if "tokenizer" in content:
        return serialized
    config_path = path.parent / _CONFIG
    try:
        config = read_object(config_path)
        named = {name: _token_name(config, name) for name in ("bos_token", "eos_token")}
    except FileNotFoundError:
        raise ValueError(
            f"tokenizer {path} names no bos_token and eos_token, put its {_CONFIG} beside it"
        ) from None
    except ValueError as error:
        raise ValueError(f"tokenizer: {config_path}: {error}, mend or download it again") from None
    if named["eos_token"] is None:
        raise ValueError(
            f"tokenizer: {config_path}: eos_token is none, name the token of {path.name} that ends "
            "a text"
        )
    names = named | {"bos_token": named["bos_token"] or named["eos_token"]}
    return json.dumps(names | {"tokenizer": content}).encode()


def _token_name(config: dict[str, Any], name: str) -> str | None:
    """Return the token of this name; None where there is none."""
    token = config.get(name)
    if isinstance(token, dict):
        return str(take(token, "content", str))
    return typed(token, str | None, name) or None
