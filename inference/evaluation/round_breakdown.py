"""Where the time of decoding rounds goes, in full steps: as predicted, and as measured."""

from collections.abc import Mapping, Sequence

from inference.cli.terminal import format_table
from inference.evaluation.arm_result import ArmResult
from inference.evaluation.costs import Costs
from inference.evaluation.measurement import AUTOREGRESSIVE
from inference.evaluation.prediction import Prediction
from inference.evaluation.report import short_names

PREDICTION_LEGEND = """\
branch     candidates for each drafted token: the best number
agrees     chance that a drafted token is accepted; greedy, the share of tokens where the
           exit predicts the last layer's
speedup    tokens/round over the full steps of a round, predicted
draft      full steps of a round in the layers that draft; verify: in the others
head       full steps in the LM head; overhead: in the rest of a round, which is below 0
           where passes take less time in a round than each alone
without_x  the speedup if x took no time"""

ROUND_LEGEND = """\
worth      tokens of a round, in steps of plain decoding
took       full steps of a round: worth / speedup
overhead   what the passes, timed alone, do not account for; below 0, as passes in a
           round, one after the other, take less time than each alone
most_on    the largest part"""


def prediction_table(predictions: Sequence[Prediction], L: int) -> str:
    """Return, for each E, its best d and branch and where the time of a round goes."""
    header = "E d branch agrees tokens/round draft verify head overhead speedup"
    header += " without_draft without_head"
    rows = []
    for E in range(1, L):
        p = next(p for p in predictions if p.E == E)  # the best first
        rows.append(
            [str(E), str(p.d), str(p.branch), f"{p.agreement:.3f}", f"{p.tokens_per_round:.2f}"]
            + [f"{p.draft:.2f}", f"{p.verify:.2f}", f"{p.head:.2f}", f"{p.overhead:.2f}"]
            + [f"{p.speedup:.2f}x"]
            + [_speedup(p, p.round - p.draft), _speedup(p, p.round - p.head)]
        )
    return format_table(header.split(), rows)


def leaves_line(predictions: Sequence[Prediction]) -> str:
    """Return what leaves are predicted to add at best, and what they could if they cost nothing."""
    plain = next(p for p in predictions if p.branch == 1)
    best = next((p for p in predictions if p.branch > 1), None)
    if best is None:
        return "leaves: none tried"
    same = next(p for p in predictions if (p.E, p.d, p.branch) == (best.E, best.d, 1))
    bound = max(p.tokens_per_round / (p.round - p.leaves) for p in predictions)
    return (
        f"leaves: E={best.E}:d={best.d}:branch={best.branch} has {best.tokens_per_round:.2f} "
        f"tokens/round instead of {same.tokens_per_round:.2f}, for {best.leaves:.2f} full steps "
        f"more: {best.speedup:.2f}x;\nthe best without leaves {plain.speedup:.2f}x; "
        f"the best if leaves took no time {bound:.2f}x"
    )


def _speedup(p: Prediction, steps: float) -> str:
    """Return the speedup of a round of so many steps; "-" where one part alone takes longer."""
    return f"{p.tokens_per_round / steps:.2f}x" if steps > 0 else "-"


def round_cost_breakdown(result: ArmResult, costs: Costs) -> dict[str, float]:
    """Return the full steps of a round that the arm's passes account for, by kind of pass."""
    L = len(costs.draft) + 1
    parts = {"draft": 0.0, "verify": 0.0, "head": 0.0}
    for start, stop, n, times in result.passes:
        part = "draft" if start == 0 and stop < L and n == 1 else "verify"
        parts[part] += times * costs.of_layers(start, stop, n)
    parts["head"] = sum(times * costs.of_head(n) for n, times in result.head_passes)
    return {part: steps / _rounds(result, L) for part, steps in parts.items()}


def _rounds(result: ArmResult, L: int) -> int:
    """Return the rounds of a batch: in each, the last layer is run once."""
    return sum(times for _, stop, _, times in result.passes if stop == L)


def round_terms(results: Sequence[ArmResult], costs: Costs) -> dict[str, dict[str, float]]:
    """Return, for each arm, the full steps of its rounds and of their parts; see the legend."""
    L, found = len(costs.draft) + 1, {}
    plain = next(result for result in results if result.strategy == AUTOREGRESSIVE.name)
    for r in results:
        worth = _rounds(plain, L) / _rounds(r, L)
        parts, took = round_cost_breakdown(r, costs), worth / r.speedup
        parts["overhead"] = took - sum(parts.values())
        found[r.settings] = {"worth": worth, "took": took, **parts}
    return found


def round_table(rounds: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table of `round_terms`."""
    header, rows = "strategy worth took draft verify head overhead most_on", []
    names = short_names(rounds)
    for settings, row in rounds.items():
        parts = [name for name in row if name not in ("worth", "took")]
        largest = max(parts, key=lambda name: row[name])
        rows.append([names[settings], *(f"{value:.2f}" for value in row.values()), largest])
    return format_table(header.split(), rows)
