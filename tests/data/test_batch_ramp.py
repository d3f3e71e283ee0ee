"""The size of the batch at every step against a slow count."""

import numpy as np
import pytest

from data.batch_ramp import BatchRamp
from data.step_rows import StepRows


@pytest.mark.parametrize(
    "ramp", [BatchRamp(8), BatchRamp(16, 4, 4, 10), BatchRamp(12, 2, 5, 3), BatchRamp(64, 2, 1, 20)]
)
def test_a_batch_grows_in_equal_increments(ramp: BatchRamp) -> None:
    sizes = [ramp.at(t) for t in range(40)]
    assert sizes[0] == (ramp.start or ramp.size)
    assert sizes[ramp.steps :] == [ramp.size] * (40 - ramp.steps)
    assert sizes == sorted(sizes)
    assert {(size - sizes[0]) % ramp.increment for size in sizes} == {0}
    assert [ramp.before(t) for t in range(41)] == np.cumsum([0, *sizes]).tolist()
    for rows in (1, 7, 60, 200):
        steps = ramp.steps_for(rows)
        assert ramp.before(steps - 1) < rows <= ramp.before(steps)


def test_each_size_lasts_equally_long() -> None:
    ramp = BatchRamp(8, 2, 2, 30)
    assert [ramp.at(t) for t in (0, 9, 10, 19, 20, 29, 30)] == [2, 2, 4, 4, 6, 6, 8]


def test_rows_are_read_once_wherever_a_run_goes_on() -> None:
    ramp = BatchRamp(12, 2, 5, 7)
    whole = StepRows(0, 0, ramp, ((5, 9),))
    for step in range(12):
        rest = StepRows(step, ramp.before(step), ramp, ((5, 9),))
        assert all(rest.at(t).tolist() == whole.at(t).tolist() for t in range(step, 15))
    read = np.concatenate([whole.at(t) for t in range(15)]).tolist()
    assert read == [row for row in range(read[-1] + 1) if not 5 <= row < 9]
