"""Drafts for nothing: what followed the last few tokens when they came before in the same row.

Prompt lookup decoding. Knows nothing of models.
"""

import torch
from torch import Tensor


def look_up(history: Tensor, positions: Tensor, longest: int, d: int) -> tuple[Tensor, Tensor]:
    """Guess the next d tokens of each row.

    The latest place before the end where the last n tokens stand decides, for the largest n from
    `longest` down to 2 (to 1 if `longest` is 1) that is found. What followed there is the guess;
    where the end of the row is reached, it goes on as if the row repeated itself from there.

    Args:
        history: (batch, slots) int64, each row's tokens by place.
        positions: (batch,) int64, place of each row's last token.
        longest: Most tokens to look for.
        d: Tokens to guess.

    Returns:
        guesses: (batch, d) int64, and found: (batch,) bool.
    """
    place = torch.arange(history.shape[1], device=history.device)
    after = torch.full_like(positions, -1)  # the place of the last matching token
    same = place < positions[:, None]
    for k in range(min(longest, history.shape[1])):
        last = history.gather(1, (positions - k).clamp(min=0)[:, None])
        same = same & (history.roll(k, 1) == last) & (place >= k) & (positions[:, None] >= k)
        if k > 0 or longest == 1:
            latest = torch.where(same, place, -1).amax(1)
            after = torch.where(latest >= 0, latest, after)
    found = after >= 0
    period = torch.where(found, positions - after, 1)
    steps = torch.arange(d, device=history.device) % period[:, None]
    return history.gather(1, (after[:, None] + 1 + steps).clamp(min=0)), found
