"""A round on its way to the host. Imports no model."""

from collections.abc import Collection

import torch

from inference.engine.batch import Round
from models.host_copy import HostCopy


def cut(
    new: list[int], accepted: int, drafted: int, limit: int, stop_tokens: Collection[int]
) -> tuple[list[int], int, int]:
    """Return what a row takes of a round, and how many of its drafts were accepted, of how many.

    Drafts behind the row's end came to nothing: they count as neither.

    Args:
        new: Tokens of the round.
        accepted: The drafted ones among them, the first.
        drafted: Tokens drafted.
        limit: Most tokens that may be added.
        stop_tokens: Ids that end a row; the first is its last token.
    """
    new = new[: accepted + 1][:limit]
    stops = [i for i, token in enumerate(new) if token in stop_tokens]
    new = new[: stops[0] + 1] if stops else new
    return (new, len(new), len(new)) if len(new) <= accepted else (new, accepted, drafted)


class InFlightRound:
    """A round whose tokens the host has not read; later rounds may overwrite its tensors.

    Args:
        result: The round.
        rows: The prompt that was in each row.
    """

    def __init__(self, result: Round, rows: list[int | None]) -> None:
        self.rows, self.n = rows, result.tokens.shape[1]
        self.most_drafted = self.n - 1 if result.most_drafted is None else result.most_drafted
        counts = [result.accepted, result.drafted]
        if result.leaf is not None:
            counts.append(result.leaf)
        self._counts = len(counts)
        parts = [result.tokens, torch.stack(counts, dim=1)]
        if result.depths is not None:
            parts.append(result.depths)
        self._numbers = HostCopy(torch.cat(parts, dim=1))

    def read(
        self,
    ) -> tuple[list[list[int]], list[int], list[int], list[int], list[list[int]] | None]:
        """Return tokens, accepted, drafted, leaf and depths of all rows, as in `Round`."""
        numbers, n, counts = self._numbers.read(), self.n, self._counts
        depths = [row[n + counts :] for row in numbers]
        return (
            [row[:n] for row in numbers],
            [row[n] for row in numbers],
            [row[n + 1] for row in numbers],
            [row[n + 2] if counts == 3 else 0 for row in numbers],
            depths if depths[0] else None,
        )
