"""The tokenizer files of a Hugging Face folder: written, found, and proven to give our ids.

Independent of models.
"""

import json
import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.chats import TEMPLATE_NAME
from data.token_models import JsonModel
from data.tokenizer import Tokenizer
from data.tokenizer_json import special_tokens, tokenizer_json

JSON_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SENTENCEPIECE_NAME = "tokenizer.model"

_LEAST_SHARE = 0.8
"""Of a model's ids that its tokenizer has: the rest pads the vocabulary to a round size."""

COMPARED_TEXTS = 200
"""Of a tokenizer that is given beside a model's own."""
PROOF_TEXTS = 2000
"""Texts whose ids are compared before an export is published."""


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, max_seq_len: int, chat_template: str | None = None
) -> None:
    """Write the files of `AutoTokenizer`: our ids, with BOS before them.

    A SentencePiece model becomes a tokenizer.json, see `data.tokenizer_json`, and is copied beside
    it for llama.cpp. Names of special tokens in a text stay text then, as they do here. A
    tokenizer.json that was given is written unchanged, and transformers reads such names as tokens.

    Raises:
        ValueError: tokenizer.json has no exact form for the SentencePiece model.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer.model, JsonModel):
        content = tokenizer.model.content
        names = {"bos_token": tokenizer.model.bos_token, "eos_token": tokenizer.model.eos_token}
    else:
        content = tokenizer_json(tokenizer.serialized)
        names = special_tokens(tokenizer.serialized)
        config["split_special_tokens"] = True
        # For llama.cpp, whose conversion puts a space before every text unless this is False.
        config["add_prefix_space"] = content["normalizer"]["normalizers"][0]["type"] == "Prepend"
        (folder / SENTENCEPIECE_NAME).write_bytes(tokenizer.serialized)
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    (folder / CONFIG_NAME).write_text(json.dumps(config | names, indent=2) + "\n")
    if chat_template is not None:
        (folder / TEMPLATE_NAME).write_bytes(chat_template.encode())


def find_tokenizer(folder: Path, vocab_size: int, *, needed: bool = True) -> Path | None:
    """Return the tokenizer file of a Hugging Face folder.

    Its SentencePiece model where it has one of the model's size, from which the other file was
    made; else its tokenizer.json.

    Args:
        folder: The folder.
        vocab_size: Number of ids of its model.
        needed: Whether to refuse a folder that has neither, instead of returning None.

    Raises:
        ValueError: the folder has neither.
    """
    model = folder / SENTENCEPIECE_NAME
    if model.is_file() and Tokenizer(model).vocab_size == vocab_size:
        return model
    for path in (folder / JSON_NAME, model):
        if path.is_file():
            return path
    if not needed:
        return None
    raise ValueError(
        f"tokenizer: {folder} has no {JSON_NAME} and no {SENTENCEPIECE_NAME}, name one with"
        " --tokenizer"
    )


def check_tokenizer(tokenizer: Tokenizer, own: Path | None, vocab_size: int) -> None:
    """Refuse a tokenizer that a model was not trained with.

    Args:
        tokenizer: The one to use.
        own: File of the model's; None if there is none.
        vocab_size: Of the model.

    Raises:
        ValueError: It gives other ids than the model's own, or has far fewer than the model.
    """
    remedy = "give the one the model was trained with, or --other_tokenizer to take this one"
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer: {tokenizer.path} has {tokenizer.vocab_size} ids and the model "
            f"{vocab_size}, give the one it was trained with"
        )
    if own is None:
        if tokenizer.vocab_size < _LEAST_SHARE * vocab_size:
            raise ValueError(
                f"tokenizer: {tokenizer.path} has {tokenizer.vocab_size} ids and the model "
                f"{vocab_size}, {remedy}"
            )
        return
    other = Tokenizer(own)
    if tokenizer.fingerprint == other.fingerprint:
        return
    if tokenizer.vocab_size != other.vocab_size:
        raise ValueError(
            f"tokenizer: {tokenizer.path} has {tokenizer.vocab_size} ids and {own} "
            f"{other.vocab_size}, {remedy}"
        )
    for text in random_texts(COMPARED_TEXTS, seed=0):
        ours, theirs = (
            [each.bos_id, *each.encode(text), each.eos_id] for each in (tokenizer, other)
        )
        if ours != theirs:
            raise ValueError(
                f"tokenizer: {tokenizer.path} gives {text!r} other ids than {own}, {remedy}"
            )


def prove_same_ids(tokenizer: Tokenizer, folder: Path, *, overruled: bool = False) -> str:
    """Compare the ids of `PROOF_TEXTS` seeded random texts with those of the files in `folder`.

    Args:
        tokenizer: Ours.
        folder: The export.
        overruled: AutoTokenizer takes a class of its own for such a model, whatever
            tokenizer_config.json names; where its ids are others, PreTrainedTokenizerFast must do.

    Returns:
        What was compared, as a line of text.

    Raises:
        ValueError: the ids of a text differ.
    """
    try:
        return _compare(tokenizer, folder, *_reader(folder))
    except ValueError:
        if not overruled:
            raise
    found = _compare(tokenizer, folder, *_reader(folder, auto=False))
    return f"{found}; AutoTokenizer takes a class of its own for this model, which gives others"


def _compare(
    tokenizer: Tokenizer, folder: Path, encode: Callable[[str], list[int]], reader: str
) -> str:
    # A tokenizer.json that was given is kept as it is, also where it puts no BOS.
    bos = [] if isinstance(tokenizer.model, JsonModel) and not encode("") else [tokenizer.bos_id]
    unigram = b'"type": "Unigram"' in (folder / JSON_NAME).read_bytes()
    ties = 0
    for text in random_texts(PROOF_TEXTS, seed=0):
        ours, theirs = [*bos, *tokenizer.encode(text)], encode(text)
        if ours == theirs:
            continue
        if not (unigram and len(ours) == len(theirs) and sorted(ours) == sorted(theirs)):
            raise ValueError(
                f"tokenizer: {folder / JSON_NAME} gives {text!r} ids {theirs[:20]} where"
                f" {tokenizer.path} gives {ours[:20]}, so nothing was written; use another one"
            )
        ties += 1
    reader += "" if bos else f" (but for BOS, {tokenizer.bos_id}, which a program must put first)"
    rest = f" ({ties} of them but for ties of a unigram model)" if ties else ""
    return f"token ids of {PROOF_TEXTS} texts equal {reader}{rest}"


def _reader(folder: Path, *, auto: bool = True) -> tuple[Callable[[str], list[int]], str]:
    """Return a function that encodes a text, BOS first, and the name of its library."""
    if find_spec("transformers"):
        import transformers

        kind = transformers.AutoTokenizer if auto else transformers.PreTrainedTokenizerFast
        tokenizer = kind.from_pretrained(folder)
        name = "transformers'" + ("" if auto else " PreTrainedTokenizerFast")
        return lambda text: list(tokenizer(text)["input_ids"]), name
    import tokenizers

    plain = tokenizers.Tokenizer.from_file(str(folder / JSON_NAME))
    plain.encode_special_tokens = True
    return lambda text: list(plain.encode(text).ids), "tokenizers'"


_PARTS = (
    *(" ", "  ", "   ", " " * 7, " " * 16, " " * 33, "\n", "\r\n", "\t", "\t\t", "\x01", "\x7f"),
    *("\x85", "\u2028", "\u00a0", "\u3000", "\u2581", "\u2581\u2581", "\ufeff", "\ufffd", "\u0301"),
    *("e\u0301", "\u00e9", "\u65e5\u672c", "\U0001f389", "\U0001f469\u200d\U0001f467", "\ufb01"),
    *("<", "<0x0A>", "the", " the", "self", "return", "==", "----", "...", "a", "ab", "aba"),
    *("0", "12", "3.14", "__init__", "\\n", "\U0010ffff", "\u202e", "'s", "I'm"),
)


def random_texts(count: int, *, seed: int) -> Iterator[str]:
    """Yield the empty text and random ones: white space, words, emoji, any character there is."""
    draw = random.Random(seed)
    yield ""
    for _ in range(count - 1):
        yield "".join(
            draw.choice(_PARTS) if draw.random() < 0.8 else _any_character(draw)
            for _ in range(draw.choice((1, 2, 4, 8, 20)))
        )


def _any_character(draw: random.Random) -> str:
    return chr(draw.choice((draw.randrange(1, 0x300), draw.randrange(0xE000, 0x11000))))
