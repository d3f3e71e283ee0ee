"""A checkpoint of weights alone: read as it is stored, and written by one process.

`inference` decodes from it and training starts from it (`checkpoint.init_from`); a run cannot
resume from it. With `checkpoint_format` the only file outside `train/` that imports DCP.
"""

import platform
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from models.checkpoint_format import (
    CHAT_TEMPLATE,
    TOKENIZER,
    Manifest,
    file_entry,
    verify,
)
from models.config import LlamaConfig
from models.llama import Llama
from models.tensor_reader import (
    TensorReader,
    Weights,
    check_tensors,
    load_tensors,
    refuse_without_average,
)


def read_checkpoint(
    checkpoint: Path, weights: Weights = "model"
) -> tuple[Manifest, dict[str, Tensor]]:
    """Return a checkpoint's manifest and its parameters, in the dtypes they are stored in.

    Raises:
        ValueError: If a file is missing or damaged, or the tensors do not fit the manifest.
    """
    manifest = verify(checkpoint)
    with torch.device("meta"):
        expected = Llama(manifest.model).state_dict()
    reader = TensorReader(checkpoint)
    refuse_without_average(checkpoint, weights)
    stored = check_tensors(reader, f"{weights}.", expected)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
    }
    load_tensors(reader, {weights: state})
    return manifest, {name: state[name] for name in expected}


def write_checkpoint(
    checkpoint: Path,
    model: LlamaConfig,
    state: dict[str, Tensor],
    *,
    step: int,
    tokenizer: bytes,
    config: dict[str, Any],
    data_fingerprint: str,
    chat_template: str | None = None,
) -> None:
    """Write a checkpoint into an empty folder, the manifest last.

    Args:
        checkpoint: The folder.
        model: The shape of the model.
        state: Its parameters; they are written in the dtypes they have.
        step: Optimizer steps the weights were trained for, 0 if unknown.
        tokenizer: Content of the tokenizer's file.
        config: The configuration the weights were trained with; {} if unknown.
        data_fingerprint: Of the data they were trained on; empty if unknown.
        chat_template: That of the tokenizer, if it has one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is intended here
        save({"model": state}, storage_writer=FileSystemWriter(checkpoint), no_dist=True)
    (checkpoint / TOKENIZER).write_bytes(tokenizer)
    if chat_template is not None:
        (checkpoint / CHAT_TEMPLATE).write_bytes(chat_template.encode())
    files = {path.name: file_entry(path) for path in sorted(checkpoint.iterdir())}
    Manifest(
        step=step,
        model=model,
        config=config,
        tokenizer_fingerprint=str(files[TOKENIZER]["sha256"]),
        data_fingerprint=data_fingerprint,
        world_size=1,
        versions={"python": platform.python_version(), "torch": version("torch")},
        files=files,
    ).write(checkpoint)
