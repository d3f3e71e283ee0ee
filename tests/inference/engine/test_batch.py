"""Rows advance by their accepted tokens, finished ones stay, and rows share the batch's memory."""

import torch

from inference.engine.batch import Batch, Round


def test_rows_advance_as_worked_by_hand():
    batch = Batch.empty(3, 4, torch.device("cpu"))
    batch.history[:, :2] = torch.tensor([[5, 6], [7, 8], [9, 1]])
    batch.positions.copy_(torch.tensor([1, 3, 0]))
    batch.prompt_lengths.copy_(torch.tensor([2, 1, 2]))
    batch.finished[2] = True
    batch.max_position = 3
    assert batch.new_tokens.tolist() == [0, 3, -1]
    tokens = torch.tensor([[10, 11, 12], [20, 21, 22], [30, 31, 32]])
    batch.advance(Round(tokens, torch.tensor([1, 0, 2]), torch.full((3,), 2)))
    assert batch.positions.tolist() == [3, 4, 0], "a finished row stays"
    assert batch.pending.tolist() == [11, 20, 32]
    assert batch.history[0].tolist() == [5, 6, 10, 11, 12]
    assert batch.history[1, :4].tolist() == [7, 8, 0, 0], "beyond the slots there is one more"
    assert batch.max_position == 3 + 3


def test_a_row_is_a_batch_on_the_same_memory():
    batch = Batch.empty(3, 4, torch.device("cpu"))
    row = batch.row(1)
    row.pending.fill_(7)
    row.history[:, 2] = 5
    assert len(row) == 1
    assert batch.pending.tolist() == [0, 7, 0]
    assert batch.history[:, 2].tolist() == [0, 5, 0]


def test_plain_rounds_draft_nothing():
    result = Round.plain(torch.tensor([[3], [4]]), torch.tensor([1, 2]))
    assert result.accepted.tolist() == result.drafted.tolist() == [0, 0]
    assert result.depths.tolist() == [[1], [2]]
    assert Round.plain(torch.tensor([[3]])).depths is None
