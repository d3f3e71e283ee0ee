"""What rounds cost follows from what passes cost, and that from a clock."""

import math
from itertools import product

import pytest
import torch

import inference.evaluation.costs
import inference.evaluation.timing
from inference.engine.generation import Generation
from inference.engine.sampling import Sampling
from inference.engine.state import DecodeState
from inference.evaluation.costs import Costs, measure_costs
from inference.evaluation.exit_traces import record_acceptance, record_exits
from inference.evaluation.prediction import predict, tokens_per_round
from inference.evaluation.round_breakdown import leaves_line
from inference.strategies import self_speculative
from inference.strategies.self_speculative import SelfSpeculative, accept_round
from inference.strategies.tree import accept_tree
from tests.inference.every_strategy import PROMPTS, make_model

OF_THREE_LAYERS = Costs(
    full_step_seconds=1.0,
    draft=[0.5, 0.7],
    layers=[0.9, 1.0, 1.2],
    head=[0.1, 0.2, 0.3],
    many_heads=0.5,
    rounds=[(0.55, 1.4), (0.75, 1.25)],
    lookup=1.4,
    leaves=(0.1, 0.05),
    most_leaves=4,
    many_layers=1.6,
)
OF_FOUR_LAYERS = Costs(
    full_step_seconds=1.0,
    draft=[(E + 2) / (4 + 2) for E in (1, 2, 3)],
    layers=[0.9, 1.0, 1.2],
    head=[0.1, 0.2, 0.3],
    many_heads=0.5,
    rounds=[(0.5, 1.5), (0.7, 1.4), (0.9, 1.3)],
    lookup=1.5,
    leaves=(0.0, 0.0),
    most_leaves=0,
    many_layers=1.2,
)


def test_predictions_worked_by_hand():
    # E = 1 is wrong at positions 1 and 4, E = 2 never.
    trace = torch.tensor([[1.0, 0, 1, 1, 0, 1], [1.0] * 6, [1.0] * 6])[..., None]
    assert tokens_per_round([trace], 1, 2) == 6 / 3  # 5 6 | 7 8 9 | 1
    assert tokens_per_round([trace], 1, 1) == 6 / 4  # 5 6 | 7 8 | 9 | 1
    assert tokens_per_round([trace], 2, 2) == 6 / 2
    found = {(p.E, p.d): p for p in predict([trace], OF_THREE_LAYERS, 2)}
    assert found[1, 1].agreement == pytest.approx(4 / 6)
    # draft: two steps of E = 1 less the head; verify: two thirds of the layers on two tokens.
    assert found[1, 1].draft == pytest.approx(2 * 0.4)
    assert found[1, 1].verify == pytest.approx(1.0 * 2 / 3)
    assert found[1, 1].head == pytest.approx(0.1 + 0.2)
    # Whole rounds take 1.4 + 0.55 d and 1.25 + 0.75 d.
    assert found[1, 1].overhead == pytest.approx(1.95 - (0.8 + 2 / 3 + 0.3))
    assert found[1, 1].speedup == pytest.approx(1.5 / 1.95)
    assert found[2, 2].overhead == pytest.approx(2.75 - (3 * 0.6 + 1.2 / 3 + 2 * 0.1 + 0.3))
    assert found[2, 2].speedup == pytest.approx(3 / 2.75)
    ordered = [p.speedup for p in predict([trace], OF_THREE_LAYERS, 2)]
    assert ordered == sorted(ordered, reverse=True)


def test_predictions_with_leaves_worked_by_hand():
    # As above, and at position 1 the second candidate is right, at position 4 only the third.
    second = torch.tensor([[0.0, 1, 0, 0, 0, 0], [0.0] * 6, [0.0] * 6])
    third = torch.tensor([[0.0, 0, 0, 0, 1, 0], [0.0] * 6, [0.0] * 6])
    first = torch.tensor([[1.0, 0, 1, 1, 0, 1], [1.0] * 6, [1.0] * 6])
    trace = torch.stack((first, second, third), dim=-1)
    assert tokens_per_round([trace], 1, 2, 2) == 6 / 3  # 5 6 7 | 8 9 | 1
    assert tokens_per_round([trace], 1, 2, 3) == 6 / 2  # 5 6 7 | 8 9 1
    assert tokens_per_round([trace], 1, 1, 2) == 6 / 4  # 5 6 | 7 8 | 9 | 1
    assert tokens_per_round([trace], 1, 1, 3) == 6 / 3  # 5 6 | 7 8 | 9 1
    predictions = predict([trace], OF_THREE_LAYERS, 2)
    found = {(p.E, p.d, p.branch): p for p in predictions}
    assert len(found) == 2 * 2 * 3
    one = found[1, 1, 3]
    assert one.leaves == pytest.approx(0.1 + 2 * 0.05)
    # One step of E = 1; the last token and two leaves through one layer, all four through two.
    assert one.draft == pytest.approx(0.4)
    assert one.verify == pytest.approx(1.2 / 3 + (1.2 + 0.1) * 2 / 3)
    assert one.head == pytest.approx(0.1 + 0.3 + (0.5 - 0.3) / 3)
    assert one.round == pytest.approx(1.95 + 0.2)
    assert one.speedup == pytest.approx(2 / 2.15)
    assert leaves_line(predictions) == (
        "leaves: E=1:d=2:branch=3 has 3.00 tokens/round instead of 2.00, for 0.30 full steps more: "
        "1.07x;\nthe best without leaves 1.09x; the best if leaves took no time 1.20x"
    )


def test_costs_of_passes_worked_by_hand():
    costs = OF_FOUR_LAYERS
    assert costs.of_layers(0, 2, 1) == pytest.approx(4 / 6 - 0.1)
    assert costs.of_layers(0, 4, 1) == pytest.approx(0.9)
    assert costs.of_layers(1, 4, 3) == pytest.approx(1.2 * 3 / 4)
    assert OF_THREE_LAYERS.of_layers(1, 3, 6) == pytest.approx(1.5 * 2 / 3), "1.2 to 1.6 in 4"
    assert costs.of_head(3) == pytest.approx(0.3)
    assert costs.of_head(6) == pytest.approx(0.4), "half way to three exits' three tokens"
    assert costs.of_head(9) == pytest.approx(0.5)


@pytest.mark.parametrize(("E", "d", "branch"), [(1, 2, 1), (2, 3, 1), (2, 3, 3)])
def test_tokens_of_a_round_are_those_that_are_decoded(E, d, branch):
    model, strategy = make_model(4), SelfSpeculative(E=E, d=d, branch=branch)
    alone = [Generation(model, [p], strategy, max_new_tokens=25).finish() for p in PROMPTS]
    chances = []
    for p, generation in zip(PROMPTS, alone, strict=True):
        row = p + generation.tokens[0]
        choices = record_exits(model, row, len(p))
        chances.append(record_acceptance(model, row, len(p), Sampling(), branch))
        assert torch.equal(chances[-1][..., 0], (choices == choices[-1]).float())
    rounds = sum(one.counters.rounds for one in alone)
    assert tokens_per_round(chances, E, d, branch) == pytest.approx(100 / rounds)


def test_tokens_of_a_round_of_sampled_drafts_are_the_mean_over_what_may_be_accepted():
    chance, d = [0.9, 0.2, 0.5, 0.7, 0.4], 2
    mean = 0.0
    for accepted in product((False, True), repeat=5):
        weight = math.prod(a if yes else 1 - a for a, yes in zip(chance, accepted, strict=True))
        rounds = position = 0
        while position < 5:
            drafted = [*accepted[position : min(position + d, 4)], False]
            position, rounds = position + drafted.index(False) + 1, rounds + 1
        mean += weight * rounds
    assert tokens_per_round([torch.tensor([chance, [1.0] * 5])[..., None]], 1, d) == pytest.approx(
        5 / mean
    )


def test_the_chance_that_a_sampled_draft_is_accepted():
    model, row, hot = make_model(3), [1, 2, 3, 4, 5], Sampling(temperature=0.7)
    found = record_acceptance(model, row, 2, hot)
    h, _ = model.run_layers(model.embed(torch.tensor([row])), 0, 3)
    _, exits = model.run_layers(model.embed(torch.tensor([row])), 0, 3, exit_layers=(0, 1))
    for E, x in ((1, exits[0]), (2, exits[1]), (3, h)):
        p, q = ((model.exit_logits(y, e) / 0.7).softmax(-1) for y, e in ((h, 3), (x, E)))
        gap = (p - q).abs().sum(-1) / 2  # total variation
        assert torch.allclose(found[E - 1, :, 0], 1 - gap[0, 1:-1], atol=1e-6)


def test_costs_are_measured_in_full_steps():
    costs = measure_costs(make_model(3), [[1, 2, 3, 4]], 2, branch=2)
    assert len(costs.draft) == 2
    assert len(costs.layers) == len(costs.head) == 3
    assert 0 < costs.head[0] < costs.layers[0]
    assert costs.full_step_seconds > 0
    assert all(0 < each < 3 and 0 < beside < 5 for each, beside in costs.rounds)
    assert costs.lookup > 0
    assert min(costs.leaves) >= 0
    assert costs.many_layers > 0
    assert costs.most_leaves == 2


def test_a_row_with_room_for_a_round_alone_has_room_for_its_leaves():
    model = make_model(3)
    row = [1 + i % 20 for i in range(model.config.max_seq_len - 2 - 1)]
    assert measure_costs(model, [row], 2, branch=4, timings=1).many_layers > 0


def test_each_kind_of_pass_is_timed_by_itself(monkeypatch):
    """With a clock that counts: 1 for each layer of a pass, 0.5 for each of its tokens but one, 10
    for each call of the head, 2 to accept."""
    model, clock = make_model(3), [0.0]
    run, head, run_tree = DecodeState.run_and_tap, DecodeState.head, DecodeState.run_tree

    def slow_run(state, h, start, stop, **options):
        clock[0] += stop - start + 0.5 * (h.shape[1] - 1)
        return run(state, h, start, stop, **options)

    def slow_tree(state, h, start, stop, opened):
        clock[0] += stop - start + 0.5 * (h.shape[1] - 1)
        return run_tree(state, h, start, stop, opened)

    def slow_accept_tree(state, drafted, verified):
        clock[0] += 2.75
        return accept_tree(state, drafted, verified)

    def slow_head(state, x, part=None):
        clock[0] += 10
        return head(state, x, part)

    def slow_accept_round(state, drafted, p):
        clock[0] += 2
        return accept_round(state, drafted, p)

    monkeypatch.setattr(DecodeState, "run_and_tap", slow_run)
    monkeypatch.setattr(DecodeState, "head", slow_head)
    monkeypatch.setattr(DecodeState, "run_tree", slow_tree)
    monkeypatch.setattr(self_speculative, "accept_tree", slow_accept_tree)
    monkeypatch.setattr(self_speculative, "accept_round", slow_accept_round)
    monkeypatch.setattr(inference.evaluation.costs, "accept_round", slow_accept_round)
    monkeypatch.setattr(inference.evaluation.timing.time, "perf_counter", lambda: clock[0])
    costs = measure_costs(model, [[1, 2, 3, 4]], 3)
    assert costs.full_step_seconds == pytest.approx(13)
    assert costs.draft == pytest.approx([11 / 13, 12 / 13])
    assert costs.layers == pytest.approx([3 / 13, 3.5 / 13, 4 / 13, 4.5 / 13])
    assert costs.head == pytest.approx([10 / 13] * 4)
    assert costs.many_heads == pytest.approx(10 / 13)
    # For each token E layers, the head and its part of verifying; beside them E layers, 3 - E, the
    # head and 2 to accept.
    assert costs.rounds == [
        (pytest.approx((E + 10 + 0.5) / 13), pytest.approx((3 + 10 + 2) / 13)) for E in (1, 2)
    ]
    assert costs.lookup == pytest.approx((3 + 3 * 0.5 + 10 + 2) / 13)
    # A leaf is one more token in two passes, of 1 and 2 layers; accepting any takes 0.75 more.
    with_leaves = measure_costs(model, [[1, 2, 3, 4]], 3, branch=3)
    assert with_leaves.leaves == pytest.approx((0.75 / 13, 2 * 0.5 / 13))
    assert with_leaves.many_layers == pytest.approx((3 + 9 * 0.5) / 13)
    # Of one drafted token, what a step costs.
    of_one = measure_costs(model, [[1, 2, 3, 4]], 1).rounds
    assert of_one == [
        (pytest.approx((E + 10) / 13), pytest.approx((3 + 0.5 + 10 + 2) / 13)) for E in (1, 2)
    ]
