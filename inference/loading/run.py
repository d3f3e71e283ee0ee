"""A trained run, opened for decoding: model, tokenizer, manifest and held-out text."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import Dataset
from data.tokenizer import Tokenizer
from data.url_dataset import dataset_at
from data.urls import Location, location
from inference.engine.compiled import compile_layers
from inference.engine.cuda_graphs import RoundGraphs, round_graphs
from inference.engine.fused import fuse
from inference.engine.products import can_pack, pack
from inference.loading.quantized import BITS, Bits, quantize_layers
from inference.loading.vocabulary import mask_missing
from models.checkpoint_copy import local_checkpoint
from models.checkpoint_format import (
    TOKENIZER,
    Manifest,
    file_entry,
    load_model,
    read_manifest,
)
from models.llama import Llama
from models.tensor_reader import Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPE_SYNONYMS = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Run:
    """One checkpoint of a run, in memory."""

    checkpoint: Path
    manifest: Manifest
    tokenizer: Tokenizer
    model: Llama
    graphs: RoundGraphs | None = None
    """CUDA graphs of rounds, kept from one generation to the next; None: no graphs."""

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence in training, or 2048 where that is not known, as they fit."""
        context = self.model.config.max_seq_len
        return min(self.manifest.setting("data.seq_len", int, 2048), context)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a continuation: EOS."""
        return (self.tokenizer.eos_id,)

    def open_data(self, path: Location | None) -> Dataset:
        """Open the dataset at `path`, or the one the run was trained on.

        Raises:
            ValueError: It is no dataset, or of another tokenizer; or the run names none.
        """
        known = self.manifest.setting("data.path", str, None)
        if path is None and known is None:
            raise ValueError(f"data: {self.checkpoint} names none, give --data")
        folder = location(known) if path is None else path
        dataset = dataset_at(folder)
        if dataset.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                f"data: {folder} was made with tokenizer {dataset.tokenizer_fingerprint[:12]} but "
                f"{self.checkpoint} has {self.tokenizer.fingerprint[:12]}, give --data made with "
                f"--tokenizer {self.tokenizer.path}"
            )
        return dataset


def load_run(
    path: Location,
    *,
    device: str = "auto",
    dtype: str | None = None,
    quantize: Bits | None = None,
    weights: Weights = "model",
    packed: bool = True,
    compiled: bool = False,
) -> Run:
    """Load the newest checkpoint of a run folder, or the checkpoint folder `path`.

    Args:
        path: A run folder or a checkpoint folder, or its URL.
        device: "auto" (CUDA if there is a device, else CPU) or a name of torch's.
        dtype: A name in DTYPES; None means bfloat16 on CUDA and float32 on a CPU.
        quantize: Bits of the matrices of layers, and of exits of their own; None: plain.
        weights: Those of the last step, or their moving average.
        packed: Fuse the layers and pack their weights for decoding, where the machine can.
        compiled: Compile the layers, and keep rounds as graphs on a device that has them.

    Raises:
        ValueError: There is no checkpoint, it is damaged, its tokenizer is not the manifest's, or
            an option is none of its values.
    """
    _check_names(dtype, quantize)
    target = choose_device(device)
    if dtype is None:
        dtype = "bfloat16" if target.type == "cuda" else "float32"
    checkpoint, manifest, tokenizer, model = _read_newest(path, target, DTYPES[dtype], weights)
    if packed:
        fuse(model, compiled=compiled)
    if quantize is not None:
        quantize_layers(model, quantize)
    if packed and can_pack(model):
        pack(model)
    mask_missing(model, tokenizer.ids)
    graphs = None
    if compiled:
        compile_layers(model)
        graphs = round_graphs(target)
    return Run(checkpoint, manifest, tokenizer, model, graphs)


def _read_newest(
    path: Location, device: torch.device, dtype: torch.dtype, weights: Weights
) -> tuple[Path, Manifest, Tokenizer, Llama]:
    """Read a run's newest checkpoint; a training that goes on may delete it meanwhile."""
    checkpoint = local_checkpoint(path)
    while True:
        try:
            manifest = read_manifest(checkpoint)
            tokenizer = _open_tokenizer(checkpoint / TOKENIZER, manifest)
            model = load_model(checkpoint, device=device, dtype=dtype, weights=weights)
            return checkpoint, manifest, tokenizer, model
        except (ValueError, OSError):
            newest = local_checkpoint(path)
            if newest == checkpoint:
                raise
            checkpoint = newest


def _open_tokenizer(file: Path, manifest: Manifest) -> Tokenizer:
    """Open a checkpoint's tokenizer; raise a ValueError where it is not that of the weights."""
    fingerprint = file_entry(file)["sha256"] if file.is_file() else "missing"
    if fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(
            f"tokenizer: {file} is {str(fingerprint)[:12]} but the checkpoint was trained with "
            f"{manifest.tokenizer_fingerprint[:12]}, put that tokenizer.model back"
        )
    tokenizer = Tokenizer(file)
    if tokenizer.vocab_size > manifest.model.vocab_size:
        raise ValueError(
            f"tokenizer: {file} has {tokenizer.vocab_size} ids and the model "
            f"{manifest.model.vocab_size}, put the tokenizer of its training back"
        )
    return tokenizer


def _check_names(dtype: str | None, quantize: str | None) -> None:
    """Raise a ValueError where a name is none of the known ones."""
    if dtype is not None and dtype not in DTYPES:
        meant = _DTYPE_SYNONYMS.get(dtype)
        hint = f"did you mean {meant}?" if meant else f"give one of {', '.join(DTYPES)}"
        raise ValueError(f"dtype: {dtype}, {hint}")
    if quantize is not None and quantize not in BITS:
        raise ValueError(f"quantize: {quantize}, give one of {', '.join(BITS)}")


def choose_device(name: str) -> torch.device:
    """Return the device of this name, or for "auto" the best there is.

    Raises:
        ValueError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except (RuntimeError, AssertionError):
        raise ValueError(f"device: {name} is not available, give auto or cpu") from None
    return device
