"""What fixes the bytes of a dataset, together with its input."""

import hashlib
import importlib.util
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data.chats import open_template
from data.row_layout import RowLayout
from data.shards import MAX_VOCAB_SIZE
from data.token_ids.preparation import holds_tokens
from data.token_ids.splitting import TokenOptions
from data.tokenizer import Tokenizer
from data.urls import is_url

_LEAST_TOKENS = 260
"""unk, BOS, EOS, 256 bytes and one character."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What fixes the bytes of a dataset, together with the input itself."""

    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH [PATH ...]")]
    """Files (.txt .md .html .jsonl .json .csv .tsv .parquet, source code; all but Parquet also in
    .gz .zst .bz2 .xz), folders (recursive, without hidden entries), globs, any of these by URL
    (s3:// gs:// hf:// https://), or the word embedded: the sources of the running Python and of
    torch, about 58 MB that need no download, or hf:NAME[:SPLIT[:CONFIG]]: a Hugging Face dataset, a
    folder that its save_to_disk wrote or a name on the hub, streamed once (split train if not
    given). JSON, tables and Parquet hold a document per row, other files one each. Or local token
    files (.bin .npy .tokens) and rows of token ids, see tokens_field."""
    tokenizer: Path | None = None
    """A SentencePiece model, or a Hugging Face tokenizer.json with its tokenizer_config.json beside
    it, which names BOS and EOS; not beside vocab_size."""
    vocab_size: int | None = None
    """Train a SentencePiece BPE model of this many tokens on a sample of 8 MB; not beside
    tokenizer."""
    validation_fraction: float = 0.01
    """Expected fraction of documents to hold out, chosen by a hash of their text; at least one
    document is, of a single document its end. Where they would hold more than twice this share of
    the text, large documents are not held out."""
    tokens: Annotated[TokenOptions, tyro.conf.arg(name="")] = field(default_factory=TokenOptions)
    """Inputs that hold token ids in place of text."""
    layout: Annotated[RowLayout, tyro.conf.arg(name="")] = field(default_factory=RowLayout)
    """Fields or columns that hold the text, a chat, or prompt and response."""
    shard_tokens: int = 50_000_000
    """End a shard with the document that reaches this many tokens."""
    duplicates: Literal["keep", "drop", "near"] = "keep"
    """drop: of documents with the same text, take the first alone; near: also of those that nearly
    have the same, see near_threshold. Needs the extra dedup."""
    near_threshold: float = 0.8
    """Documents are near duplicates if they have about this share of all their five words in a row
    in common, estimated by MinHash."""
    max_skipped_fraction: float = 0.1
    """Refuse the input when more of its documents than this fraction cannot be used. Empty
    documents and files of an unknown kind do not count. Changes no byte of a dataset."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = []
        if not all(self.input or ("",)):
            found.append("input: empty, name files or folders")
        if (self.tokenizer is None) == (self.vocab_size is None):
            found.append(
                f"tokenizer is {self.tokenizer} and vocab_size is {self.vocab_size},"
                " give exactly one of them"
            )
        if self.vocab_size is not None and not _LEAST_TOKENS <= self.vocab_size <= MAX_VOCAB_SIZE:
            found.append(f"vocab_size: {self.vocab_size}, give {_LEAST_TOKENS} to {MAX_VOCAB_SIZE}")
        found += self._token_problems()
        if not 0 < self.validation_fraction < 1:
            found.append(
                f"validation_fraction {self.validation_fraction} is not between 0 and 1, try 0.01"
            )
        found += self.layout.problems()
        if not 0 < self.near_threshold <= 1:
            found.append(f"near_threshold {self.near_threshold} is not in (0, 1], try 0.8")
        if self.duplicates == "near" and importlib.util.find_spec("rensa") is None:
            found.append("duplicates: rensa is not installed, pip install -e .[dedup]")
        if self.shard_tokens < 1:
            found.append(f"shard_tokens {self.shard_tokens} is below 1, give more")
        if not 0 <= self.max_skipped_fraction <= 1:
            found.append(
                f"max_skipped_fraction {self.max_skipped_fraction} is not between 0 and 1, try 0.1"
            )
        return found

    def opened(self) -> "PrepareConfig":
        """Return it with the template of chats, where the input is chats.

        Raises:
            ValueError: there is no such template.
        """
        layout = self.layout
        if not layout.messages or layout.template:
            return self
        tokenizer = Tokenizer(self.tokenizer) if self.tokenizer else None
        template = open_template(tokenizer, layout.chat_template)
        return replace(self, layout=replace(layout, template=template))

    def _token_problems(self) -> list[str]:
        if not self.reads_tokens:
            given = self.tokens.given()
            kind = "text" if self._exists else "missing"
            return [f"{name}: for token files alone, but the input is {kind}" for name in given]
        found = []
        if self.vocab_size is not None:
            found.append("vocab_size trains a tokenizer on text, of token ids name the tokenizer")
        if self.tokens.tokens_field:
            names = self.tokens.given().keys() - {"tokens_field"}
            kind = "for token files alone, but tokens_field names rows"
            found += [f"{name}: {kind}" for name in sorted(names)]
        if self.layout.is_learnt_in_part or self.duplicates != "keep":
            found.append("messages, response and duplicates: for text alone, not for token ids")
        return found

    @property
    def _exists(self) -> bool:
        return is_url(self.input[0]) or bool(glob(self.input[0], recursive=True))

    @property
    def reads_tokens(self) -> bool:
        """Whether the input holds token ids.

        Raises:
            ValueError: some of it does.
        """
        return holds_tokens(self.input, self.tokens)

    def arguments(self) -> dict[str, object]:
        """Return the arguments for `dataset.json`: the tokenizer by its hash, the rest as given."""
        layout = self.opened().layout
        given: dict[str, object] = {
            "input": list(self.input),
            "tokenizer": self.tokenizer and Tokenizer(self.tokenizer).fingerprint,
            "vocab_size": self.vocab_size,
            "validation_fraction": self.validation_fraction,
            "text_field": layout.text_field,
            "shard_tokens": self.shard_tokens,
        }
        given |= self.tokens.given()
        if layout.response:
            given |= {"prompt": layout.prompt, "response": layout.response}
        if layout.template:
            digest = hashlib.sha256(layout.template.source.encode()).hexdigest()
            given |= {"messages": layout.messages, "chat_template": digest}
        if self.duplicates != "keep":
            given["duplicates"] = self.duplicates
        if self.duplicates == "near":
            given["near_threshold"] = self.near_threshold
        return given
