"""Speedups for every E, d and branch, from costs and from how often candidates are accepted."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from inference.evaluation.costs import Costs


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The speedup predicted for E, d and branch; costs of a round are in full steps."""

    E: int
    d: int
    branch: int
    agreement: float
    """a_E: mean chance that a token drafted after those before it in the text is accepted; greedy,
    the share of tokens where the exit predicts the last layer's token. Beside it, `Counters`
    counts the drafted tokens alone."""
    tokens_per_round: float
    draft: float
    """Spent on single tokens in the layers that draft, the pending and all drafted ones."""
    verify: float
    """Spent on the layers that verify."""
    head: float
    """Spent on the head, for drafts and verification."""
    overhead: float
    """Spent on the rest: accepting drafts and putting tensors together, less the time that passes
    save in a round over passes alone."""
    leaves: float
    """Of all these, what leaves add."""

    @property
    def round(self) -> float:
        """Full steps of a round."""
        return self.draft + self.verify + self.head + self.overhead

    @property
    def speedup(self) -> float:
        """tokens_per_round / round."""
        return self.tokens_per_round / self.round


def tokens_per_round(chances: Sequence[Tensor], E: int, d: int, branch: int = 1) -> float:
    """Return the tokens per round of E, d and branch along recorded continuations.

    Greedy drafts that are accepted are the continuation itself, so this is exact; of sampled ones
    it is the mean, as if drafts followed the continuation. The n of n + 1 tokens accepted by chance
    a each, 1 + a + ... + a^d in all (Leviathan et al., arXiv 2211.17192, eq. 1), are so only where
    agreement does not come in streaks.

    Args:
        chances: Of each continuation, the chance that each candidate of each exit is accepted,
            (L, tokens, candidates), row E - 1 the exit after E, see `record_acceptance`.
        E: Layers that draft.
        d: Tokens drafted.
        branch: Candidates for each.
    """
    rounds = 0.0
    for chance in chances:
        first, leaves = chance[E - 1, :, 0], chance[E - 1, :, 1:branch]
        rounds += _expected_rounds(first.tolist(), (1 - (1 - leaves).prod(-1)).tolist(), d)
    return sum(chance.shape[1] for chance in chances) / rounds


def _expected_rounds(chance: list[float], mended: list[float], d: int) -> float:
    """Return the rounds that d drafts each take.

    Args:
        chance: Of each token, to be accepted.
        mended: Of each, to be accepted as a leaf where it is not.
        d: Tokens drafted.
    """
    tokens = len(chance)
    left = [0.0] * (tokens + 1)
    """Rounds that the tokens from each position on take."""
    for position in reversed(range(tokens)):
        drafted, reached = min(d, tokens - position - 1), 1.0
        left[position] = 1.0
        for i in range(position, position + drafted):
            after = left[i + 1] + mended[i] * (left[i + 2] - left[i + 1])
            left[position] += reached * (1.0 - chance[i]) * after
            reached *= chance[i]
        left[position] += reached * left[position + drafted + 1]
    return left[0]


def predict(chances: Sequence[Tensor], costs: Costs, max_d: int) -> list[Prediction]:
    """Return the prediction for every E, every d up to `max_d` and every branch, the best first.

    speedup = tokens_per_round / (d c_E + v_E), by the costs of whole rounds.

    Args:
        chances: See `tokens_per_round`; as many candidates as are to be tried.
        costs: Measured with as many.
        max_d: Largest d.
    """
    first, L = torch.cat(list(chances), dim=1)[..., 0], len(costs.draft) + 1
    agreement, branches = first.mean(1).tolist(), chances[0].shape[2]
    found = []
    for E, d, branch in product(range(1, L), range(1, max_d + 1), range(1, branches + 1)):
        draft, verify, head, overhead = costs.of_round(E, d, branch)
        found.append(
            Prediction(
                E=E,
                d=d,
                branch=branch,
                agreement=agreement[E - 1],
                tokens_per_round=tokens_per_round(chances, E, d, branch),
                draft=draft,
                verify=verify,
                head=head,
                overhead=overhead,
                leaves=costs.of_leaves(d * (branch - 1)),
            )
        )
    return sorted(found, key=lambda prediction: -prediction.speedup)
