"""Small files of tensors fitted to a checkpoint: gates, linear maps.

They are kept beside it, in `<checkpoint>.decode/`, as safetensors, which run no code when loaded,
with the fingerprint of the weights they belong to.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.foreign_json import shown
from data.output_streams import naming_the_file
from models.fingerprint import weights_fingerprint
from models.llama import Llama


def decode_folder(checkpoint: Path) -> Path:
    """Return the folder of files fitted to a checkpoint."""
    return checkpoint.with_name(checkpoint.name + ".decode")


def save_adapter(
    path: Path, kind: str, model: Llama, tensors: Mapping[str, Tensor], settings: Mapping[str, str]
) -> None:
    """Write tensors fitted to `model`.

    Args:
        path: The file; its folder is made.
        kind: Such as "gate".
        model: The model they were fitted to.
        tensors: By name.
        settings: Further contents, as text.

    Raises:
        ValueError: The file cannot be written.
    """
    metadata = {**settings, "kind": kind, "weights": weights_fingerprint(model)}
    with naming_the_file("output", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # save_file would put a file in its stead
            raise OSError("it is a device, a pipe or a folder")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise ValueError(f"output: {path}: {error}, give another path") from None


def load_adapter(path: Path, kind: str, model: Llama) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors fitted to `model`, to its device and dtype, and their settings.

    Raises:
        ValueError: The file is missing, of another kind, or fitted to other weights.
    """
    weight = model.norm.weight
    try:
        with safe_open(path, framework="pt") as file:
            settings = dict(file.metadata() or {})
            if settings.get("kind") != kind:
                raise ValueError(
                    f"{kind}: {path} holds a {settings.get('kind')!s:.40}, give a {kind}"
                )
            if settings.get("weights") != weights_fingerprint(model):
                raise ValueError(
                    f"{kind}: {path} was fitted to another checkpoint, fit one to this checkpoint"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{kind}: there is no {path}, fit one to this checkpoint first") from None
    except (SafetensorError, OSError, RuntimeError) as error:  # the last of torch
        raise ValueError(f"{kind}: {path} cannot be read ({error}), fit it again") from None
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise damaged(path, kind, f"{shown(broken[0])} is not finite")
    return {name: t.to(weight.device, weight.dtype) for name, t in tensors.items()}, settings


def check_shapes(
    path: Path, kind: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise a ValueError if tensors read from a file are not those of these shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        name = min(found.items() ^ shapes.items())[0]
        raise damaged(path, kind, f"{shown(name)} is {found.get(name)}, must be {shapes.get(name)}")


def damaged(path: Path, kind: str, reason: str) -> ValueError:
    """Return the error for a file that holds what no fit writes."""
    return ValueError(f"{kind}: {path} is damaged ({reason}), fit it again")
