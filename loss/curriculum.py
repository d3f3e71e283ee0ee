"""Which exits have a loss at step t: the curriculum C(t, l) of LayerSkip.

LayerSkip (arXiv 2404.16710), section 4.1.2. Every curriculum is a pure function of t, so there is
nothing to save and nothing to restore. l = layer index from 0, t = step from 0; L layers, T steps.
"""

from dataclasses import dataclass
from typing import Literal

Curriculum = Literal["rot", "grad", "all", "alternating", "none"]


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """At which steps each exit has a loss."""

    C: Curriculum = "none"
    """rot: every R-th layer, rotating by one each step. grad: from the last layer down, one more
    every T / (2 L) steps. all: every exit, every step. alternating: every exit at even steps, the
    last layer alone at odd ones (BERxiT, 2021.eacl-main.8). none: no exit but the last layer."""
    R: int = 8
    """Dilation of the rotation, in layers: each exit is trained once in R steps."""
    last_layer_always_on: bool = True
    """Train the last layer's loss at every step, also where the rotation would leave it out. The
    paper leaves this open; its author's later code does it."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = []
        if self.R < 1:
            found.append(f"curriculum.R: {self.R}, must be at least 1 layer")
        if self.C == "none" and not self.last_layer_always_on:
            found.append(
                "curriculum.last_layer_always_on: False with curriculum.C none leaves no loss, "
                "set it to True or choose another curriculum"
            )
        return found


def C_rot(t: int, l: int, R: int) -> int:
    """Return 1 where the rotational curriculum trains the exit after layer l at step t, else 0.

    LayerSkip, section 4.1.2: exits at every R-th layer, the pattern moved by one each step, so that
    R consecutive steps train each exit exactly once and one step evaluates at most ceil(L / R)
    heads.
    """
    return int((l - t) % R == 0)


def C_grad(t: int, l: int, *, L: int, T: int) -> int:
    """Return 1 where the gradual curriculum trains the exit after layer l at step t, else 0.

    LayerSkip, section 4.1.2: the last layer first, one more, going down, every T / (2 L) steps;
    all are on from step T / 2 (the last to come, layer 0, from step T (L - 1) / (2 L)).
    """
    return int(2 * L * t >= (L - 1 - l) * T)


def active_layers(t: int, *, L: int, T: int, config: CurriculumConfig) -> tuple[int, ...]:
    """Return the layers l with C(t, l) = 1, ascending."""
    last = (L - 1) if config.last_layer_always_on else None
    if config.C == "rot":
        on = [l for l in range(L) if C_rot(t, l, config.R) or l == last]
    elif config.C == "grad":
        on = [l for l in range(L) if C_grad(t, l, L=L, T=T) or l == last]
    elif config.C == "all" or (config.C == "alternating" and t % 2 == 0):
        on = list(range(L))
    else:
        on = [L - 1]
    return tuple(on)


def period(config: CurriculumConfig) -> int:
    """Return the number of steps after which C(t, l) repeats.

    grad never repeats; it only ever adds exits to those of step 0, and counts as 1.
    """
    return {"rot": config.R, "alternating": 2}.get(config.C, 1)
