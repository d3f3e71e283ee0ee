"""Reading the tensors of a checkpoint whose metadata is not trusted: no code runs, none is too big.

DCP's `.metadata` is a pickle and may hold non-tensor state, which is a pickle again
(pytorch#189308). Here it is read through an allow-list, anything but tensors is refused, and every
tensor must lie within its file before memory is taken for it.
"""

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import IO, Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from data.foreign_json import is_plain
from data.urls import Location, Url, UrlError
from models.url_streams import UrlStreams

Weights = Literal["model", "ema"]
"""Those of the last step, or their moving average: the names of both begin with this."""


class TensorReader(FileSystemReader):
    """DCP's reader, for folders whose metadata is not trusted."""

    def __init__(self, folder: Location) -> None:
        """Read nothing yet."""
        super().__init__(str(folder) if isinstance(folder, Url) else folder)
        self.folder = folder
        if isinstance(folder, Url):
            self.fs = UrlStreams()  # type: ignore[assignment]
            self.path = self.fs.init_path(str(folder))

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """Return the bytes of a tensor; of a URL all at once, in one request."""
        if not isinstance(self.folder, Url):
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read `.metadata` without running any code it names.

        Raises:
            ValueError: It is damaged, or describes anything but tensors within the files.
        """
        content = (self.folder / ".metadata").read_bytes()
        try:
            metadata = _AllowListUnpickler(io.BytesIO(content)).load()
            _check_metadata(self.folder, metadata)
        except UrlError:
            raise
        except ValueError as error:
            raise ValueError(f"checkpoint: {self.path}/.metadata {error}, use another") from None
        except Exception as error:  # what bytes that are no pickle raise has no bound
            raise ValueError(
                f"checkpoint: {self.path}/.metadata is damaged ({_brief(error)}), use another"
            ) from None
        assert isinstance(metadata, Metadata)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_METADATA = """BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta
TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING"""


# Written in Python: that in C takes whatever memory a file names.
_Unpickler: Any = pickle._Unpickler


class _AllowListUnpickler(_Unpickler):  # type: ignore[misc]
    """Builds the few classes DCP metadata is made of, and nothing else."""

    ALLOWED = frozenset(
        {
            ("pathlib", "PosixPath"),
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        }
        | {("torch.distributed.checkpoint.metadata", name) for name in _METADATA.split()}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        value = getattr(torch, name, None) if module == "torch" else None
        if (module, name) in self.ALLOWED or isinstance(value, torch.dtype):
            return super().find_class(module, name)
        raise ValueError(f"names {module}.{name}, which is not allowed")

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:  # those above the last mark
            _check_key(key)
        super().load_setitems()

    dispatch = {
        code: function
        for code, function in _Unpickler.dispatch.items()
        if code not in (*pickle.DICT, *pickle.ADDITEMS, *pickle.FROZENSET)  # they hash anything
    } | {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def _memory_format(encoding: object, name: object) -> _MEM_FORMAT_ENCODING:
    """Return a member of the one enumeration in the metadata, which Python 3.11.0 to 3.11.3 name.

    They pickle it as getattr(enumeration, name).
    """
    if encoding is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise ValueError("names builtins.getattr, which is not allowed")
    return _MEM_FORMAT_ENCODING[str(name)]


def _check_key(key: object) -> None:
    """Refuse keys that are deep: hashing them would end the process."""
    plain = isinstance(key, str)
    if isinstance(key, MetadataIndex):
        plain = isinstance(key.fqn, str) and isinstance(key.offset, torch.Size | None)
    if not plain:
        raise ValueError(f"has a key of type {type(key).__name__}")


def _check_metadata(folder: Location, metadata: object) -> None:
    """Refuse what is not metadata of tensors that lie within the files of `folder`."""
    if not isinstance(metadata, Metadata):
        raise ValueError("is not DCP metadata")
    storage = {} if metadata.storage_data is None else metadata.storage_data
    _check_storage(folder, storage)
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"holds {name}, which is not a tensor")
        properties = entry.properties
        if not (isinstance(properties, TensorProperties) and isinstance(entry.size, torch.Size)):
            raise ValueError(f"has no size or type of {name}")
        if not isinstance(properties.dtype, torch.dtype) or min(entry.size, default=0) < 0:
            raise ValueError(f"has no size or type of {name}")
        stored = 0
        for chunk in entry.chunks:
            _check_chunk(name, chunk, entry.size)
            place = storage.get(MetadataIndex(name, chunk.offsets))
            size = prod(chunk.sizes) * properties.dtype.itemsize
            if place is None or place.length < size:
                raise ValueError(f"names no file that holds {name}")
            stored += prod(chunk.sizes)
        if stored < prod(entry.size):
            raise ValueError(f"names no file that holds all of {name}")


def _check_storage(folder: Location, storage: object) -> None:
    """Refuse entries that are not parts of plain files in `folder`."""
    if not isinstance(storage, dict):
        raise ValueError("names no files")
    sizes = folder.files() if isinstance(folder, Url) and folder.lists else {}
    for key, entry in storage.items():
        name, offset, length = (
            getattr(entry, field, None) for field in ("relative_path", "offset", "length")
        )
        if not (isinstance(key, MetadataIndex) and isinstance(name, str)):
            raise ValueError("names no files")
        if not is_plain(name):
            raise ValueError(f"points to {name!r}, which is outside the folder")
        if name not in sizes:
            sizes[name] = _size(folder / name)
        if not (isinstance(offset, int) and isinstance(length, int)):
            raise ValueError("names no files")
        if min(offset, length) < 0 or offset + length > sizes[name]:
            raise ValueError(f"points beyond the end of {name}")
        if getattr(entry, "transform_descriptors", None):
            raise ValueError(f"names a transformation of {name}")


def _size(path: Location) -> int:
    """Return the bytes of a plain file; 0 where there is none."""
    if isinstance(path, Url):
        return path.size()
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0


def _check_chunk(name: str, chunk: object, size: torch.Size) -> None:
    """Refuse a part that does not lie within its tensor."""
    if not isinstance(chunk, ChunkStorageMetadata):
        raise ValueError(f"has no parts of {name}")
    shapes = (chunk.offsets, chunk.sizes)
    if not all(isinstance(s, torch.Size) and len(s) == len(size) for s in shapes) or any(
        start < 0 or count < 0 or start + count > whole
        for start, count, whole in zip(*shapes, size, strict=True)
    ):
        raise ValueError(f"has a part that lies outside {name}")


def holds_average(checkpoint: Location) -> bool:
    """Whether a checkpoint holds a moving average of its weights."""
    names = TensorReader(checkpoint).read_metadata().state_dict_metadata
    return any(name.startswith("ema.") for name in names)


def refuse_without_average(checkpoint: Location, weights: Weights) -> None:
    """Raise a ValueError if the average is asked for and there is none."""
    if weights == "ema" and not holds_average(checkpoint):
        raise ValueError(
            f"weights: ema, but {checkpoint} holds no average, leave it out, or train with "
            "--optim.ema_decay"
        )


def check_tensors(
    reader: TensorReader, prefix: str, state: Mapping[str, Tensor]
) -> dict[str, TensorStorageMetadata]:
    """Refuse a checkpoint whose tensors under `prefix` are not those of `state`, shape by shape.

    DCP itself ignores tensors that the model lacks, so a deeper checkpoint would load in part.

    Returns:
        Their metadata by name, without the prefix.
    """
    stored = {
        name.removeprefix(prefix): entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    found = {(name, tuple(entry.size)) for name, entry in stored.items()}
    expected = {(name, tuple(value.shape)) for name, value in state.items()}
    if found != expected:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        raise ValueError(
            f"checkpoint: {reader.path} does not fit the model: it lacks {missing[:3] or 'nothing'}"
            f" and has {unknown[:3] or 'nothing'} besides, use the configuration it was made with"
        )
    return stored


def load_tensors(reader: TensorReader, state: dict[str, Any]) -> None:
    """Load tensors in place, in a process by itself.

    Raises:
        ValueError: They cannot be read.
    """
    with _without_process_group(), _damage_explained(reader.folder):
        load(state, storage_reader=reader, no_dist=True)


@contextmanager
def _damage_explained(folder: Location) -> Iterator[None]:
    """Turn what DCP and torch.load raise for damaged files, which is anything, into one line."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(
            f"checkpoint: {folder} cannot be loaded ({_brief(cause)}), use another"
        ) from None
    except Exception as error:
        raise ValueError(
            f"checkpoint: {folder} cannot be loaded ({_brief(error)}), use another"
        ) from None


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.120}".removesuffix(": ")


@contextmanager
def _without_process_group() -> Iterator[None]:
    """Suppress DCP's warning about the missing process group, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
