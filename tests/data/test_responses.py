"""Lost and cut responses, counted against a loop over documents."""

import numpy as np
import pytest

from data import responses
from data.boundaries import Boundaries
from data.responses import Responses, measure_responses
from data.shards import TokenStream

BOS = 1


def by_hand(documents, seq_len):
    """Count over documents, each a list of (id, whether it is learnt)."""
    pairs = lost = cut = longest = 0
    for document in documents:
        offsets = [i for i, (_, learnt) in enumerate(document) if learnt and i]
        if offsets:
            within = sum(i < seq_len for i in offsets)
            pairs += 1
            lost += within == 0
            cut += 0 < within < len(offsets)
            longest = max(longest, offsets[-1] + 1)
    return Responses(pairs, lost, cut, longest)


@pytest.mark.parametrize("eos", [0, BOS])
@pytest.mark.parametrize("scan", [1, 3, 7, 2**22])
def test_lost_and_cut_responses_are_counted_in_blocks_of_any_size(monkeypatch, scan, eos):
    monkeypatch.setattr(responses, "_SCAN", scan)
    draw = np.random.default_rng(0)
    for _ in range(20):
        documents = []
        for _ in range(draw.integers(1, 9)):
            prompt, response = draw.integers(1, 9), draw.integers(1, 5)
            ids = [BOS, *draw.integers(2, 9, prompt + response - 1).tolist(), eos]
            documents.append([(token, i > prompt) for i, token in enumerate(ids)])
        stored = [token if learnt else ~token for part in documents for token, learnt in part]
        stream = TokenStream([np.array(stored, np.int32)])
        for seq_len in (1, 2, 5, 20):
            expected = by_hand(documents, seq_len)
            found = measure_responses(stream, Boundaries(BOS, eos), seq_len)
            assert found.longest == max(expected.longest, 1)
            assert (found.pairs, found.lost, found.cut) == (
                expected.pairs,
                expected.lost,
                expected.cut,
            )
