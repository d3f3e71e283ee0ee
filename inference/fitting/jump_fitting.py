"""Fits linear maps from exits to the last layer, in one pass over a text. Writes no files.

Jump to Conclusions (arXiv 2303.09435), section 3. The paper fits one random position of each
sentence; ours every position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.fitting.traces import run_windows
from inference.strategies.jump_maps import JumpMap
from models.llama import Llama


@dataclass(frozen=True, kw_only=True)
class ExitFit:
    """Distance of an exit from the last layer, as it is (identity) and through its map."""

    E: int
    """Layers run."""
    r2: float
    """1 - squared error / variance of the last layer's state, through the map."""
    r2_identity: float
    agreement: float
    """Share of tokens whose most probable token is the last layer's, through the map."""
    agreement_identity: float
    surprisal: float
    """-log probability, in nats, of the last layer's most probable token, through the map."""
    surprisal_identity: float


def fit_jump(model: Llama, windows: Tensor, *, rank: int | None, ridge: float) -> JumpMap:
    """Fit the map of every exit by streaming normal equations in fp64.

    With x = x_E, y = x_L - x_E and M = sum x x^T + ridge * mean(diag(sum x x^T)) * I:
      B = (sum y x^T) M^-1;   of rank r: B_r = U U^T B, U the first r eigenvectors of B M B^T.

    Args:
        model: In eval mode.
        windows: (windows, seq) int64, the text.
        rank: r, at most dim; None for full rank.
        ridge: Strength of the pull towards the identity, at least 0.
    """
    dim, exits = model.config.dim, range(1, model.config.n_layers)
    device = model.norm.weight.device
    xx = torch.zeros(len(exits), dim, dim, dtype=torch.float64, device=device)
    yx = torch.zeros_like(xx)
    for states, x_L in run_windows(model, windows, exits, "fitting"):
        for n, state in enumerate(states):
            x, y = state.double(), x_L.double() - state.double()
            xx[n] += x.T @ x
            yx[n] += y.T @ x
    tensors = {}
    for n, E in enumerate(exits):
        pull = ridge * xx[n].diagonal().mean()
        M = xx[n] + torch.diag(pull.expand(dim))
        # Directions that are not in the text map to themselves, by the pseudoinverse.
        B = yx[n] @ torch.linalg.pinv(M, hermitian=True)
        if rank is None:
            tensors[f"{E}.B"] = B
            continue
        U = torch.linalg.eigh(B @ M @ B.T).eigenvectors[:, -rank:]  # eigenvalues ascend
        tensors[f"{E}.out"], tensors[f"{E}.in"] = U, U.T @ B
    return JumpMap({name: t.to(model.norm.weight.dtype) for name, t in tensors.items()})


@torch.inference_mode()
def measure_jump(model: Llama, jump: JumpMap, windows: Tensor) -> list[ExitFit]:
    """Measure the maps on a held-out text, (windows, seq) int64."""
    exits = range(1, model.config.n_layers)
    device = model.norm.weight.device
    sums = torch.zeros(len(exits), 2, 3, dtype=torch.float64, device=device)
    total = torch.zeros(model.config.dim, dtype=torch.float64, device=device)
    squares, tokens = torch.zeros_like(total), 0
    for states, x_L in run_windows(model, windows, exits, "measuring"):
        last = model.exit_logits(x_L).argmax(-1)
        for n, (E, x) in enumerate(zip(exits, states, strict=True)):
            # A map's output estimates x_L, and is read by the last layer's norm.
            for which, (h, layers) in enumerate(((x, E), (jump(E, x), None))):
                logits = model.exit_logits(h, layers).float()
                sums[n, which, 0] += (x_L.double() - h.double()).square().sum()
                sums[n, which, 1] += (logits.argmax(-1) == last).sum()
                sums[n, which, 2] += F.cross_entropy(logits, last, reduction="sum")
        total += x_L.double().sum(0)
        squares += x_L.double().square().sum(0)
        tokens += len(x_L)
    variance = (squares - total.square() / tokens).sum()
    sums[..., 0] = (1.0 - sums[..., 0] / variance) * tokens
    return [
        ExitFit(
            E=E,
            r2=ours[0],
            r2_identity=identity[0],
            agreement=ours[1],
            agreement_identity=identity[1],
            surprisal=ours[2],
            surprisal_identity=identity[2],
        )
        for E, (identity, ours) in zip(exits, (sums / tokens).tolist(), strict=True)
    ]
