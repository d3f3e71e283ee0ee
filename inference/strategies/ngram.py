"""N-gram lookup: drafts the tokens that followed the last few where those came before in the row.

Prompt lookup decoding. Runs no model.
"""

import torch
from torch import Tensor


def look_up(history: Tensor, positions: Tensor, longest: int, d: int) -> tuple[Tensor, Tensor]:
    """Draft the next d tokens of each row.

    The last n tokens are searched for before the end of the row, for the largest n from `longest`
    down to 2 (to 1 if `longest` is 1) that is found, and the latest occurrence counts. The tokens
    after it are the draft; from the end of the row on, the draft repeats itself.

    Args:
        history: (batch, slots) int64, each row's tokens by position.
        positions: (batch,) int64, position of each row's last token.
        longest: Most tokens to search for.
        d: Tokens to draft.

    Returns:
        drafts: (batch, d) int64, and found: (batch,) bool.
    """
    index = torch.arange(history.shape[1], device=history.device)
    match = torch.full_like(positions, -1)  # position of the last matching token
    same = index < positions[:, None]
    for k in range(min(longest, history.shape[1])):
        last = history.gather(1, (positions - k).clamp(min=0)[:, None])
        same = same & (history.roll(k, 1) == last) & (index >= k) & (positions[:, None] >= k)
        if k > 0 or longest == 1:
            latest = torch.where(same, index, -1).amax(1)
            match = torch.where(latest >= 0, latest, match)
    found = match >= 0
    period = torch.where(found, positions - match, 1)
    steps = torch.arange(d, device=history.device) % period[:, None]
    return history.gather(1, (match[:, None] + 1 + steps).clamp(min=0)), found
