"""The weights and the configuration of a Hugging Face folder, read and written.

Safetensors files alone are read: a .bin file is a pickle and may run code.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.foreign_json import read_object, take, typed
from models.config import LlamaConfig
from models.conversion.hugging_face import (
    config_json,
    hugging_face_name,
    hugging_face_state,
    llama_config,
)
from models.llama import Llama

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# A buffer that older versions of transformers wrote; it follows from config.json.
_IGNORED = ".rotary_emb.inv_freq"


def read_config(folder: Path) -> LlamaConfig:
    """Return the shape of the model in a folder.

    Raises:
        ValueError: If it holds none of a family that is read.
    """
    try:
        return llama_config(read_object(folder / CONFIG))
    except (OSError, ValueError) as error:
        reason = f"no {CONFIG}" if isinstance(error, FileNotFoundError) else error
        raise ValueError(
            f"input: {folder} holds no model that is read here ({reason}), name one that does"
        ) from None


def read_eos_ids(folder: Path) -> set[int]:
    """Return the token ids that end a text, in config.json or generation_config.json.

    Raises:
        ValueError: If one of the files is damaged.
    """
    found: set[int] = set()
    for path in (folder / CONFIG, folder / GENERATION_CONFIG):
        if not path.is_file():
            continue
        try:
            given = read_object(path).get("eos_token_id")
            ids = given if isinstance(given, list) else [] if given is None else [given]
            found |= set(typed(ids, list[int], "eos_token_id"))
        except ValueError as error:
            raise ValueError(f"input: {path} is damaged ({error}), download it again") from None
    return found


def read_weights(folder: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """Return the parameters of a folder under our names, in the dtypes they are stored in.

    Raises:
        ValueError: If a file, a shard or a tensor is missing, damaged, of another shape or of a
            dtype that is not read.
    """
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Llama(config).state_dict().items()}
    theirs = {hugging_face_name(name, config): name for name in shapes}
    expected = {name: shapes[ours] for name, ours in theirs.items()}
    if config.tie_embeddings:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    stored: dict[str, tuple[int, ...]] = {}
    files = _weight_files(folder)
    for path, names in files.items():
        stored |= _shapes(path, names)
    if config.tie_embeddings and "lm_head.weight" not in stored:
        del expected["lm_head.weight"]
    if stored != expected:
        missing = sorted(expected.items() - stored.items())
        unknown = sorted(stored.items() - expected.items())
        raise ValueError(
            f"input: {folder} does not fit its {CONFIG}: it lacks {missing[:3] or 'nothing'} and "
            f"has {unknown[:3] or 'nothing'} besides, download it again"
        )
    found: dict[str, Tensor] = {}
    for path, names in files.items():
        found |= _read_file(path, names)
    head = found.get("lm_head.weight")
    if (
        config.tie_embeddings
        and head is not None
        and not torch.equal(head, found["model.embed_tokens.weight"])
    ):
        raise ValueError(
            f"input: {folder} ties its embeddings but has another lm_head.weight, "
            "set tie_word_embeddings to false in its config.json"
        )
    return {ours: found[name] for name, ours in theirs.items()}


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Return the weight files of a folder and the tensors to read from each; None: all."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(
                f"input: {folder} has no {SINGLE} and no {INDEX}, save it as safetensors "
                "(.bin files are pickles and are not read)"
            )
        return {folder / SINGLE: None}
    try:
        shard_of: dict[str, str] = take(read_object(index), "weight_map", dict[str, str])
        of_file: dict[str, list[str]] = {}
        for name, shard in shard_of.items():
            of_file.setdefault(shard, []).append(name)
        shards: dict[Path, list[str] | None] = {
            folder / Path(shard).name: of_file[shard] for shard in sorted(of_file)
        }
    except ValueError as error:
        raise ValueError(f"input: {index} is damaged ({error}), download it again") from None
    if missing := [path.name for path in shards if not path.is_file()]:
        raise ValueError(
            f"input: {folder} lacks {len(missing)} of {len(shards)} shards ({missing[0]}), "
            "download it again"
        )
    return shards


def _shapes(path: Path, names: list[str] | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors, of which nothing but the header is read."""
    with _damage_explained(path), safe_open(path, framework="pt") as file:
        present = set(file.keys())
        if absent := set(names or ()) - present:
            raise ValueError(
                f"input: {path} lacks {min(absent)}, which the index lists, download it again"
            )
        found = {}
        for name in present if names is None else names:
            part = file.get_slice(name)
            if part.get_dtype() not in DTYPES and not name.endswith(_IGNORED):
                raise ValueError(
                    f"dtype: {path} has {name} in {part.get_dtype()}, which is not read; save it "
                    f"in one of {', '.join(DTYPES)}"
                )
            found[name] = tuple(part.get_shape())
        return {name: shape for name, shape in found.items() if not name.endswith(_IGNORED)}


def _read_file(path: Path, names: list[str] | None) -> dict[str, Tensor]:
    with _damage_explained(path), safe_open(path, framework="pt") as file:
        chosen = file.keys() if names is None else names
        return {name: file.get_tensor(name) for name in chosen if not name.endswith(_IGNORED)}


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, RuntimeError) as error:  # the latter of torch, for an odd header
        raise ValueError(f"input: {path} is damaged ({error}), download it again") from None


def write_model(
    folder: Path,
    config: LlamaConfig,
    state: dict[str, Tensor],
    *,
    bos_id: int,
    eos_id: int,
    max_shard_bytes: int,
) -> None:
    """Write config.json, generation_config.json and the weights as safetensors.

    Args:
        folder: An empty folder.
        config: The shape of the model.
        state: The parameters under our names; they are written in the dtypes they have.
        bos_id: Token id of BOS.
        eos_id: Token id of EOS.
        max_shard_bytes: Most bytes of a file, but for a larger tensor, which has its own.
    """
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    _write_json(folder / CONFIG, config_json(config, dtype=dtype, bos_id=bos_id, eos_id=eos_id))
    _write_json(folder / GENERATION_CONFIG, ids)
    shards = _split(hugging_face_state(state, config), max_shard_bytes)
    shard_of: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path = folder / (name if len(shards) > 1 else SINGLE)
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod((folder / CONFIG).stat().st_mode)  # safetensors gives it to its owner alone
        shard_of |= dict.fromkeys(shard, name)
    if len(shards) == 1:
        return
    size = sum(tensor.nbytes for tensor in state.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": shard_of})


def _split(state: dict[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    return shards


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
