"""Drafts with leaves decode what the full model decodes, and more of it in a round."""

from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from inference.engine.candidates import accept_candidates, acceptance_chances, draw_candidates
from inference.engine.compiled import compile_layers
from inference.engine.fused import fuse
from inference.engine.sampling import Sampling
from inference.strategies.drafting import Draft, NgramDrafts
from inference.strategies.tree import tree_shape
from tests.inference.strategies.test_self_speculative import (
    PROMPTS,
    SAMPLINGS,
    excess,
    poisoned,
    start,
)
from tests.models.families import ALL, build_random
from tests.models.test_llama import build, small


@pytest.fixture(scope="module")
def model():
    return build(small(n_layers=4, n_kv_heads=2)).eval().requires_grad_(False)


def with_leaves(model, branch, E, d, prompts=PROMPTS, **options):
    name = f"self_speculative:branch={branch}"
    return start(model, prompts, E, d, name=name, **options)


def test_the_shape_worked_by_hand():
    depths, sees = tree_shape(2, 3, torch.device("cpu"))
    assert depths.tolist() == [0, 1, 2, 1, 1, 2, 2]
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("changes", [{}, ALL], ids=["Llama", "no Llama"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_greedy_tokens_are_autoregressive_decodings(changes, fused):
    model = build_random(small(n_layers=4, n_kv_heads=2, **changes)).eval().requires_grad_(False)
    greedy = start(model, PROMPTS, name="autoregressive").finish().tokens
    if fused:
        fuse(model)
    for E, d, branch in [(1, 1, 2), (1, 4, 3), (2, 3, 2), (2, 8, 5), (3, 2, 61)]:
        chain = start(model, PROMPTS, E, d).finish()
        together = with_leaves(model, branch, E, d).finish()
        assert together.tokens == greedy, (E, d, branch)
        assert together.counters.rounds <= chain.counters.rounds
        # With few candidates, it is a matter of the weights whether any is right.
        assert together.counters.leaves or branch < 5
        refilled = with_leaves(model, branch, E, d, batch_size=2, stop_tokens=[greedy[0][7]])
        stopped = start(
            model, PROMPTS, name="autoregressive", batch_size=2, stop_tokens=[greedy[0][7]]
        )
        assert refilled.finish().tokens == stopped.finish().tokens
        for more in ("stop=0.03",) if fused else ("ngram=1", "ngram=2:stop=0.03"):
            text = f"self_speculative:branch={branch}:{more}"
            assert start(model, PROMPTS, E, d, name=text).finish().tokens == greedy, text


def test_every_token_as_a_candidate_is_never_rejected(model):
    counters = with_leaves(model, 61, 2, 1).finish().counters
    assert counters.tokens_per_round == 2.0


def test_kv_of_a_leaf_moves_to_its_position(model):
    generation = with_leaves(model, 4, 1, 3)
    for _ in range(6):
        next(generation)
    for row, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([(prompt + generation.tokens[row])[:-1]])
        seq, cache = tokens.shape[1], generation._state.cache
        cos, sin = model.rope_cos[:seq], model.rope_sin[:seq]
        h = model.embed(tokens)
        for l in range(4):
            k, v = model.block(l).attention.keys_and_values(
                model.block(l).attention_input(h), cos[None, None], sin[None, None]
            )
            torch.testing.assert_close(cache.keys[l][row, :, :seq], k[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(cache.values[l][row, :, :seq], v[0], atol=1e-5, rtol=0)
            h, _ = model.run_layers(h, l, l + 1)


def test_leaves_are_counted_apart_from_the_drafts_own_tokens(model):
    chain = start(model, PROMPTS, 2, 3).finish().counters
    counters = with_leaves(model, 61, 2, 3).finish().counters
    # With every token a candidate, what is rejected has a leaf in its stead, but at a row's end.
    assert counters.leaves == counters.rejections > 0
    assert {why for _, _, why in counters.drafts} <= {"leaf", "whole", "limit"}
    own = counters.accepted - counters.leaves
    assert counters.agreement == own / (own + counters.rejections)
    assert abs(counters.agreement - chain.agreement) < 0.1


def test_spare_slots_are_those_of_a_round_that_fits(model):
    generation = with_leaves(model, 8, 2, 10**9, PROMPTS[:1], max_new_tokens=5)
    assert generation._state.cache.keys[0].shape[2] < 100
    greedy = start(model, PROMPTS[:1], name="autoregressive", max_new_tokens=5).finish().tokens
    assert generation.finish().tokens == greedy


# "aot_eager" traces and replaces as the compiler does, and compiles nothing.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_give_the_same_tokens(monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = build(small(n_layers=2, n_kv_heads=2)).eval().requires_grad_(False)
    prompts = [[7]] * 2  # few shapes
    plain = start(model, prompts, name="autoregressive").finish().tokens
    fuse(model, compiled=True)
    compile_layers(model)
    found = with_leaves(model, 5, 1, 1, prompts).finish()
    assert found.tokens == plain
    assert found.counters.leaves


def test_slots_nobody_wrote_have_no_weight(model):
    clean = with_leaves(model, 3, 2, 5, PROMPTS[:1]).finish().tokens
    assert poisoned(with_leaves(model, 3, 2, 5, PROMPTS[:1]), torch.nan) == clean
    clean = with_leaves(model, 3, 2, 5).finish().tokens
    assert poisoned(with_leaves(model, 3, 2, 5), 1e30) == clean


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        *product(SAMPLINGS, ["2", "4"]),
        *product(SAMPLINGS[:2], ["2:ngram=1", "3:ngram=1:stop=1.1"]),
    ],
    ids=str,
)
def test_sampled_tokens_have_the_full_models_distribution(biased_model, sampling, settings):
    assert excess(biased_model, sampling, E=1, d=2, name=f"self_speculative:branch={settings}") < 4


def with_replacement(weights, count, generator):
    first = draw_candidates(weights, 1, generator)
    return torch.cat((first, weights.topk(count - 1, dim=-1).indices), dim=-1)


def against_the_first_residual(candidates, q, p, generator, lengths, *, given):
    """Try all candidates against p itself, as if none had been rejected before."""
    n, rank, token = accept_candidates(candidates, q, p, generator, lengths)
    rows = torch.arange(len(n))
    other = candidates[rows, n.clamp(max=candidates.shape[1] - 1), -1]
    taken = (rank == 0) & (n < candidates.shape[1])
    taken &= torch.rand(len(n), generator=torch.Generator().manual_seed(0)) < 0.3
    return n, torch.where(taken, candidates.shape[2] - 1, rank), torch.where(taken, other, token)


def lookups_as_draws(*args, given):
    return accept_candidates(*args)


@pytest.mark.parametrize(
    ("name", "wrong", "more"),
    [
        ("drafting.draw_candidates", with_replacement, ""),
        ("tree.accept_candidates", against_the_first_residual, ""),
        ("tree.accept_candidates", lookups_as_draws, ":ngram=1"),
    ],
)
def test_the_statistic_catches_wrong_rules(biased_model, monkeypatch, name, wrong, more):
    monkeypatch.setattr(f"inference.strategies.{name}", wrong)
    options = {"E": 1, "d": 2, "name": f"self_speculative:branch=2{more}"}
    assert excess(biased_model, Sampling(temperature=0.8), **options) > 6


def test_candidates_are_drawn_without_replacement():
    weights = torch.tensor([0.5, 0.3, 0.2]).expand(40_000, 3)
    drawn = draw_candidates(weights, 2, torch.Generator().manual_seed(0))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    # P(0 then 1) = 0.5 * 0.3 / 0.5; four standard deviations are 0.01.
    share = ((drawn[:, 0] == 0) & (drawn[:, 1] == 1)).float().mean()
    assert share.item() == pytest.approx(0.3, abs=0.01)
    share = ((drawn[:, 0] == 2) & (drawn[:, 1] == 1)).float().mean()
    assert share.item() == pytest.approx(0.2 * 0.3 / 0.8, abs=0.01)


def test_tokens_after_a_lookup_and_a_leaf_have_the_full_models_distribution():
    rows, draws = 100_000, torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.5, 0.2])
    each_p, each_q, found = p.expand(rows, 2, -1), q.expand(rows, 1, -1), torch.ones(rows).bool()
    lookups = NgramDrafts(torch.full((rows, 1), 2), found, 4, greedy=False)
    leaves = lookups.candidates(SimpleNamespace(generator=draws), each_q, 0, 2)
    maybe_again = torch.cat((leaves[..., :1], draw_candidates(each_q, 1, draws)), dim=-1)
    errors = []
    for candidates in (leaves, maybe_again):
        n, _, token = accept_candidates(candidates, each_q, each_p, draws, given=found)
        tokens = torch.where(n > 0, candidates[:, 0, 0], token)
        errors.append((tokens.bincount(minlength=4) / rows - p).abs().max().item())
    assert errors[0] < 0.006  # four standard deviations
    assert errors[1] > 0.02, "a leaf is to be drawn from what is not the lookup's token"


def test_lookups_that_go_on_behind_a_draft_have_no_leaves_there():
    found = torch.tensor([True])
    lookups = NgramDrafts(torch.tensor([[4, 2, 5]]), found, 6, greedy=False)
    leaves = torch.tensor([[[0, 1]]])
    drafted = Draft(torch.tensor([[4]]), torch.full((1, 1, 6), 1 / 6), None, [], [], leaves)
    longer = lookups.extend(drafted, 3)
    assert longer.tokens.tolist() == [[4, 2, 5]]
    assert longer.leaves.tolist() == [[[0, 1], [2, 2], [5, 5]]]
    assert longer.q[0].sum(-1).tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert longer.given is found


def test_the_chance_of_each_candidate_worked_by_hand():
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.5, 0.2])
    # 0.1 + 0.2 + 0.2 + 0.1. Rejected is 2, in 3 of 4 cases, or 3; left of p is 0.3, 0.1 over 0.4.
    # After 2, q is 0.2, 0.4, 0, 0.4: 0.2 + 0.25 of it may be kept; after 3, 1/8, 1/4, 5/8, 0:
    # 1/8 + 1/4. Then 0.55 over 0.55, from 0 alone, meets q without 2 and 3, 1/3 and 2/3.
    drawn = acceptance_chances(
        q.expand(40_000, 4), p.expand(40_000, 4), 3, torch.Generator().manual_seed(0)
    )
    mean = drawn.mean(0)
    assert mean[:2].tolist() == pytest.approx([0.6, 0.75 * 0.45 + 0.25 * 0.375], abs=1e-3)
    assert {round(chance, 4) for chance in drawn[:, 1].tolist()} == {0.45, 0.375}
    kept = accept_candidates(
        torch.stack([draw_candidates(q.expand(40_000, 4), 3, torch.Generator().manual_seed(1))], 1),
        q.expand(40_000, 1, 4),
        p.expand(40_000, 2, 4),
        torch.Generator().manual_seed(2),
    )[:2]
    ranks = torch.where(kept[0] > 0, 0, kept[1])
    second = (ranks == 1).sum() / (kept[0] == 0).sum()
    assert second.item() == pytest.approx(mean[1].item(), abs=0.02)
    greedy = acceptance_chances(q.expand(2, 4), torch.stack((p, p.flip(0))), 3, None)
    assert greedy.tolist() == [[0.0] * 3, [0.0, 1.0, 0.0]]


def test_settings_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="^branch: 0, give at least 1"):
        start(model, PROMPTS, 2, 3, name="self_speculative:branch=0")
    with pytest.raises(ValueError, match="^branch: 62, give at most 61 tokens to draft from$"):
        with_leaves(model, 62, 2, 3)
