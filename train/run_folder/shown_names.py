"""How dashboards name what metrics.jsonl records, so that the alphabet begins with the losses.

They sort their charts by group, what stands before the slash: loss, losses_held_out,
losses_train, margin, marks, optim, perf, progress, schedule, speculation, updates.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from statistics import median

_RENAMED = tuple(
    (re.compile(pattern), shown)
    for pattern, shown in (
        ("train/loss", "loss/train"),
        ("train/J", "loss/train_J"),
        ("validation/loss", "loss/held_out"),
        ("validation_ema/loss", "loss/held_out_ema"),
        (r"train/loss_exit_(\d+)", r"losses_train/exit_\1"),
        (r"validation/loss_exit_(\d+)", r"losses_held_out/exit_\1"),
        (r"validation_ema/loss_exit_(\d+)", r"losses_held_out_ema/exit_\1"),
        (r"progress/(restarts|rollbacks|batch_size)", r"marks/\1"),
        (r"early_exit/(.+)", r"speculation/\1"),
        (r"layerskip/drop_prob_.+", ""),
        (r"layerskip/(.+)", r"schedule/\1"),
        (r"adam/(lag\d+|share_large|share_starved|bimodality|grad_rms_over_eps)/.+", ""),
    )
)
_ADAM = "adam/update_rms/"
_WORST = {"update_rms": max, "share_large": max, "share_starved": max, "grad_rms_over_eps": min}


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the charts of one record: renamed, and one number for all layers of Adam's statistics.

    What is left out is in a picture: see `train/run_folder/pictures.py`.
    """
    charts = {new: value for name, value in metrics.items() if (new := shown_name(name))}
    for statistic, worst in _WORST.items():
        prefix = f"adam/{statistic}/"
        found = [value for name, value in metrics.items() if name.startswith(prefix)]
        if found:
            charts[f"updates/{statistic}_{worst.__name__}"] = worst(found)
    if rms := [value for name, value in metrics.items() if name.startswith(_ADAM)]:
        charts["updates/update_rms_median"] = median(rms)
    return charts


@lru_cache(4096)
def shown_name(name: str) -> str:
    """Return the name of a metric on dashboards; "" where it has no chart of its own."""
    for pattern, new in _RENAMED:
        if match := pattern.fullmatch(name):
            return match.expand(new)
    return "" if name.startswith(_ADAM) else name
