"""Tokens that differ are counted, and a tie is told from a fault."""

import pytest
import torch

from inference.evaluation.same_tokens import first_difference, same_share
from inference.strategies.registry import STRATEGIES, parse_strategy
from tests.inference.every_strategy import PROMPTS, decode, make_model


def test_tokens_that_differ_are_counted():
    assert same_share([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75
    assert same_share([[1], [3, 4, 5]], [[1, 2], [3, 4]]) == 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tie_is_two_tokens_of_one_logit_and_all_else_a_fault(dtype):
    model = make_model(3).to(dtype)
    plain = decode(model, PROMPTS, parse_strategy("autoregressive"), max_new_tokens=6).tokens
    assert first_difference(model, PROMPTS, plain, plain) is None
    token = plain[1][3]
    twin = next(i for i in range(1, 60) if all(i not in row for row in [*plain, *PROMPTS]))
    model.lm_head.weight[twin] = model.lm_head.weight[token]
    tied = [plain[0], [*plain[1][:3], twin, 5, 5], *plain[2:]]
    assert first_difference(model, PROMPTS, tied, plain) == "tie"
    model.lm_head.weight[twin] = -model.lm_head.weight[token]
    assert first_difference(model, PROMPTS, tied, plain) == "fault"
    assert first_difference(model, PROMPTS, [*plain[:3], plain[3][:2]], plain) == "fault"


def test_the_lossless_strategies():
    names = {name for name, kind in STRATEGIES.items() if kind().lossless}
    drafting = {"self_speculative", "dynamic", "skip_draft", "speculative"}
    assert names == {"autoregressive", *drafting}
    assert parse_strategy("free:rollback=exact").lossless
