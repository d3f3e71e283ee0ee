"""Linear maps from an exit's state to an estimate of the last layer's, and their files.

Jump to Conclusions (arXiv 2303.09435), section 3: A_l = argmin_A sum ||A h_l - h_L||^2, and the
exit predicts with head(norm(A_l h_l)). Ours is A = I + B, so that a ridge pulls it towards the
identity, and a map of low rank is one whose B is. `inference.fit_jump` fits them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from inference.loading.adapters import check_shapes, load_adapter, save_adapter
from models.llama import Llama


@dataclass(frozen=True)
class JumpMap:
    """The maps of all exits; at the last layer it is the identity."""

    tensors: Mapping[str, Tensor]
    """By E: "E.B", (dim, dim), or "E.out", (dim, r), and "E.in", (r, dim), with B = out in."""

    def __call__(self, E: int, h: Tensor) -> Tensor:
        """Return A h for h = x_E: (..., dim)."""
        if f"{E}.B" in self.tensors:
            return h + F.linear(h, self.tensors[f"{E}.B"])
        if f"{E}.in" in self.tensors:
            return h + F.linear(F.linear(h, self.tensors[f"{E}.in"]), self.tensors[f"{E}.out"])
        return h


def save_jump(path: Path, jump: JumpMap, model: Llama, settings: Mapping[str, str]) -> None:
    """Write maps fitted to `model`."""
    tensors = {name: t.to(model.norm.weight.dtype) for name, t in jump.tensors.items()}
    save_adapter(path, "jump", model, tensors, settings)


def load_jump(path: Path, model: Llama) -> JumpMap:
    """Read maps.

    Raises:
        ValueError: There are none, or they were fitted to other weights.
    """
    tensors, _ = load_adapter(path, "jump", model)
    dim, exits = model.config.dim, range(1, model.config.n_layers)
    shapes: dict[str, tuple[int, ...]] = {}
    for E in exits:
        if f"{E}.in" in tensors:
            rank = len(tensors[f"{E}.in"]) if tensors[f"{E}.in"].dim() else 0
            shapes |= {f"{E}.in": (rank, dim), f"{E}.out": (dim, rank)}
        else:
            shapes[f"{E}.B"] = (dim, dim)
    check_shapes(path, "jump", tensors, shapes)
    return JumpMap(tensors)


def load_exit_map(path: Path | None, model: Llama) -> JumpMap | None:
    """Read maps if a file is given, else return None."""
    return None if path is None else load_jump(path, model)
