"""Drafts with leaves: at each drafted position, the exit's next-best tokens are verified too.

Where an exit's first choice is wrong, its second or third is often right, and on most hardware a
few more rows of a verification cost next to nothing. The draft itself is a chain x_0, ..., x_{d-1};
each position has branch - 1 further candidates that nothing follows, its leaves. One pass verifies
all: a tree of tokens under a mask (SpecInfer, arXiv 2305.09781). The leaf that is taken moves to
the slot of its position.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.engine.candidates import accept_candidates
from inference.engine.kv_cache import TreeShape
from inference.engine.sampling import sample
from inference.engine.state import DecodeState
from inference.strategies.drafting import Draft


def check_branch(branch: int, tokens: int) -> None:
    """Refuse more candidates than there are tokens to draft from.

    Raises:
        ValueError: There are fewer.
    """
    if branch > tokens:
        raise ValueError(f"branch: {branch}, give at most {tokens} tokens to draft from")


@cache  # without a limit: graphs of rounds read these tensors where they are
def tree_shape(d: int, branch: int, device: torch.device) -> TreeShape:
    """Return the tree of the pending token, d drafted ones and d * (branch - 1) leaves.

    Leaves come after all drafted tokens, by position and then by rank.
    """
    numbers = torch.arange((d + 1) + d * (branch - 1), device=device)
    leaves = numbers[1 : d + 1, None].expand(-1, branch - 1).flatten()
    depths = torch.cat((numbers[: d + 1], leaves))
    # Every token sees the drafted ones before its depth, and itself.
    drafted = (numbers < depths[:, None]) & (numbers <= d)
    return TreeShape(depths, drafted | (numbers == numbers[:, None]))


@dataclass(frozen=True)
class VerifiedTree:
    """What the full model has for each token of a tree."""

    chain: Tensor
    """(batch, d + 1, vocab), after the pending token and each drafted one; see `draw_weights`."""
    leaves: Tensor
    """(batch, d * (branch - 1), vocab), after each leaf."""


def verify_tree(state: DecodeState, E: int, drafted: Draft) -> VerifiedTree:
    """Run what is left of the layers on a draft and its leaves.

    The last drafted token and the leaves have not been run: they go through the first E layers,
    then all through layers E, ..., L - 1 in one pass.

    Args:
        state: The batch.
        E: Layers that drafted.
        drafted: The draft, with leaves.
    """
    assert drafted.leaves is not None
    d, branch = drafted.tokens.shape[1], drafted.leaves.shape[2] + 1
    tree, done = state.open_tree(tree_shape(d, branch, state.batch.device)), len(drafted.exits)
    tokens = torch.cat((drafted.tokens[:, done - 1 :], drafted.leaves.flatten(1)), dim=1)
    x_E = state.run_tree(state.model.embed(tokens), 0, E, tree.since(done))
    x_E = torch.cat((*drafted.exits, x_E), dim=1)
    x_L = state.run_tree(x_E, E, state.model.config.n_layers, tree)
    p = state.distribution(x_L)
    return VerifiedTree(p[:, : d + 1], p[:, d + 1 :])


def accept_tree(state: DecodeState, drafted: Draft, verified: VerifiedTree) -> Round:
    """Accept drafted tokens, and a leaf in place of the first that is rejected.

    A leaf counts as a drafted token that was accepted.
    """
    assert drafted.leaves is not None
    d, width = drafted.tokens.shape[1], drafted.leaves.shape[2]
    candidates = torch.cat((drafted.tokens[:, :, None], drafted.leaves), dim=2)
    accepted, rank, token = accept_candidates(
        candidates,
        drafted.q,
        verified.chain,
        state.generator,
        drafted.lengths,
        given=drafted.given,
    )
    leaf = (rank > 0).long()
    # Of a row without a leaf any will do.
    index = accepted.clamp(max=d - 1) * width + (rank - 1).clamp(min=0)
    rows = torch.arange(len(index), device=index.device)
    after = sample(verified.leaves[rows, index], state.generator)
    tokens = torch.cat((drafted.tokens, token[:, None]), dim=1)
    tokens.scatter_(1, accepted[:, None], token[:, None])
    end = (accepted + leaf)[:, None]
    tokens.scatter_(1, end, torch.where(leaf > 0, after, token)[:, None])
    state.cache.move(
        state.batch.positions + leaf * (d + 1 + index),
        state.batch.positions + leaf * (accepted + 1),
    )
    lengths = drafted.lengths
    if lengths is None:
        lengths = torch.full_like(accepted, d)
    return Round(tokens, end.squeeze(1), drafted=lengths, leaf=rank)
