"""Monitor the updates that Adam applies, layer by layer, from the sharded moments.

"A Theory on Adam Instability" (arXiv 2304.09871): with u = m_hat / (sqrt(v_hat) + eps), gradients
that are independent from step to step distribute u in a bell around 0 with standard deviation
sqrt((1 - beta1) / (1 + beta1)); gradients that are correlated in time drive it to -1 and +1,
where an update is large and no longer points downhill. It starts in a layer whose gradients fell
to the order of eps and then rise with a batch.

m_hat and v_hat are bias-corrected, as in the update itself: the plain moments are biased to 0
for the first 1 / (1 - beta2) steps.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from models.host_copy import HostCopy
from train.monitoring.adam_statistics import AdamStatistics, GroupStatistics, bimodality, group_of
from train.monitoring.replica_check import num_replicas
from train.parallel.local_part import local_part
from train.parallel.runtime import Runtime

BINS = 64
LARGE = 0.8
SAMPLED = 4096  # coordinates of a group whose gradients are kept, over all ranks
STEPS_BEYOND_LAG = 32  # pairs of steps behind every autocorrelation, at least
CHUNK = 2**20  # coordinates read at a time: bounds the memory of a reading
POWERS = ("count", "u1", "u2", "u3", "u4", "large", "starved", "steps")


@dataclass(frozen=True, kw_only=True)
class AdamMonitorConfig:
    """How often Adam's update is measured, and what raises an alarm.

    The defaults are calibrated on synthetic gradients with beta2 = 0.95. The update ratio u has RMS
    0.23 at a correlation of 0 from step to step, 0.62 at 0.9, 0.84 at 0.99, 1 at 1; the share of it
    beyond 0.8 is 0, 25, 61 and 100%. The final norm and the head of a healthy small model can reach
    0.7 and 40%, so the alarm is set between 0.9 and 0.99.
    """

    interval_steps: int = 50
    """Steps between readings; 0 turns the monitor off."""
    lags: int = 8
    """Autocorrelation of gradients is taken at lags of 1 to this many steps."""
    grace_steps: int = 100
    """No alarm before Adam has taken this many steps: in its first ones |u| is near 1."""
    max_update_rms: float = 0.8
    """Alarm when the RMS of u exceeds this, and max_share_large is exceeded as well."""
    max_share_large: float = 0.5
    """Share of |u| beyond 0.8, see max_update_rms."""
    max_rise: float = 4.0
    """Alarm when the RMS of u is this many times that of the reading before."""
    min_grad_rms_over_eps: float = 10.0
    """Alarm when the gradient's RMS is less than this many eps: eps then damps the update."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        checks = [
            ("interval_steps", self.interval_steps >= 0, "must not be negative"),
            ("lags", self.lags >= 1, "must be at least 1"),
            ("grace_steps", self.grace_steps >= 0, "must not be negative"),
            ("max_update_rms", self.max_update_rms > 0, "must be positive"),
            ("max_share_large", 0 < self.max_share_large <= 1, "must lie in (0, 1]"),
            ("max_rise", self.max_rise > 1, "must exceed 1"),
            ("min_grad_rms_over_eps", self.min_grad_rms_over_eps >= 0, "must not be negative"),
        ]
        return [
            f"adam_monitor.{name}: {getattr(self, name)}, {remedy}"
            for name, ok, remedy in checks
            if not ok
        ]


def alarms(
    statistics: AdamStatistics, config: AdamMonitorConfig, *, warmup_steps: int
) -> list[str]:
    """Return a line for each group and symptom, with the paper's remedy.

    Args:
        statistics: A reading, the same on every rank.
        config: The thresholds.
        warmup_steps: While the learning rate still rises, the weights hardly move and gradients
            are correlated from step to step in any run; correlation is no alarm before its end.
    """
    lines = []
    for name, group in statistics.groups.items():
        if group.adam_steps < config.grace_steps:
            continue
        rms, before, share = group.update_rms, group.update_rms_before, group.share_large
        if before is not None and rms > max(config.max_rise * before, 0.1):
            lines.append(
                f"adam: {name} has a spike: the RMS of its update ratio rose from {before:.2g} to "
                f"{rms:.2g} (alarm above {config.max_rise:g} times), "
                "lower optim.eps, or skip these batches"
            )
        correlated = rms > config.max_update_rms and share > config.max_share_large
        if correlated and group.adam_steps >= warmup_steps:
            lines.append(
                f"adam: {name} has gradients correlated in time: the RMS of its update ratio is "
                f"{rms:.2f} and {share:.0%} of it lies beyond {LARGE} (alarm above "
                f"{config.max_update_rms:g} and {config.max_share_large:.0%}), "
                "lower optim.lr or optim.betas, or skip these batches"
            )
        if (ratio := group.grad_rms_over_eps) < config.min_grad_rms_over_eps:
            lines.append(
                f"adam: {name} is starved: the RMS of its gradient is {ratio:.2g} eps (alarm below "
                f"{config.min_grad_rms_over_eps:g}), lower optim.eps"
            )
    return lines


class AdamMonitor:
    """Keeps a sample of gradients on the device; reads the moments where that is due."""

    def __init__(
        self,
        config: AdamMonitorConfig,
        optimizer: Iterable[Optimizer],
        runtime: Runtime,
        *,
        period: int = 0,
    ) -> None:
        """Monitor AdamW's parameters; beside Muon those are embeddings, head and norms.

        Args:
            config: How often, and which lags.
            optimizer: A list or an OptimizersContainer, built with named parameters.
            runtime: This rank.
            period: Steps after which a rotational curriculum repeats itself, R: one more lag,
                since exits then come and go with that period. 0: none.
        """
        self._config, self._runtime = config, runtime
        self._lags = sorted({*range(1, config.lags + 1), *((period,) if period else ())})
        self._groups: dict[str, list[_MonitoredParameter]] = {}
        for inner in optimizer:
            for options in inner.param_groups if isinstance(inner, AdamW) else ():
                for name, parameter in zip(options["param_names"], options["params"], strict=True):
                    monitored = _MonitoredParameter(parameter, inner, options, runtime.world_size)
                    self._groups.setdefault(group_of(name), []).append(monitored)
        self._steps_seen = 0
        self._update_rms: dict[str, float] = {}
        if config.interval_steps:
            self._sample()

    def _sample(self) -> None:
        """Choose the coordinates whose gradients are kept, evenly spread over a group."""
        rows, columns = STEPS_BEYOND_LAG + self._lags[-1], 0
        self._columns: dict[str, slice] = {}
        for name, group in self._groups.items():
            budget = SAMPLED * min(p.copies for p in group) // self._runtime.world_size
            stride = -(-sum(p.numel for p in group) // max(budget, 1)) | 1
            begin, phase = columns, 0
            for monitored in group:
                monitored.sampled = slice(phase, None, stride)
                taken = len(range(phase, monitored.numel, stride))
                monitored.zeros = torch.zeros(taken, device=monitored.device)
                phase += taken * stride - monitored.numel
                columns += taken
            self._columns[name] = slice(begin, columns)
        device = next(iter(self._groups.values()))[0].device
        self._ring = torch.zeros(rows, columns, device=device)

    def due(self, done_steps: int) -> bool:
        """Whether a reading follows the step that makes it `done_steps`."""
        interval = self._config.interval_steps
        return bool(interval) and done_steps % interval == 0

    @torch.no_grad()
    def observe(self) -> None:
        """Keep this step's sampled gradients; call it after clipping, before `zero_grad`.

        The host does not wait for the device.
        """
        if not self._config.interval_steps:
            return
        parts = [monitored.sampled_grad() for group in self._groups.values() for monitored in group]
        torch.cat(parts, out=self._ring[self._steps_seen % len(self._ring)])
        self._steps_seen += 1

    @torch.no_grad()
    def read(self) -> AdamStatistics:
        """Return the statistics of the whole model; every rank calls this after the same step."""
        rows = [
            torch.cat((_moment_sums(group), self._gradient_sums(name)))
            for name, group in self._groups.items()
        ]
        sums = self._runtime.sum_over_ranks(torch.stack(rows).to(self._runtime.device))
        by_group = zip(self._groups, HostCopy(sums).read(), strict=True)
        groups = {name: self._statistics(name, row) for name, row in by_group}
        self._update_rms = {name: group.update_rms for name, group in groups.items()}
        return AdamStatistics(groups=groups)

    def _gradient_sums(self, name: str) -> Tensor:
        """Return (2 + 3 lags,) float64: see `_statistics`. Steps with NaN or inf count as absent.

        r_k = sum_t g_t g_{t-k} / sqrt(sum_t g_t^2 sum_t g_{t-k}^2), over the group's coordinates,
        is not centred: to Adam a constant gradient is one perfectly correlated with itself.
        """
        now = self._steps_seen % len(self._ring)
        ordered = torch.cat((self._ring[now:], self._ring[:now]))[-max(self._steps_seen, 1) :]
        g = ordered[:, self._columns[name]].double()
        finite = g.isfinite().all(dim=1)
        shares = torch.cat([p.zeros + 1 / p.copies for p in self._groups[name]]).double()
        g = torch.where(finite[:, None], g, 0.0) * shares.sqrt()
        products, present = g @ g.T, finite.double()
        squares = products.diagonal()
        sums = [squares.sum(), present.sum() * shares.sum()]
        for lag in self._lags:
            sums += [
                products.diagonal(-lag).sum(),
                (squares[lag:] * present[:-lag]).sum(),
                (squares[:-lag] * present[lag:]).sum(),
            ]
        return torch.stack(sums)

    def _statistics(self, name: str, row: list[float]) -> GroupStatistics:
        total = dict(zip(POWERS, row, strict=False))
        histogram = row[len(POWERS) : len(POWERS) + BINS]
        squares, values, *lagged = row[len(POWERS) + BINS :]
        count = max(total["count"], 1.0)
        eps = float(self._groups[name][0].options["eps"])
        return GroupStatistics(
            adam_steps=total["steps"] / count,
            update_rms=math.sqrt(total["u2"] / count),
            update_rms_before=self._update_rms.get(name),
            share_large=total["large"] / count,
            share_starved=total["starved"] / count,
            bimodality=bimodality(*(total[f"u{power}"] / count for power in range(1, 5))),
            grad_rms_over_eps=math.sqrt(squares / max(values, 1.0)) / eps,
            lags={
                lag: product / math.sqrt(late * early) if late * early > 0 else 0.0
                for lag, product, late, early in zip(
                    self._lags, lagged[::3], lagged[1::3], lagged[2::3], strict=True
                )
            },
            histogram=tuple(round(value) for value in histogram),
        )


class _MonitoredParameter:
    """One parameter: its gradient, its moments and the sampled coordinates of its shard."""

    sampled: slice
    zeros: Tensor

    def __init__(
        self, parameter: Tensor, optimizer: Optimizer, options: dict[str, Any], world_size: int
    ) -> None:
        self.parameter, self.optimizer, self.options = parameter, optimizer, options
        self.copies = num_replicas(parameter, world_size)
        with torch.no_grad():
            local = local_part(parameter)
        self.numel, self.device = local.numel(), local.device

    def sampled_grad(self) -> Tensor:
        """Return the sampled coordinates; a parameter no exit reached has a gradient of 0."""
        grad = self.parameter.grad
        return self.zeros if grad is None else local_part(grad).reshape(-1)[self.sampled].float()


def _moment_sums(group: list[_MonitoredParameter]) -> Tensor:
    """Return (8 + 64,) float64: this rank's POWERS and histogram, each shard counted once."""
    device = group[0].device
    sums = torch.zeros(len(POWERS) + BINS, dtype=torch.float64, device=device)
    for monitored in group:
        state = monitored.optimizer.state.get(monitored.parameter)
        if not state:
            continue
        beta1, beta2 = monitored.options["betas"]
        eps, step = monitored.options["eps"], state["step"].double().to(device)
        # At step 0, which only a skipped first update leaves, both moments are 0.
        correction1 = (1 - beta1**step).clamp(min=1e-30).float()
        correction2 = (1 - beta2**step).clamp(min=1e-30).float()
        moments = (local_part(state[key]).reshape(-1) for key in ("exp_avg", "exp_avg_sq"))
        for m, v in zip(*(moment.split(CHUNK) for moment in moments), strict=True):
            if not len(m):
                continue
            denominator = (v.float() / correction2).sqrt_()
            starved = (denominator < 10 * eps).sum()
            u = (m.float() / correction1).div_(denominator.add_(eps))
            u2 = u.square()
            bins = ((u + 2) * (BINS / 4)).clamp_(0, BINS - 1).to(torch.uint8)
            part = [u.sum(), u2.sum(), (u2 * u).sum(), u2.square().sum(), (u.abs() > LARGE).sum()]
            part += [starved, step * len(m)]
            part = [torch.full_like(step, len(m)), *(value.double() for value in part)]
            counts = torch.bincount(bins, minlength=BINS).double()
            sums += torch.cat((torch.stack(part), counts)) / monitored.copies
    return sums
