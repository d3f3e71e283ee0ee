"""Confidence thresholds, fitted for each row to whether its past exits were right.

FREE (arXiv 2310.05424), section 4.3: confidences are a mixture of two Beta distributions. Ours is
fitted by expectation maximisation, weights included, where the authors' code fixes each token's
group by its label; it keeps a row's last tokens only, all of them, and leaves a threshold as it is
while there are too few. Runs no model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.engine.state import DecodeState

_FEWEST = 4
"""Least tokens of each kind, right and wrong, that a threshold is fitted to."""
_WINDOW = 256
"""Most tokens it is fitted to."""
_EDGE = 1e-3
"""Confidences nearer to 0 or 1 than this are moved to it, where the density is finite."""


@dataclass(frozen=True)
class BetaMixture:
    """Two groups k of tokens, for each row; tensors are (rows, 2).

    p(c, y) = sum_k weight_k Beta(c; a_k, b_k) right_k^y (1 - right_k)^(1 - y), where c is the
    confidence and y = 1 if the exit was right.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    right: Tensor

    def joint(self, c: Tensor) -> Tensor:
        """Return log(weight_k Beta(c; a_k, b_k)), (rows, n, 2), for c: (rows, n) in (0, 1)."""
        a, b = self.a[:, None], self.b[:, None]
        scale = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        c = c.unsqueeze(-1)
        return self.weight[:, None].log() + scale + (a - 1) * c.log() + (b - 1) * (1 - c).log()

    def chance_right(self, c: Tensor) -> Tensor:
        """Return p(y = 1 | c), (rows, n), for c: (rows, n)."""
        return (self.joint(c).softmax(-1) * self.right[:, None]).sum(-1)


def fit(c: Tensor, y: Tensor, counts: Tensor, iterations: int = 25) -> BetaMixture:
    """Fit a mixture to each row by expectation maximisation, starting from y as the groups.

    Beta's parameters are found from mean m and variance s^2 of a group, a = m (m (1 - m) / s^2 - 1)
    and b = (1 - m) (m (1 - m) / s^2 - 1), as the authors do, in place of the likelihood's maximum.

    Args:
        c: (rows, n), confidences in [0, 1].
        y: (rows, n) bool, whether the exit was right.
        counts: (rows, n) bool, tokens that count.
        iterations: Of expectation maximisation; more change little for a few hundred tokens.
    """
    c = c.clamp(_EDGE, 1 - _EDGE)
    belongs = torch.where(y, 0.9, 0.1)
    r = torch.stack((belongs, 1 - belongs), dim=-1) * counts.unsqueeze(-1)  # (rows, n, 2)
    mixture = _maximise(c, y, r)
    for _ in range(iterations):
        right = mixture.right[:, None].clamp(_EDGE, 1 - _EDGE)
        outcome = torch.where(y.unsqueeze(-1), right.log(), (1 - right).log())
        r = (mixture.joint(c) + outcome).softmax(-1) * counts.unsqueeze(-1)
        mixture = _maximise(c, y, r)
    return mixture


def _maximise(c: Tensor, y: Tensor, r: Tensor) -> BetaMixture:
    """Return the mixture for r: (rows, n, 2), the responsibility of each group for each token."""
    mass = r.sum(1).clamp(min=_EDGE)  # (rows, 2)
    m = ((r * c.unsqueeze(-1)).sum(1) / mass).clamp(_EDGE, 1 - _EDGE)
    s2 = (r * (c.unsqueeze(-1) - m[:, None]) ** 2).sum(1) / mass
    spread = m * (1 - m)
    size = spread / s2.clamp(min=1e-4).minimum(0.9 * spread) - 1
    return BetaMixture(
        weight=mass / mass.sum(-1, keepdim=True),
        a=m * size,
        b=(1 - m) * size,
        right=(r * y.unsqueeze(-1)).sum(1) / mass,
    )


def fitted_threshold(c: Tensor, y: Tensor, counts: Tensor, zeta: float, old: Tensor) -> Tensor:
    """Return the least confidence from which on an exit is right with a chance above zeta: (rows,).

    In steps of 1/100; 1 if there is none. Arguments as in `fit`, and old: (rows,), the result where
    fewer than 4 tokens were right or fewer than 4 wrong.
    """
    grid = torch.arange(1, 100, device=c.device, dtype=c.dtype).expand(len(c), -1) / 100
    good = fit(c, y, counts).chance_right(grid) > zeta
    first_of_all_good = 99 - good.flip(-1).long().cumprod(-1).sum(-1)
    found = (first_of_all_good + 1).to(c.dtype) / 100
    right, wrong = (y & counts).sum(-1), (~y & counts).sum(-1)
    return torch.where(right.minimum(wrong) >= _FEWEST, found, old)


def block_length(longest_round: int) -> int:
    """Return the new tokens of a block; a threshold is the first one for two of them."""
    return max(16, longest_round)


class RowThresholds:
    """A threshold for each row of a batch, reset with the row's prompt.

    New tokens are counted in blocks. In block k the threshold is fitted to tokens of blocks before
    k - 1, which have all been verified by then, wherever rounds began and ended: a row has the
    thresholds, and so the tokens, that it would have alone.

    Args:
        state: The batch.
        exits: Number of exits that share a threshold.
        first: The initial threshold.
        zeta: See `fitted_threshold`.
        longest_round: Most tokens of a round.
    """

    def __init__(
        self, state: DecodeState, *, exits: int, first: float, zeta: float, longest_round: int
    ) -> None:
        rows, device = len(state.batch), state.batch.device
        self._state, self._first, self._zeta = state, first, zeta
        self._length = block_length(longest_round)
        self._now = torch.full((rows,), first, device=device)
        self._next = self._now
        self._block = torch.zeros_like(state.batch.positions)
        self._new = self._block
        # A ring buffer over new tokens, for each exit.
        slots = _WINDOW + self._length
        self._c = torch.zeros(rows, slots, exits, device=device)
        self._y = torch.zeros(rows, slots, exits, dtype=torch.bool, device=device)
        self._reached = self._y.clone()

    def begin(self) -> None:
        """Fit the thresholds of rows that have entered another block, at the start of a round."""
        self._new = self._state.batch.new_tokens.clamp(min=0)
        block = self._new // self._length
        fresh = self._new == 0
        self._block = self._block.masked_fill(fresh, 0)
        self._now, self._next = (t.masked_fill(fresh, self._first) for t in (self._now, self._next))
        moved = block > self._block
        if self._state.sync_bool(moved.any()):
            fitted = self._fit(block * self._length)
            changed = moved & (self._next != self._now) & ~self._state.batch.finished
            for threshold in self._state.sync_list(self._next[changed]):
                self._state.counters.thresholds[round(threshold, 2)] += 1
            self._now = torch.where(moved, self._next, self._now)
            self._next = torch.where(moved, fitted, self._next)
            self._block = block

    def of_token(self, i: int) -> Tensor:
        """Return the threshold of each row, (batch,), for token i of the round."""
        return torch.where((self._new + i) // self._length > self._block, self._next, self._now)

    def update(self, c: Tensor, y: Tensor, reached: Tensor) -> None:
        """Record the tokens of a round.

        Args:
            c: (batch, n, exits), confidence of each exit.
            y: (batch, n, exits) bool, whether the last layer predicts the same token.
            reached: (batch, n, exits) bool, whether the row's token got as far as this exit.
        """
        steps = torch.arange(c.shape[1], device=c.device)
        slots = ((self._new[:, None] + steps) % self._c.shape[1])[..., None].expand(c.shape)
        for buffer, values in ((self._c, c), (self._y, y), (self._reached, reached)):
            buffer.scatter_(1, slots, values)

    def _fit(self, end: Tensor) -> Tensor:
        """Return the threshold fitted to each row's new tokens before end: (batch,)."""
        index = end[:, None] - 1 - torch.arange(_WINDOW, device=end.device)
        slots = (index % self._c.shape[1])[..., None].expand(-1, -1, self._c.shape[2])
        c, y, reached = (buffer.gather(1, slots) for buffer in (self._c, self._y, self._reached))
        counts = reached & (index >= 0)[..., None]
        return fitted_threshold(
            c.flatten(1), y.flatten(1), counts.flatten(1), self._zeta, self._next
        )
