"""Strategies and costs as measured: now, or before, in files that others may have written."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from data.foreign_json import build, read_object, take
from inference.evaluation import report
from inference.evaluation.costs import Costs
from inference.evaluation.prediction import Prediction
from inference.report_page.source import LONGEST, Source, date_of, file_date, machine_line
from inference.strategies.registry import parse_strategy, shorten
from inference.strategies.self_speculative import SelfSpeculative

T = TypeVar("T")

MAX_ARMS = 100
_MAX_POSITIONS = 256
_UNSTEADY = 1.5
"""The fastest repeat of the base over its slowest, above which a machine is not quiet."""


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """How drafts went, see `inference.engine.counters.describe_drafts`."""

    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    stops: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What the report shows of a strategy, see `inference.evaluation.arm_result.ArmResult`."""

    strategy: str
    settings: str
    tokens: int
    tokens_per_second: float
    speedup: float
    speeds: list[float]
    speedups: list[float]
    layers_per_token: float
    full_choice: float
    log_likelihood: float
    batch_size: int = 1
    E: int | None = None
    d: int | None = None
    acceptance_rate: float | None = None
    agreement: float | None = None
    bound: float | None = None
    same_tokens: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    drafts: Drafts = field(default_factory=Drafts)

    @property
    def spread(self) -> list[list[float]]:
        """How far the least and the most of the repeats' speedups are from the median."""
        below, above = self.speedup - min(self.speedups), max(self.speedups) - self.speedup
        return [[max(0.0, below)], [max(0.0, above)]]

    @property
    def quality(self) -> float:
        """A task's first measure, or the share of tokens that the full model would choose."""
        return next(iter(self.scores.values()), self.full_choice)


@dataclass(frozen=True)
class Arms:
    """Strategies measured side by side, autoregressive decoding first."""

    arms: Sequence[Arm]
    source: Source

    @property
    def repeats(self) -> int:
        """Times each was measured."""
        return len(self.arms[0].speeds)

    @property
    def is_doubtful(self) -> bool:
        """Whether plain decoding itself took very different times: the machine was busy."""
        speeds = self.arms[0].speeds
        return max(speeds) > _UNSTEADY * min(speeds)

    @property
    def measure(self) -> str:
        """What `Arm.quality` is."""
        return next(iter(self.arms[0].scores), "tokens that the full model finds most probable")


@dataclass(frozen=True)
class Tuning:
    """Costs of passes and rounds, and the speedups that follow."""

    costs: Costs
    predictions: Sequence[Prediction]
    """The best first."""
    rounds: Mapping[str, Mapping[str, float]]
    """Of measured strategies, see `inference.evaluation.round_breakdown.round_terms`."""
    source: Source


def short_names(settings: Sequence[str]) -> dict[str, str]:
    """Return strategies' short names by their text; the text itself where that is not unique.

    d is named also where it is at its default.
    """
    names = report.short_names(settings, _short)
    return {text: text[:LONGEST] if name == text else name for text, name in names.items()}


def _short(text: str) -> str:
    try:
        strategy, name = parse_strategy(text), shorten(text)
    except ValueError:  # of another version, or no strategy at all
        return text[:LONGEST]
    if isinstance(strategy, SelfSpeculative) and ":d=" not in name:
        head, *rest = name.split(":")
        return ":".join([head, *rest[:1], f"d={strategy.d}", *rest[1:]])
    return name


def arms_from(results: Sequence[Mapping[str, Any]]) -> list[Arm]:
    """Return the arms out of the JSON of a benchmark, or of `asdict` of results.

    Raises:
        ValueError: They are none.
    """
    if not 1 <= len(results) <= MAX_ARMS:
        raise ValueError(f"arms: {len(results)}, give 1 to {MAX_ARMS}")
    found = [
        _part(Arm, r | {"drafts": _part(Drafts, r.get("drafts", {}))}) for r in map(dict, results)
    ]
    for arm in found:
        if not 1 <= len(arm.speeds) == len(arm.speedups) <= 10_000:
            raise ValueError("speeds: give as many as speedups, at least 1")
        if not 0 <= len(arm.drafts.accepted_at) == len(arm.drafts.drafted_at) <= _MAX_POSITIONS:
            raise ValueError("drafts: give as many positions accepted_at as drafted_at")
    return found


def _part(kind: type[T], content: Any) -> T:
    """Return a dataclass of the fields that an object has of it; it may have others."""
    if not isinstance(content, dict):
        raise ValueError("it is no object, {...}")
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return build(kind, {name: value for name, value in content.items() if name in names})


def read_benchmark(path: Path, field_name: str, step: int | None = None) -> Arms:
    """Return the arms of a file that `inference.benchmark --json` wrote.

    Args:
        path: The file.
        field_name: Of the option, for errors.
        step: Of the checkpoint it is to be of; None: any.

    Raises:
        ValueError: It is no such file.
    """
    try:
        content = read_object(path)
        arms = arms_from(take(content, "arms", list[dict[str, Any]]))
        machine = take(content, "machine", dict[str, Any])
        found = take(content, "step", int)
        if step is not None and found != step:
            raise ValueError(f"it is of step {found}, not {step}")
        checkpoint = take(content, "checkpoint", str)
    except OSError as error:
        raise ValueError(
            f"{field_name}: {path} cannot be read ({error.strerror}), give another path"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{field_name}: {path} is not what inference.benchmark --json writes ({error}), "
            "measure again"
        ) from None
    repeats = len(arms[0].speeds)
    source = Source(
        "python -m inference.benchmark " + shlex.join(["--run", checkpoint, "--json", path.name]),
        f"read from {path.name}, {_repeats(repeats)}",
        machine_line(machine),
        date_of(machine) or file_date(path),
    )
    return Arms(arms, source)


def _is_sane(prediction: Prediction) -> bool:
    return prediction.round > 0 and 0 < prediction.speedup < 1e3


def _repeats(repeats: int) -> str:
    return "one run" if repeats == 1 else f"median and range of {repeats} repeats"


def tuning_from(record: Mapping[str, Any], n_layers: int, path: Path) -> Tuning:
    """Return the costs and predictions of a record that `inference.tune` kept.

    Raises:
        ValueError: It is none, or of a model of another depth.
    """
    content = dict(record)
    costs = build(Costs, take(content, "costs", dict[str, Any]))
    made = [_part(Prediction, p) for p in take(content, "predictions", list[dict[str, Any]])]
    # The picture has no axis for leaves.
    plain = [p for p in made if p.branch == 1 and _is_sane(p)]
    predictions = [p for p in plain if 1 <= p.E < n_layers and 1 <= p.d <= 64]
    rounds = take(content, "rounds", dict[str, dict[str, float]])
    machine = take(content, "machine", dict[str, Any])
    whole = len(costs.draft) == len(costs.rounds) == n_layers - 1 and costs.full_step_seconds > 0
    if not predictions or not whole or len(rounds) > MAX_ARMS:
        raise ValueError("costs: of another model")
    source = Source(
        "python -m inference.tune",
        f"read from {path.name} beside the checkpoint",
        machine_line(machine),
        date_of(machine),
    )
    return Tuning(costs, sorted(predictions, key=lambda p: -p.speedup), rounds, source)
