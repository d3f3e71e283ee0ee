"""Distributions and their filters, draws in proportion, and the acceptance rule's cases."""

import math

import pytest
import torch

from inference.engine.sampling import LEAST_TEMPERATURE, Sampling, accept, draw_weights, sample

LOGITS = torch.tensor([0.0, math.log(4.0), math.log(2.0), math.log(3.0)])  # 1 : 4 : 2 : 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1.0, top_k=9), [0.1, 0.4, 0.2, 0.3]),
        # 0.4 alone does not reach 0.65 and 0.4 + 0.3 does.
        (Sampling(temperature=1.0, top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1.0, top_p=0.01), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, top_p=1.0), [0.1, 0.4, 0.2, 0.3]),
        # After top_k the weights are 4/7 and 3/7: 4/7 reaches 0.55.
        (Sampling(temperature=1.0, top_k=2, top_p=0.55), [0, 1, 0, 0]),
        (Sampling(temperature=LEAST_TEMPERATURE), [0, 1, 0, 0]),
        (Sampling(temperature=LEAST_TEMPERATURE, top_k=3, top_p=0.5), [0, 1, 0, 0]),
    ],
)
def test_distributions_equal_hand_worked_ones(sampling, expected):
    torch.testing.assert_close(
        draw_weights(LOGITS.expand(2, 3, 4), sampling),
        torch.tensor(expected, dtype=torch.float32).expand(2, 3, 4),
        atol=1e-6,
        rtol=0,
    )


def test_the_fewest_tokens_that_reach_top_p_exactly_are_kept():
    kept = draw_weights(torch.zeros(8), Sampling(temperature=1.0, top_p=0.5))  # of 1/8 each
    assert sorted(kept.tolist()) == [0.0] * 4 + [0.25] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_least_temperature_bears_the_largest_logits(dtype):
    logits = torch.tensor([-6e4, 6e4, 5e4, -torch.inf], dtype=dtype)
    found = draw_weights(logits, Sampling(temperature=LEAST_TEMPERATURE))
    assert found.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [1e-40, 9e-7, -1e-3, math.inf, math.nan])
def test_temperatures_that_no_logits_can_be_divided_by_are_refused(temperature):
    with pytest.raises(ValueError, match=f"^temperature: {temperature}, give 0 .* at least 1e-06$"):
        Sampling(temperature=temperature)


def test_greedy_breaks_ties_as_argmax_does():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    weights = draw_weights(logits, Sampling())
    assert sample(weights, None).tolist() == logits.argmax(-1).tolist()
    draft, p = logits.argmax(-1)[None, :1], weights[None]
    num_accepted, next_token = accept(draft, None, p, None)
    assert [num_accepted.item(), next_token.item()] == [1, logits[1].argmax().item()]


def test_bfloat16_logits_give_float32_distributions():
    assert draw_weights(LOGITS.bfloat16(), Sampling(temperature=1.0)).dtype == torch.float32


def test_sampling_names_all_faults_at_once():
    with pytest.raises(ValueError, match=r"temperature: -1.*top_k: 0.*top_p: 1.5"):
        Sampling(temperature=-1.0, top_k=0, top_p=1.5)


def test_draws_are_in_proportion_to_the_weights():
    weights = torch.tensor([1.0, 0.0, 6.0, 3.0]).expand(100_000, 4)
    counts = sample(weights, generator()).bincount(minlength=4) / 100_000
    # Four standard deviations of a share near 0.5 over 1e5 draws are 0.0063.
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=6.3e-3, rtol=0)
    assert counts[1] == 0


def one_hot(*tokens, vocab=4):
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab).float()


@pytest.mark.parametrize("source", [None, generator()], ids=["no generator", "generator"])
def test_one_hot_rows_accept_up_to_the_first_difference(source):
    draft = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    q = one_hot(1, 2, 3).expand(4, 3, 4)
    p = torch.stack(
        [one_hot(1, 2, 3, 0), one_hot(1, 2, 0, 3), one_hot(1, 0, 3, 2), one_hot(0, 2, 3, 1)]
    )
    num_accepted, next_token = accept(draft, q, p, source)
    assert num_accepted.tolist() == [3, 2, 1, 0]
    assert next_token.tolist() == [0, 0, 0, 0]


def test_equal_distributions_always_accept():
    q = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(5000, 2, 4)
    draft = sample(q, generator(1))
    num_accepted, next_token = accept(draft, q, q[:, :1].expand(-1, 3, -1), generator(2))
    assert num_accepted.unique().tolist() == [2]
    share = next_token.bincount(minlength=4) / 5000
    # Four standard deviations of a share near 0.5 over 5000 draws are 0.028.
    torch.testing.assert_close(share, q[0, 0], atol=0.028, rtol=0)


def test_disjoint_distributions_never_accept_and_draw_from_p():
    q = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(5000, 2, 4)
    p = torch.tensor([0.0, 0.0, 0.25, 0.75]).expand(5000, 3, 4)
    num_accepted, next_token = accept(sample(q, generator(1)), q, p, generator(2))
    assert num_accepted.unique().tolist() == [0]
    share = next_token.bincount(minlength=4) / 5000
    torch.testing.assert_close(share, p[0, 0], atol=0.028, rtol=0)


def test_sometimes_accepts_with_the_probability_worked_by_hand():
    # Token 0: p/q = 0.2 / 0.8 = 1/4; token 1: p/q > 1. P(accept) = 0.8 / 4 + 0.2 = 0.4, and after
    # a rejection max(p - q, 0) leaves token 1 alone.
    q = torch.tensor([0.8, 0.2]).expand(50_000, 1, 2)
    p = torch.tensor([0.2, 0.8]).expand(50_000, 2, 2)
    num_accepted, next_token = accept(sample(q, generator(1)), q, p, generator(2))
    assert num_accepted.float().mean().item() == pytest.approx(0.4, abs=0.009)
    assert next_token[num_accepted == 0].unique().tolist() == [1]


def test_an_empty_draft_draws_from_p():
    p = one_hot(2, 1).unsqueeze(1)
    draft, q = torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0, 4)
    num_accepted, next_token = accept(draft, q, p, None)
    assert num_accepted.tolist() == [0, 0]
    assert next_token.tolist() == [2, 1]


@pytest.mark.parametrize("count", [0, 1])
def test_tokens_beyond_a_shorter_draft_are_ignored(count):
    p = torch.tensor([0.25, 0.25, 0.5, 0.0]).expand(2000, 3, 4)
    q = p[:, :2].clone()
    q[:, count:] = one_hot(2)
    lengths = torch.full((2000,), count)
    num_accepted, next_token = accept(sample(q, generator(1)), q, p, generator(2), lengths)
    assert num_accepted.unique().tolist() == [count]
    share = next_token.bincount(minlength=4) / 2000
    # Four standard deviations of a share near 0.5 over 2000 draws are 0.045.
    torch.testing.assert_close(share, p[0, 0], atol=0.045, rtol=0)


def test_a_residual_lost_to_rounding_falls_back_to_p():
    # p(0) = 0 rejects the draft, and q lies nowhere below p: only rounding can do this.
    q, p = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.0, 0.5], [1.0, 0.0]]])
    num_accepted, next_token = accept(torch.tensor([[0]]), q, p, generator())
    assert (num_accepted.item(), next_token.item()) == (0, 1)
