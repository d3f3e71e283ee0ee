"""Text to token ids and back, by a SentencePiece model or a Hugging Face `tokenizer.json`.

A tokenizer of `train_tokenizer` is lossless: `decode(encode(text)) == text` for every text but one
character, U+2581, which SentencePiece itself uses to write a space and decodes as a space.
Independent of documents, shards and models.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path

import sentencepiece

from data.shards import MAX_VOCAB_SIZE
from data.token_models import (
    JsonModel,
    SentencePieceModel,
    TokenModel,
    is_json,
    with_special_tokens,
)

# Text is encoded in pieces of at least this many characters that end at white space: one call on
# a long string is up to four times slower per byte, one call per line is slower again.
_PIECE_CHARS = 1000

# A longer piece is cut anyway: SentencePiece needs about 60 bytes of memory per byte of text.
_LONGEST_PIECE_CHARS = 65536

_BEFORE_SPACES = re.compile(r"(?<=[^ ]) (?=.)", re.DOTALL)

# The patterns that cut text before its merges, in a tokenizer.json, all cut here.
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")

# SentencePiece leaves out training lines longer than its limit, so longer lines are cut here.
_TRAINING_LINE_CHARS = 4096

_NO_PIECE = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A tokenizer, loaded from one file; pickles as the path of that file.

    Args:
        path: a SentencePiece model, or a tokenizer.json with its tokenizer_config.json beside it,
            with an EOS id, which is BOS too where there is none.

    Raises:
        ValueError: the file is missing, is no tokenizer, or has no EOS.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(
                f"tokenizer {self.path} is not a file, give a SentencePiece .model file or a"
                " tokenizer.json"
            )
        self.serialized = with_special_tokens(self.path)
        """The bytes to keep: the file itself, or the one file a tokenizer.json becomes."""
        self.fingerprint = hashlib.sha256(self.serialized).hexdigest()
        """sha256 of `serialized`, in hex."""
        try:
            self.model: TokenModel = self._load()
            pieces = self.model.pieces()
        except ValueError as error:
            raise ValueError(f"tokenizer {self.path} {error}") from error
        self.vocab_size = self.model.vocab_size
        self.ids = self.model.ids
        """The ids that have a piece."""
        self.special = self.model.special
        """Ids by name of the tokens that no text is encoded as; chat templates write them."""
        self.eos_id = self.model.eos_id
        self.bos_id = self.model.bos_id if self.model.bos_id >= 0 else self.eos_id
        if self.eos_id < 0 or self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"tokenizer {self.path} has eos_id {self.eos_id} and {self.vocab_size} ids, give a"
                f" model with EOS and at most {MAX_VOCAB_SIZE} ids"
            )
        self._spaces = _BETWEEN_WORDS if isinstance(self.model, JsonModel) else _BEFORE_SPACES
        self._splits_at_newlines = self._newlines_stand_alone(pieces)
        self._dropped_at_spaces = self._dropped_when_cut_at_spaces(pieces)

    def _load(self) -> TokenModel:
        kind = JsonModel if is_json(self.serialized) else SentencePieceModel
        return kind(self.serialized)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Path]]:
        """Pickle as the path, so that another process loads the file itself."""
        return Tokenizer, (self.path,)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without BOS and EOS."""
        return list(chain.from_iterable(self.encode_pieces(text)))

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of `text`, a piece of the text at a time, in bounded memory.

        A piece ends after a newline or, where none follows for 65536 characters, before a space.
        This changes no id (but that a unigram model may break a tie another way), for no token
        holds such a newline or crosses such a space; a model that has such tokens is cut at the
        other kind alone, or at neither. Only 65536 characters without either are cut at their end,
        which may change the ids beside the cut (and a model with a dummy prefix, such as Llama
        2's, inserts a space).
        """
        start = 0
        while start < len(text):
            end, following = self._cut(text, start)
            yield self.model.encode(text[start:end])
            start = following

    def _cut(self, text: str, start: int) -> tuple[int, int]:
        """Return the end of the piece from `start`, and the start of the next one."""
        limit = min(start + _LONGEST_PIECE_CHARS, len(text))
        if self._splits_at_newlines:
            newline = text.find("\n", start + _PIECE_CHARS, limit)
            if newline >= 0:
                return newline + 1, newline + 1
        if self._dropped_at_spaces is not None:
            space = self._spaces.search(text, start + _PIECE_CHARS, limit)
            if space:
                return space.start(), space.start() + self._dropped_at_spaces
        return limit, limit

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`; BOS and EOS are left out.

        Torn UTF-8 becomes U+FFFD, and so does each id that has no piece, as a model has whose
        vocabulary is larger than its tokenizer's.
        """
        texts = []
        for known, group in groupby(ids, self.ids.__contains__):
            run = [*group]
            texts.append(self.model.decode(run) if known else _NO_PIECE * len(run))
        return "".join(texts)

    def _newlines_stand_alone(self, pieces: list[str]) -> bool:
        """Whether text cut after any newline encodes to the same ids as the whole.

        False for a model with a token that holds a newline, a dummy prefix (Llama 2's has one),
        or a normalisation that folds white space.
        """
        if any("\n" in piece for piece in pieces):
            return False
        probe = "a \n  b\n\n\tc \n"
        lines = chain.from_iterable(map(self.model.encode, probe.splitlines(keepends=True)))
        return bool(self.model.encode(probe) == list(lines))

    def _dropped_when_cut_at_spaces(self, pieces: list[str]) -> int | None:
        """Return the number of spaces to drop when text is cut before spaces: 0, 1 or None.

        A dummy prefix adds one. None: a cut there changes ids, for a token may cross it.
        """
        if any(self._spaces.search(piece) for piece in pieces):
            return None
        whole, first = map(self.model.encode, ("a  b", "a"))
        for dropped, rest in enumerate(("  b", " b")):
            if whole == first + self.model.encode(rest):
                return dropped
        return None


def train_tokenizer(documents: Iterable[str], vocab_size: int, output: Path) -> None:
    """Train a lossless SentencePiece BPE model on all of `documents` and write it to `output`.

    Ids: unk 0, BOS 1, EOS 2, then 256 bytes, then merges, then characters. Whatever has no token
    of its own, newline and tab among them, falls back to bytes. The same documents give the same
    file. Takes about 0.3 s per MB of text; the caller bounds the text.

    Raises:
        ValueError: the text is too small or too varied for `vocab_size`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _TRAINING_LINE_CHARS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain_training_error(str(error), vocab_size)) from error
    output.write_bytes(model.getvalue())


def _training_lines(documents: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the documents, long ones in parts, without their newlines."""
    for text in documents:
        for line in text.split("\n"):
            for start in range(0, len(line), _TRAINING_LINE_CHARS):
                yield line[start : start + _TRAINING_LINE_CHARS]


def _explain_training_error(message: str, vocab_size: int) -> str:
    """Turn SentencePiece's message into: field, value, remedy."""
    if largest := re.search(r"too high .*<= (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too large for this text,"
            f" give more text or a vocab_size of at most {largest[1]}"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small for the characters of this text,"
            f" give a vocab_size above {smallest[1]}"
        )
    return f"vocab_size {vocab_size}: SentencePiece cannot train on this text ({message.strip()})"
