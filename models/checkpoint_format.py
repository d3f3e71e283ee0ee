"""What a checkpoint folder holds, and how it is read: verified first, without running any code.

A checkpoint is a folder of torch.distributed.checkpoint (DCP) shards that hold tensors only,
`tokenizer.model`, its `chat_template.jinja` if it has one, and, written last, `manifest.json` with
everything else: a folder without it is no checkpoint. `tensor_reader.py` reads the shards,
`conversion/plain_checkpoint.py` writes them.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.foreign_json import MAX_BYTES, build, is_plain, parse_object, read_object, typed
from data.urls import Location, Url, UrlError, explained
from models.config import LlamaConfig
from models.fingerprint import compute_fingerprint
from models.llama import Llama
from models.tensor_reader import (
    TensorReader,
    Weights,
    check_tensors,
    load_tensors,
    refuse_without_average,
)

FileEntry = dict[str, int | str]

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
CHAT_TEMPLATE = "chat_template.jinja"
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
    files: dict[str, FileEntry]
    """{file name: {"bytes": size, "sha256": digest}} of every other file in the folder."""
    state: dict[str, Any] = field(default_factory=dict)
    """Further state of the training run, as JSON."""

    def setting(self, name: str, hint: Any, default: Any) -> Any:
        """Return a setting of the training configuration, such as `data.seq_len`.

        Args:
            name: Its section and name, or its name.
            hint: Its type, see `data.foreign_json.typed`.
            default: Returned where the configuration has none, as after a conversion.

        Raises:
            ValueError: It is of another type.
        """
        section, _, last = name.rpartition(".")
        fields = typed(self.config.get(section, {}), dict[str, Any], section) if section else None
        value = (self.config if fields is None else fields).get(last, default)
        try:
            return default if value == default else typed(value, hint, name)
        except ValueError as error:
            raise ValueError(f"{MANIFEST}: config.{error}") from None

    def content(self) -> bytes:
        """Return the content of `manifest.json`."""
        fields = {"format": _FORMAT} | asdict(self)
        return (json.dumps(fields | {"sha256": _digest(fields)}, indent=1) + "\n").encode()

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, atomically, and flush it to the disk."""
        aside = folder / (MANIFEST + ".tmp")
        with aside.open("wb") as file:
            file.write(self.content())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / MANIFEST)


def read_manifest(checkpoint: Location) -> Manifest:
    """Read the manifest of a checkpoint folder.

    Raises:
        ValueError: If there is none, it is damaged, or another version wrote it.
    """
    path = checkpoint / MANIFEST
    try:
        fields = _read_object(path)
    except FileNotFoundError:
        raise ValueError(
            f"checkpoint: {checkpoint} has no {MANIFEST}, name a finished checkpoint"
        ) from None
    except UrlError:
        raise
    except ValueError as error:
        raise ValueError(
            f"checkpoint: {path} is damaged ({error}), use another checkpoint"
        ) from None
    try:
        if fields.pop("sha256", None) not in (None, _digest(fields)):  # None: an older one
            raise ValueError("its sha256 is another")
        if fields.pop("format", None) != _FORMAT:
            raise ValueError("another format")
        manifest = build(Manifest, fields)
        if problems := manifest.model.problems():
            raise ValueError("; ".join(problems))
        whole = all(entry.keys() == {"bytes", "sha256"} for entry in manifest.files.values())
        if not whole or manifest.step < 0:
            raise ValueError("fields of another type")
        return manifest
    except ValueError as error:
        raise ValueError(
            f"checkpoint: {path} is no manifest of format {_FORMAT} ({error}), use another "
            "checkpoint or the version that wrote it"
        ) from None


def _read_object(path: Location) -> dict[str, Any]:
    if isinstance(path, Url):
        return parse_object(path.read_bytes(MAX_BYTES + 1))
    return read_object(path)


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def file_entry(path: Location) -> FileEntry:
    """Return a file's size in bytes and its sha256, as the manifest lists them."""
    if isinstance(path, Url):
        with explained(path), path.open() as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            return {"bytes": file.tell(), "sha256": digest}
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def verify(checkpoint: Location) -> Manifest:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        ValueError: Naming the file that is missing, cut short, changed or not listed.
    """
    manifest = check_listing(checkpoint)
    check_content(checkpoint, manifest, manifest.files)
    return manifest


def check_listing(checkpoint: Location) -> Manifest:
    """Compare the files that are there with those the manifest lists: plain files of that size.

    Raises:
        ValueError: Naming the file that is missing, cut short, elsewhere or not listed.
    """
    manifest = read_manifest(checkpoint)
    present = _sizes(checkpoint, manifest)
    if unlisted := sorted(present.keys() - {MANIFEST} - set(manifest.files)):
        raise ValueError(
            f"checkpoint: {checkpoint / unlisted[0]} is not listed in {MANIFEST}, remove it if it "
            "is not part of the checkpoint, else use another checkpoint"
        )
    for name, expected in manifest.files.items():
        if not is_plain(name):
            raise ValueError(
                f"checkpoint: {checkpoint / MANIFEST} lists {name!r}, which is outside the folder, "
                "use another checkpoint"
            )
        size = present.get(name)
        if size is None:
            raise ValueError(f"checkpoint: {checkpoint / name} is missing, use another checkpoint")
        _compare(checkpoint / name, "bytes", size, expected)
    return manifest


def _sizes(checkpoint: Location, manifest: Manifest) -> dict[str, int | None]:
    """Return {name: bytes} of what is in a checkpoint folder; None: no file."""
    if isinstance(checkpoint, Url):
        if not checkpoint.lists:
            return {name: (checkpoint / name).size() for name in manifest.files if is_plain(name)}
        return {**checkpoint.files(), **dict.fromkeys(checkpoint.folders())}
    present = sorted(checkpoint.iterdir())
    if links := [path for path in present if path.is_symlink()]:
        raise ValueError(f"checkpoint: {links[0]} is a link, put the file itself there")
    return {path.name: path.stat().st_size if path.is_file() else None for path in present}


def check_content(checkpoint: Location, manifest: Manifest, names: Iterable[str]) -> None:
    """Raise a ValueError if the content of one of the files `names` is not what was written."""
    for name in names:
        path = checkpoint / name
        _compare(path, "sha256", file_entry(path)["sha256"], manifest.files[name])


def _compare(path: Location, key: str, found: int | str, expected: FileEntry) -> None:
    if found != expected[key]:
        raise ValueError(
            f"checkpoint: {path} is damaged, {key} was {expected[key]}, is {found}, use another"
        )


def checkpoint_steps(folder: Location) -> dict[int, Location]:
    """Return {step: location} of the finished checkpoints in a folder, ascending by step."""
    found: dict[int, Location] = {}
    for path in _step_folders(folder):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / MANIFEST).is_file():
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def _step_folders(folder: Location) -> Iterable[Location]:
    if isinstance(folder, Url):
        return [folder / name for name in folder.folders() if name.startswith("step-")]
    return folder.glob("step-*") if folder.is_dir() else ()


def find_checkpoint(run: Location, field: str = "run") -> Location:
    """Return the newest checkpoint of a run or of its `checkpoints`, or `run` if it is itself one.

    Raises:
        ValueError: If there is none; the message begins with `field`, the user's option.
    """
    if (run / MANIFEST).is_file():
        return run
    steps = checkpoint_steps(run / "checkpoints") or checkpoint_steps(run)
    if steps:
        return steps[max(steps)]
    if isinstance(run, Path) and (run / "config.json").exists() and any(run.glob("*.safetensors")):
        raise ValueError(
            f"{field}: {run} is a Hugging Face folder, make a checkpoint of it: "
            f"python -m models.convert --from hf --to skipstone {run} OUTPUT"
        )
    if elsewhere := _folder_in_config(run):
        raise ValueError(f"{field}: {run} keeps its checkpoints in {elsewhere}, name that")
    raise ValueError(f"{field}: {run} holds no finished checkpoint, train first or name another")


def _folder_in_config(run: Location) -> str:
    """Return the folder of checkpoints that a run's configuration names; empty: none."""
    try:
        fields = read_object(run / "config.json") if isinstance(run, Path) else {}
        folder = typed(fields["checkpoint"], dict[str, Any], "checkpoint")["folder"]
        return f"{typed(folder, str, 'folder')}/{typed(fields['name'], str, 'name')}" * bool(folder)
    except (OSError, ValueError, KeyError):
        return ""


def load_model(
    checkpoint: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: Weights = "model",
) -> Llama:
    """Load the model of a checkpoint folder on one device, for inference.

    Args:
        checkpoint: A checkpoint folder, see `find_checkpoint`.
        device: Of the model.
        dtype: Of its weights.
        weights: Which of its weights.

    Raises:
        ValueError: If a file is missing or damaged, there is no average, or the tensors do not
            fit the manifest.
    """
    manifest = verify(checkpoint)
    with torch.device("meta"):
        model = Llama(manifest.model)
    reader = TensorReader(checkpoint)
    refuse_without_average(checkpoint, weights)
    check_tensors(reader, f"{weights}.", model.state_dict())
    model.to_empty(device="cpu")  # of no more memory than the files have bytes
    load_tensors(reader, {weights: model.state_dict()})
    model.fill_rope_table()
    model.fingerprint = compute_fingerprint(model)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
