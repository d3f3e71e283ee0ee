"""What a checkpoint folder holds, and how it is read: verified first, without running any code.

A checkpoint is a folder of torch.distributed.checkpoint (DCP) shards that hold tensors only,
`tokenizer.model`, and, written last, `manifest.json` with everything else: a folder without it is
no checkpoint. Imports the reader of DCP alone; `conversion/plain_checkpoint.py` has its writer.
"""

import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from models.config import LlamaConfig, config_from_dict
from models.fingerprint import compute_fingerprint
from models.llama import Llama

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint that is not a tensor."""

    step: int
    """Optimizer steps done; training goes on with t = step."""
    model: LlamaConfig
    """The shape of the model."""
    config: dict[str, Any]
    """The resolved training configuration, as in the run's `config.json`."""
    tokenizer_fingerprint: str
    """sha256 of the tokenizer's model file."""
    data_fingerprint: str
    """Fingerprint of the token shards trained on."""
    world_size: int
    """Number of ranks that wrote it."""
    versions: dict[str, str]
    """Versions of the libraries that wrote it."""
    files: dict[str, dict[str, int | str]]
    """{file name: {"bytes": size, "sha256": digest}} of every other file in the folder."""
    state: dict[str, Any] = field(default_factory=dict)
    """Further state of the training run, as JSON."""

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, atomically, and flush it to the disk."""
        fields = {"format": _FORMAT} | asdict(self)
        text = json.dumps(fields | {"sha256": _digest(fields)}, indent=1)
        aside = folder / (MANIFEST + ".tmp")
        with aside.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / MANIFEST)


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint folder.

    Raises:
        ValueError: If there is none, it is damaged, or another version wrote it.
    """
    path = checkpoint / MANIFEST
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"checkpoint: {checkpoint} has no {MANIFEST}, name a finished checkpoint"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"checkpoint: {path} is damaged ({error}), use another checkpoint"
        ) from None
    try:
        if fields.pop("sha256", None) not in (None, _digest(fields)):  # None: an older one
            raise ValueError("its sha256 is another")
        if fields.pop("format") != _FORMAT:
            raise ValueError("another format")
        manifest = Manifest(**(fields | {"model": config_from_dict(fields["model"])}))
        whole = all(entry.keys() == {"bytes", "sha256"} for entry in manifest.files.values())
        if not (whole and isinstance(manifest.step, int) and isinstance(manifest.state, dict)):
            raise ValueError("fields of another type")
        return manifest
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {path} is no manifest of format {_FORMAT} ({error}), use another "
            "checkpoint or the version that wrote it"
        ) from None


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def file_entry(path: Path) -> dict[str, int | str]:
    """Return a file's size in bytes and its sha256, as the manifest lists them."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def verify(checkpoint: Path) -> Manifest:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        ValueError: Naming the file that is missing, cut short, changed or not listed.
    """
    manifest = check_listing(checkpoint)
    check_content(checkpoint, manifest, manifest.files)
    return manifest


def check_listing(checkpoint: Path) -> Manifest:
    """Compare the files that are there with those the manifest lists: plain files of that size.

    Raises:
        ValueError: Naming the file that is missing, cut short, elsewhere or not listed.
    """
    manifest = read_manifest(checkpoint)
    present = sorted(checkpoint.iterdir())
    if links := [path for path in present if path.is_symlink()]:
        raise ValueError(f"checkpoint: {links[0]} is a link, put the file itself there")
    if unlisted := sorted({path.name for path in present} - {MANIFEST} - set(manifest.files)):
        raise ValueError(
            f"checkpoint: {checkpoint / unlisted[0]} is not listed in {MANIFEST}, remove it if it "
            "is not part of the checkpoint, else use another checkpoint"
        )
    for name, expected in manifest.files.items():
        if not _is_plain(name):
            raise ValueError(
                f"checkpoint: {checkpoint / MANIFEST} lists {name!r}, which is outside the folder, "
                "use another checkpoint"
            )
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"checkpoint: {path} is missing, use another checkpoint")
        _compare(path, "bytes", path.stat().st_size, expected)
    return manifest


def check_content(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raise a ValueError if the content of one of the files `names` is not what was written."""
    for name in names:
        path = checkpoint / name
        _compare(path, "sha256", file_entry(path)["sha256"], manifest.files[name])


def _compare(path: Path, key: str, found: int | str, expected: dict[str, int | str]) -> None:
    if found != expected[key]:
        raise ValueError(
            f"checkpoint: {path} is damaged, {key} was {expected[key]}, is {found}, use another"
        )


def _is_plain(name: str) -> bool:
    """Whether `name` is that of a file in the folder itself."""
    return "/" not in name and name not in ("", ".", "..")


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """Return {step: path} of the finished checkpoints in a folder, ascending by step."""
    found = {}
    for path in folder.glob("step-*") if folder.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / MANIFEST).is_file():
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def find_checkpoint(run: Path, field: str = "run") -> Path:
    """Return the newest checkpoint of a run folder, or `run` itself if it is a checkpoint.

    Raises:
        ValueError: If there is none; the message begins with `field`, the user's option.
    """
    if (run / MANIFEST).is_file():
        return run
    steps = checkpoint_steps(run / "checkpoints")
    if not steps and (run / "config.json").exists() and any(run.glob("*.safetensors")):
        raise ValueError(
            f"{field}: {run} is a Hugging Face folder, make a checkpoint of it: "
            f"python -m models.convert --from hf --to skipstone {run} OUTPUT"
        )
    if not steps:
        raise ValueError(
            f"{field}: {run} holds no finished checkpoint, train first or name another"
        )
    return steps[max(steps)]


class TensorReader(FileSystemReader):
    """DCP's reader, for folders whose metadata is not trusted.

    DCP's `.metadata` is a pickle and may hold non-tensor state, which is a pickle again
    (pytorch#189308). Here the metadata is read through an allow-list, and anything but tensors is
    refused.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read `.metadata` without running any code it names."""
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as stream:
            metadata = _AllowListUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"checkpoint: {self.path}/.metadata is not DCP metadata")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"checkpoint: {self.path} holds {name}, which is not a tensor")
        for storage in (metadata.storage_data or {}).values():
            if not _is_plain(storage.relative_path):
                raise ValueError(f"checkpoint: {self.path} points to {storage.relative_path!r}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_METADATA = """BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta
TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING"""


class _AllowListUnpickler(pickle.Unpickler):
    """Builds the few classes DCP metadata is made of, and nothing else."""

    ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        }
        | {("torch.distributed.checkpoint.metadata", name) for name in _METADATA.split()}
    )

    def find_class(self, module: str, name: str) -> Any:
        value = getattr(torch, name, None) if module == "torch" else None
        if (module, name) in self.ALLOWED or isinstance(value, torch.dtype):
            return super().find_class(module, name)
        raise ValueError(f"checkpoint: .metadata names {module}.{name}, which is not allowed")


def check_tensors(reader: TensorReader, prefix: str, state: dict[str, Tensor]) -> None:
    """Refuse a checkpoint whose tensors under `prefix` are not those of `state`, shape by shape.

    DCP itself ignores tensors that the model lacks, so a deeper checkpoint would load in part.
    """
    stored = {
        (name.removeprefix(prefix), tuple(entry.size))
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    expected = {(name, tuple(value.shape)) for name, value in state.items()}
    if stored != expected:
        missing, unknown = sorted(expected - stored), sorted(stored - expected)
        raise ValueError(
            f"checkpoint: {reader.path} does not fit the model: it lacks {missing[:3] or 'nothing'}"
            f" and has {unknown[:3] or 'nothing'} besides, use the configuration it was made with"
        )


def load_model(checkpoint: Path, *, device: torch.device, dtype: torch.dtype) -> Llama:
    """Load the model of a checkpoint folder on one device, for inference.

    Args:
        checkpoint: A checkpoint folder, see `find_checkpoint`.
        device: Of the model.
        dtype: Of its weights.

    Raises:
        ValueError: If a file is missing or damaged, or the tensors do not fit the manifest.
    """
    manifest = verify(checkpoint)
    with torch.device("meta"):
        model = Llama(manifest.model)
    model.to_empty(device="cpu")
    reader = TensorReader(checkpoint)
    state = model.state_dict()
    check_tensors(reader, "model.", state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is intended here
        load({"model": state}, storage_reader=reader, no_dist=True)
    model.fill_rope_table()
    model.fingerprint = compute_fingerprint(model)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
