"""How many responses of a dataset of pairs lie beyond the length of a sequence."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.boundaries import Boundaries
from data.shards import NO_LOSS, TokenStream
from data.windows import find_documents

Ids = npt.NDArray[np.int64]
_SCAN = 2**22


@dataclass(frozen=True)
class Responses:
    """The responses of one split, read as whole documents of at most some length."""

    pairs: int
    """Documents with a token that is learnt."""
    lost: int
    """Those of them of which no such token is within the length."""
    cut: int
    """Those of which some are and some are not."""
    longest: int
    """The least length that keeps all responses whole."""


def measure_responses(stream: TokenStream, boundaries: Boundaries, seq_len: int) -> Responses:
    """Return how many responses are lost or cut in documents of `seq_len` tokens.

    Reads the stream in blocks.

    Args:
        stream: Of pairs, whose prompts are not learnt.
        boundaries: Of its documents.
        seq_len: Tokens of a document that are read.
    """
    found = np.zeros(4, np.int64)
    starts = find_documents(stream, boundaries)
    begin, learnt, within, last = 0, 0, 0, 0  # of the document that the next block goes on with
    for start in range(0, len(stream), _SCAN):
        _, targets = stream.read_targets(start, min(_SCAN, len(stream) - start))
        first, stop = np.searchsorted(starts, [start, start + len(targets)])
        begins = np.concatenate([[begin], starts[first:stop]])
        labels = start + np.flatnonzero(targets != NO_LOSS)
        document = np.searchsorted(begins, labels, side="right") - 1
        offset = labels - begins[document]
        document, offset = document[offset > 0], offset[offset > 0]  # BOS follows nothing
        count = np.bincount(document, minlength=len(begins))
        inside = np.bincount(document[offset < seq_len], minlength=len(begins))
        end = np.zeros_like(count)
        np.maximum.at(end, document, offset)
        count[0], inside[0], end[0] = count[0] + learnt, inside[0] + within, max(end[0], last)
        found = _with(found, count[:-1], inside[:-1], end[:-1])
        begin, learnt, within, last = (int(x[-1]) for x in (begins, count, inside, end))
    final = (np.array([value]) for value in (learnt, within, last))
    pairs, lost, cut, longest = _with(found, *final).tolist()
    return Responses(pairs, lost, cut, longest)


def _with(
    found: Ids,
    count: Ids,
    inside: Ids,
    end: Ids,
) -> Ids:
    """Add documents to pairs, lost and cut; their last label may raise the longest."""
    is_pair = count > 0
    lost = is_pair & (inside == 0)
    added = [is_pair.sum(), lost.sum(), (is_pair & ~lost & (inside < count)).sum()]
    longest = max(int(found[3]), int(end.max(initial=-1)) + 1)
    return np.array([*(found[:3] + added), longest])
