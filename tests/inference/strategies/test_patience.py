"""Settings of patience that do not fit are refused; what it decodes is in test_row_exits."""

import pytest

from inference.strategies.patience import Patience
from tests.inference.every_strategy import PROMPTS, decode, make_model


def test_a_patience_of_no_exit_is_refused():
    with pytest.raises(ValueError, match="patience: 0, give at least 1 exit"):
        decode(make_model(2), PROMPTS, Patience(patience=0))
