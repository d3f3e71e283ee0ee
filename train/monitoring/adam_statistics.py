"""The statistics that `train/monitoring/adam_monitor.py` measures: numbers by layer group."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GroupStatistics:
    """One reading of one layer group; u = m_hat / (sqrt(v_hat) + eps)."""

    adam_steps: float
    """Steps Adam has taken, a mean over coordinates."""
    update_rms: float
    """RMS of u."""
    update_rms_before: float | None
    """RMS of u at the reading before; None at the first."""
    share_large: float
    """Share of |u| > 0.8."""
    share_starved: float
    """Share of sqrt(v_hat) < 10 eps."""
    bimodality: float
    """Sarle's coefficient of u, (skewness^2 + 1) / kurtosis: 1/3 for a normal distribution,
    5/9 for a uniform one, 1 for two points."""
    grad_rms_over_eps: float
    """RMS of the sampled coordinates' recent gradients, after clipping, over eps."""
    lags: Mapping[int, float]
    """{lag in steps: correlation of the sampled gradients with themselves that much earlier}."""
    histogram: tuple[int, ...]
    """Counts of u in 64 equal bins on [-2, 2]; the end bins hold what lies beyond."""


@dataclass(frozen=True, kw_only=True)
class AdamStatistics:
    """One reading of every layer group."""

    groups: Mapping[str, GroupStatistics]

    def metrics(self) -> dict[str, float]:
        """Return the scalars by name, adam/<statistic>/<group>."""
        named: dict[str, float] = {}
        for name, group in self.groups.items():
            named |= {
                f"adam/update_rms/{name}": group.update_rms,
                f"adam/share_large/{name}": group.share_large,
                f"adam/share_starved/{name}": group.share_starved,
                f"adam/bimodality/{name}": group.bimodality,
                f"adam/grad_rms_over_eps/{name}": group.grad_rms_over_eps,
            }
            named |= {f"adam/lag{lag}/{name}": value for lag, value in group.lags.items()}
        return named

    def histograms(self) -> dict[str, list[int]]:
        """Return {group: 64 counts of u on [-2, 2]}."""
        return {name: list(group.histogram) for name, group in self.groups.items()}


def group_of(name: str) -> str:
    """Return a parameter's group, as the model names it: layers_03 (l = 3), own_exits_02 (E = 2).

    Those of other parameters have no number: tok_embeddings, routers, norm, ...
    """
    first, *rest = name.split(".")
    return f"{first}_{int(rest[0]):02d}" if first in ("layers", "own_exits") else first


def bimodality(mean: float, second: float, third: float, fourth: float) -> float:
    """Return (skewness^2 + 1) / kurtosis from the raw moments; 0 if nothing varies."""
    m2 = second - mean**2
    m3 = third - 3 * mean * second + 2 * mean**3
    m4 = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    if m2 <= 1e-12 * second or m4 <= 0:
        return 0.0
    return (m3**2 / m2**3 + 1) / (m4 / m2**2)
