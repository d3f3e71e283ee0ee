"""What was run, in one line and in a few numbers; the machine and versions behind the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inference.loading.run import Run
from inference.report_page.exits import RunExits
from inference.report_page.measurements import Arm, Arms, short_names
from inference.report_page.metrics_log import LossLog
from inference.report_page.page import Section, table
from inference.report_page.source import number
from inference.report_page.visible import safe
from inference.strategies.registry import parse_strategy
from models.flops import total_params

Fact = tuple[str, str]
"""A number, and what it is."""


def lead_line(run: Run, log: LossLog | None) -> str:
    """Return what was run in one line."""
    config, setting = run.model.config, run.manifest.setting
    parts = [
        f"{_count(total_params(config))} parameters",
        f"{config.n_layers} layer{'s' * (config.n_layers > 1)} of width {config.dim}",
        f"{config.vocab_size:,} token ids, context {config.max_seq_len:,}",
    ]
    if not run.manifest.config:
        return "; ".join([*parts, "no configuration of a training, such as after a conversion"])
    tokens = f", {_count(log.tokens)} tokens" if log is not None and log.tokens else ""
    data = setting("data.path", str | None, None)
    parts.append(f"step {run.manifest.step:,}{tokens}" + (f" of {Path(data).name}" if data else ""))
    p_max = setting("layer_dropout.p_max", float, 0.0)
    parts.append(f"layer dropout up to {p_max:g}" if p_max else "no layer dropout")
    scale, kind = (setting(name, hint, None) for name, hint in _EXITS)
    if scale == 0.0:
        parts.append("no exit loss")
    elif kind is not None and scale is not None:
        parts.append(f"exit loss by curriculum {kind}, e_scale {scale:g}")
    return "; ".join(parts)


_EXITS: tuple[tuple[str, Any], ...] = (
    ("early_exit.e_scale", float | None),
    ("curriculum.C", str | None),
)


def _count(value: float) -> str:
    """Return a large number in short: 1.9 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def best_lossless(arms: Arms | None) -> Arm | None:
    """Return the fastest measured strategy that drafts and keeps the model's tokens."""
    drafting = [arm for arm in (arms.arms if arms else []) if _is_lossless(arm)]
    return max(drafting, key=lambda arm: arm.speedup, default=None)


def _is_lossless(arm: Arm) -> bool:
    try:
        return arm.acceptance_rate is not None and parse_strategy(arm.settings).lossless
    except ValueError:
        return False


def facts(exits: RunExits, arms: Arms | None) -> list[Fact]:
    """Return the main numbers."""
    found: list[Fact] = []
    if exits.exits:
        last, half = exits.exits[-1], exits.exits[max(0, len(exits.exits) // 2 - 1)]
        depth = f", all {last.E} layers" * (last.E > 1)
        found.append((number(last.perplexity, ".2f"), f"held-out perplexity{depth}"))
        found.append((number(last.bits_per_byte, ".3f"), "held-out bits per byte"))
        if half is not last:
            found.append(
                (
                    number(half.agreement, ".0%"),
                    f"agreement of E={half.E} with all {last.E} layers",
                )
            )
    best = best_lossless(arms)
    if arms is not None and best is not None:
        spread = f", {min(best.speedups):.2f} to {max(best.speedups):.2f}" * (arms.repeats > 1)
        name = short_names([best.settings])[best.settings]
        doubt = "; the machine was busy, measure again" * arms.is_doubtful
        found.append((number(best.speedup, ".2f", "x"), f"speed of {name}{spread}{doubt}"))
        found.append((number(best.acceptance_rate, ".0%"), "of its drafted tokens accepted"))
    if arms is not None:
        speed = number(arms.arms[0].tokens_per_second, ",.0f")
        found.append((speed, "tokens/s decoded plainly"))
    return found


def machine_section(
    runs: Sequence[tuple[str, str]],
    here: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
) -> Section:
    """Return the machine, the versions and the commands.

    Args:
        runs: Name, and text of the checkpoint, of each.
        here: Of this machine, see `inference.loading.machine.machine`.
        command: That made the report.
        versions: Of the libraries that wrote the checkpoint.
    """
    rows = [["this report", f"<code>{safe(command, 400)}</code>"]]
    rows += [[safe(name), safe(checkpoint)] for name, checkpoint in runs]
    rows += [[safe(name), safe(str(value))] for name, value in here.items() if value is not None]
    if versions:
        text = ", ".join(f"{name} {value}" for name, value in sorted(versions.items()))
        rows.append(["trained with", safe(text)])
    body = table([], rows).replace("<td>", '<td class="text">')
    return Section("machine", "Machine, versions, commands", body)
