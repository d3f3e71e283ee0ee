"""Classifiers that score, from a hidden state, whether a token may exit, and their files.

Every form has a score in [0, 1] at every exit; a token exits at the first whose score reaches a
threshold. All read the state divided by its root mean square, as residual streams grow with depth.
`inference.train_gate` fits them, and the strategies gate and calm use them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.loading.adapters import check_shapes, damaged, load_adapter, save_adapter
from models.llama import Llama

Form = Literal["lte", "linear", "mlp", "halting", "multinomial", "geometric"]
"""lte: one linear classifier for all exits (BERxiT, 2021.eacl-main.8).
linear, mlp: one for each exit (CALM, arXiv 2207.07061, section 3.2; FREE, arXiv 2310.05424).
halting, geometric: h_n = sigma(.), one for each exit or one for all, trained so that the chance to
stop at exit n is h_n (1 - h_{n-1}) ... (1 - h_1) (Depth-Adaptive Transformer, arXiv 1910.10073).
multinomial: a distribution over exits, predicted from the state at the first of them (same paper,
which takes its most probable exit; ours is the first where the sum reaches the threshold, at 1/2
the median, so that a threshold trades depth for agreement as in the other forms)."""

FORMS: tuple[Form, ...] = get_args(Form)
SHARED: tuple[Form, ...] = ("lte", "geometric")
"""Forms that are the same at every exit."""
STOPPING: tuple[Form, ...] = ("halting", "geometric", "multinomial")
"""Forms of a distribution over the exit to stop at; the others predict if an exit is right."""


@dataclass(frozen=True)
class GateClassifier:
    """A fitted classifier for some exits."""

    form: Form
    exits: range
    """The E it was fitted for."""
    tensors: Mapping[str, Tensor]
    """w: (n, dim) and b: (n,), or for mlp also w_in: (n, hidden, dim), b_in: (n, hidden), w then
    (n, hidden). n is 1 where all exits share, exits + 1 for multinomial, else the exits."""

    def score(self, E: int, h: Tensor, h_first: Tensor) -> Tensor:
        """Return the score of one token of each row, (batch,) fp32.

        Args:
            E: One of its exits.
            h: (batch, dim), x_E.
            h_first: (batch, dim), x at the first of its exits.
        """
        n = self.exits.index(E)
        if self.form == "multinomial":
            return self.outputs(0, h_first).softmax(-1)[:, : n + 1].sum(-1).clamp(max=1.0)
        return self.outputs(n, h)[:, 0].sigmoid()

    def outputs(self, n: int, h: Tensor) -> Tensor:
        """Return logits, before sigma or softmax, (batch, 1 or exits + 1), at the n-th exit."""
        x = F.rms_norm(h.float(), h.shape[-1:])
        w, b = self.tensors["w"].float(), self.tensors["b"].float()
        if self.form == "multinomial":
            return F.linear(x, w, b)
        n = 0 if self.form in SHARED else n
        if self.form == "mlp":
            x = F.linear(x, self.tensors["w_in"][n].float(), self.tensors["b_in"][n].float()).relu()
        return F.linear(x, w[n : n + 1], b[n : n + 1])


def new_gate(
    form: Form, exits: range, dim: int, *, hidden: int, generator: torch.Generator
) -> GateClassifier:
    """Initialise a gate to be fitted; linear ones begin at zero."""
    shapes = _shapes(form, exits, dim, hidden)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if form == "mlp":
        tensors["w_in"] = torch.randn(shapes["w_in"], generator=generator) * dim**-0.5
    return GateClassifier(form, exits, tensors)


def save_gate(path: Path, gate: GateClassifier, model: Llama) -> None:
    """Write a gate fitted to `model`."""
    settings = {
        "form": gate.form,
        "first": str(gate.exits.start),
        "interval": str(gate.exits.step),
    }
    tensors = {name: t.detach() for name, t in gate.tensors.items()}
    save_adapter(path, "gate", model, tensors, settings)


def load_gate(path: Path, model: Llama) -> GateClassifier:
    """Read a gate.

    Raises:
        ValueError: There is none, or it was fitted to other weights.
    """
    tensors, settings = load_adapter(path, "gate", model)
    try:
        [form] = [form for form in FORMS if form == settings["form"]]
        exits = range(int(settings["first"]), model.config.n_layers, int(settings["interval"]))
        if exits.start < 1 or exits.step < 1 or not exits:
            raise ValueError
    except (KeyError, ValueError):
        raise damaged(path, "gate", "its form or exits are none of ours") from None
    w_in = tensors.get("w_in")
    hidden = w_in.shape[1] if w_in is not None and w_in.dim() == 3 else 1
    check_shapes(path, "gate", tensors, _shapes(form, exits, model.config.dim, hidden))
    return GateClassifier(form, exits, tensors)


def _shapes(form: Form, exits: range, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a gate's tensors."""
    count = {"multinomial": len(exits) + 1}.get(form, 1 if form in SHARED else len(exits))
    shapes: dict[str, tuple[int, ...]] = {"w": (count, dim), "b": (count,)}
    if form == "mlp":
        shapes |= {"w_in": (count, hidden, dim), "b_in": (count, hidden), "w": (count, hidden)}
    return shapes
