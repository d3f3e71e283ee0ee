"""Hugging Face folders to and from checkpoints of ours: `python -m models.convert --help`.

The output is read back and compared before it is published under its name. The one file of `models`
that imports `data`: a model is converted together with its tokenizer.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.chats import find_template
from data.command_line import run_command
from data.hugging_face import (
    check_tokenizer,
    find_tokenizer,
    prove_same_ids,
    write_tokenizer,
)
from data.tokenizer import Tokenizer
from data.urls import Url
from models.checkpoint_copy import local_checkpoint
from models.checkpoint_format import TOKENIZER
from models.config import LlamaConfig
from models.conversion.families import family_of
from models.conversion.model_card import write_model_card
from models.conversion.options import DESCRIPTION, Options
from models.conversion.plain_checkpoint import read_checkpoint, write_checkpoint
from models.conversion.proof import (
    our_logits,
    probe,
    prove_same_bits,
    prove_same_logits,
    transformers_logits,
)
from models.conversion.pruning import drop_own_exits, layers_to_keep, prune
from models.conversion.publishing import published
from models.conversion.safetensors_folder import (
    read_config,
    read_eos_ids,
    read_weights,
    write_model,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as it was read, with its history."""

    config: LlamaConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer
    chat_template: str | None
    """That of the tokenizer, if it has one."""
    logits: Tensor | None
    """Transformers' logits of the whole model; None if it did not read it."""
    training: dict[str, Any]
    """The resolved configuration it was trained with; {} if unknown."""
    step: int
    data_fingerprint: str
    tokens: int | None
    """Tokens read in training; None if unknown."""
    checkpoint: Path | None
    """The checkpoint of these very weights; None if there is none."""
    note: str = ""
    """How the model was changed after it was read."""
    left_out: tuple[str, ...] = ()
    """Properties of the input that the output will not have."""


def read_source(options: Options) -> Source:
    """Read the input: weights, shape and tokenizer.

    Raises:
        ValueError: If the input cannot be used.
    """
    dtype = _DTYPES[options.dtype] if options.dtype else None
    if options.source == "hf":
        source = read_hugging_face(options, dtype)
    else:
        checkpoint = local_checkpoint(options.input, "input")
        own = checkpoint / TOKENIZER
        manifest, state = read_checkpoint(checkpoint, options.weights)
        tokens = manifest.state.get("tokens")
        source = Source(
            config=manifest.model,
            state=state,
            tokenizer=choose_tokenizer(options, own, manifest.model.vocab_size),
            chat_template=find_template(options.tokenizer, own),
            logits=None,
            training=manifest.config,
            step=manifest.step,
            data_fingerprint=manifest.data_fingerprint,
            tokens=tokens if isinstance(tokens, int) else None,
            checkpoint=checkpoint,
        )
    if source.tokenizer.vocab_size > source.config.vocab_size:
        raise ValueError(
            f"tokenizer: {source.tokenizer.path} has {source.tokenizer.vocab_size} ids and the "
            f"model {source.config.vocab_size}, give the one it was trained with"
        )
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in source.state.items()}
        source = replace(source, state=state)
    return source


def choose_tokenizer(options: Options, own: Path | None, vocab_size: int) -> Tokenizer:
    """Return the tokenizer the user names, or the input's `own` where there is none.

    Raises:
        ValueError: It is not the one of the input, and that is not allowed.
    """
    tokenizer = Tokenizer(options.tokenizer or own or Path())
    if options.tokenizer is not None and not options.other_tokenizer:
        check_tokenizer(tokenizer, own, vocab_size)
    return tokenizer


def read_hugging_face(options: Options, dtype: torch.dtype | None) -> Source:
    """Read a Hugging Face folder, its weights as they are stored.

    Args:
        options: Its path, and that of a tokenizer.
        dtype: transformers rounds the weights to it before it computes the logits.
    """
    folder = options.input
    if isinstance(folder, Url):
        raise ValueError(f"input: {folder}, copy the Hugging Face folder here and give its path")
    config = read_config(folder)
    own = find_tokenizer(folder, config.vocab_size, needed=options.tokenizer is None)
    tokenizer = choose_tokenizer(options, own, config.vocab_size)
    lost = left_out(folder, tokenizer)  # Before transformers reads the same files.
    return Source(
        config=config,
        state=read_weights(folder, config),
        tokenizer=tokenizer,
        chat_template=find_template(options.tokenizer, folder / TOKENIZER),
        logits=transformers_logits(folder, config, dtype),
        training={},
        step=0,
        data_fingerprint="",
        tokens=None,
        checkpoint=None,
        left_out=tuple(lost),
    )


def left_out(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Return a line for each property of a Hugging Face folder that is not kept."""
    others = ", ".join(map(str, sorted(read_eos_ids(folder) - {tokenizer.eos_id})))
    ends = f"a text ends with the tokenizer's {tokenizer.eos_id} alone"
    return [f"eos_token_id {others}: {ends}"] if others else []


def change(source: Source, options: Options) -> Source:
    """Return the model to write: some layers of the source, with another context.

    Raises:
        ValueError: If it has no such layers, the context is too short, or its exits have parts of
            their own that the output's format cannot hold.
    """
    if options.drop_own_exits:
        source = leave_own_exits(source)
    if options.target == "hf" and source.config.own_exits:
        raise ValueError(
            f"own_exits: {source.config.own_exits} have parts that a Hugging Face Llama cannot "
            "hold, give --drop_own_exits to write the model without them"
        )
    if options.layers is not None:
        source = keep_layers(source, layers_to_keep(options.layers, source.config.n_layers))
    if options.first_layers is not None:
        if not 1 <= options.first_layers <= source.config.n_layers:
            raise ValueError(
                f"first_layers: {options.first_layers}, give 1 to {source.config.n_layers}"
            )
        source = keep_layers(source, list(range(options.first_layers)))
    if options.max_seq_len is not None:
        config = replace(source.config, max_seq_len=options.max_seq_len)
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        same = probe(config).shape == probe(source.config).shape
        source = replace(source, config=config, logits=source.logits if same else None)
    if not source.training:
        return source
    return replace(source, training=source.training | {"model": asdict(source.config)})


def keep_layers(source: Source, keep: list[int]) -> Source:
    """Return the model of the layers `keep` alone, see `prune`."""
    config, state = prune(source.config, source.state, keep)
    note = f"It has layers {', '.join(map(str, keep))} of a model of {source.config.n_layers}."
    note = f"{source.note} {note}".lstrip()
    return replace(source, config=config, state=state, note=note, logits=None, checkpoint=None)


def leave_own_exits(source: Source) -> Source:
    """Return the model without its exits' own parts, see `drop_own_exits`."""
    exits = ", ".join(map(str, source.config.own_exits))
    config, state = drop_own_exits(source.config, source.state)
    note = f"Its exits after {exits} layers had parts of their own, which are left out here."
    return replace(source, config=config, state=state, note=note, checkpoint=None)


def write_hugging_face(model: Source, folder: Path, max_shard_bytes: int) -> list[str]:
    """Write a Hugging Face folder and return what was proven of it."""
    write_model(
        folder,
        model.config,
        model.state,
        bos_id=model.tokenizer.bos_id,
        eos_id=model.tokenizer.eos_id,
        max_shard_bytes=max_shard_bytes,
    )
    context, template = model.config.max_seq_len, model.chat_template
    write_tokenizer(model.tokenizer, folder, max_seq_len=context, chat_template=template)
    write_model_card(
        folder,
        model.config,
        training=model.training,
        step=model.step,
        tokens=model.tokens,
        checkpoint=model.checkpoint,
        note=model.note,
    )
    config = read_config(folder)
    assert config == model.config
    state = read_weights(folder, config)
    proven = [prove_same_bits(model.state, state)]
    theirs = transformers_logits(folder, config, None)
    found = our_logits(config, state) if theirs is None else theirs
    reader = (
        "ours, read back (transformers is not installed)" if theirs is None else "transformers'"
    )
    proven.append(prove_same_logits(expected_logits(model), found, reader=reader))
    overruled = family_of(config).tokenizer_class != "AutoTokenizer"
    return [*proven, prove_same_ids(model.tokenizer, folder, overruled=overruled)]


def write_skipstone(model: Source, folder: Path, name: str) -> list[str]:
    """Write a checkpoint of weights alone and return what was proven of it.

    Args:
        model: The model to write.
        folder: An empty folder.
        name: Of the run, if its training configuration has none.
    """
    write_checkpoint(
        folder,
        model.config,
        model.state,
        step=model.step,
        tokenizer=model.tokenizer.serialized,
        config={"name": name} | model.training,
        data_fingerprint=model.data_fingerprint,
        chat_template=model.chat_template,
    )
    manifest, state = read_checkpoint(folder)
    assert manifest.model == model.config
    assert Tokenizer(folder / TOKENIZER).fingerprint == manifest.tokenizer_fingerprint
    reader = "ours" if model.logits is None else "transformers' of the input"
    return [
        prove_same_bits(model.state, state),
        prove_same_logits(expected_logits(model), our_logits(manifest.model, state), reader=reader),
    ]


def expected_logits(model: Source) -> Tensor:
    """Return the logits that the written model must have: transformers', or else our own."""
    return our_logits(model.config, model.state) if model.logits is None else model.logits


def convert(options: Options) -> None:
    """Convert, and print what was proven of the result."""
    if problems := options.problems():
        raise ValueError("; ".join(problems))
    with published(options.output) as folder:
        model = change(read_source(options), options)
        if options.target == "hf":
            proven = write_hugging_face(model, folder, options.max_shard_bytes)
        else:
            proven = write_skipstone(model, folder, options.output.name)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.state.values()})
    print(f"{options.output}: {model.config.n_layers} layers, {' and '.join(dtypes)}")
    for line in proven:
        print(f"  {line}")
    for line in model.left_out:
        print(f"  left out: {line}")


def main() -> None:
    run_command(Options, convert, prog="python -m models.convert", description=DESCRIPTION)


if __name__ == "__main__":
    main()
