"""The choice of E and d learns from the exits, and costs no token."""

from dataclasses import replace
from math import inf

import pytest
import torch

from inference.engine.generation import Generation
from inference.engine.prefill import allocate
from inference.engine.sampling import Sampling
from inference.strategies import dynamic_rounds
from inference.strategies.agreement import Agreement, Shape
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.drafting import NgramDrafts
from inference.strategies.dynamic import Dynamic
from inference.strategies.ngram import look_up
from models.host_copy import HostCopy
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.inference.strategies.test_self_speculative import excess
from tests.models.test_llama import build, small


@pytest.fixture(scope="module")
def model():
    return make_model(6)


def always_draft(monkeypatch, E, d, *, branch=1, gain=2.0):
    """Have every round draft d tokens with E layers, where so many are left."""

    def shape(*given):
        return Shape(E, min(d, given[-1]), branch, gain)

    monkeypatch.setattr(dynamic_rounds, "best_shape", shape)


def test_every_round_updates_the_exit_that_drafts(model, started, monkeypatch):
    always_draft(monkeypatch, 4, 3)
    monkeypatch.setattr(dynamic_rounds.Rounds, "_probe_is_due", lambda self: False)
    generation = Generation(model, [[7, 8, 7]], Dynamic(d=3, memory=0.999999), max_new_tokens=60)
    accepted = tried = 0
    for [emission] in generation:
        accepted += emission.accepted
        tried += min(emission.accepted + 1, emission.drafted)
    assert accepted > 10
    fourth = with_all_stats(started).exits[4]
    assert fourth.agreed == pytest.approx(1.0 + accepted, abs=0.01)
    assert fourth.tried == pytest.approx(2.0 + tried, abs=0.01)
    others = [e for e in with_all_stats(started).exits.values() if e is not fourth]
    assert {(e.agreed, e.tried) for e in others} == {(1.0, 2.0)}
    assert generation.counters.syncs == 0


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_every_round_updates_the_leaves_of_the_exit_that_drafts(
    model, started, monkeypatch, temperature
):
    always_draft(monkeypatch, 4, 3, branch=3)
    monkeypatch.setattr(dynamic_rounds.Rounds, "_probe_is_due", lambda self: False)
    settings, sampling = Dynamic(d=3, memory=0.999999, branch=3), Sampling(temperature=temperature)
    # The last round, that may overrun the row, is cut off.
    generation = Generation(
        model, [[7, 8, 7]], settings, max_new_tokens=60, sampling=sampling, async_readback=False
    )
    for _ in range(12):
        next(generation)
    counters, (second, third) = generation.counters, with_all_stats(started).leaves[4]
    assert counters.leaves > 1
    assert second.tried == pytest.approx(2.0 + counters.rejections, abs=0.01)
    assert third.tried - 2.0 == pytest.approx(counters.rejections - (second.agreed - 1.0), abs=0.01)
    agreed = second.agreed + third.agreed - 2.0
    assert agreed == pytest.approx(counters.leaves, abs=0.01)


def test_probed_leaves_are_those_a_full_forward_finds(model, started, no_layer_drafts):
    settings = Dynamic(d=3, probe=1, longest_probe=1, memory=0.999999, branch=3)
    [tokens] = decode(model, [[7, 8, 7]], settings, max_new_tokens=30).tokens
    tokens = [7, 8, 7, *tokens]
    _, exits = model.run_layers(model.embed(torch.tensor([tokens])), 0, 6, exit_layers=range(6))
    for E in range(1, 6):
        best = model.exit_logits(exits[E - 1][0, 2:-1]).argsort(-1, descending=True)
        ranks = (best == torch.tensor(tokens[3:])[:, None]).int().argmax(-1)
        for rank, found in enumerate(with_all_stats(started).leaves[E], start=1):
            assert found.agreed == pytest.approx(1.0 + (ranks == rank).sum().item(), abs=0.01)
            assert found.tried == pytest.approx(2.0 + (ranks >= rank).sum().item(), abs=0.01)


def with_all_stats(started):
    """Return the first decoder, after it has read the counts of all rounds."""
    started[0].read_stats(started[0].rounds + 1)
    return started[0]


SETTINGS = [
    Dynamic(),
    Dynamic(probe=1, d=3),
    Dynamic(exits=(2, 5), draft_costs=(0.3, 0.8), verify_costs=(0.2, 0.1), probe=2),
    Dynamic(verify_costs=(0.2,), stop=0.2, branch=3),
    Dynamic(verify_costs=(0.2,), lookup_cost=0.2, ngram=2, branch=2),
    Dynamic(exits=(1, 3, 4), verify_costs=(0.2,), ngram=1, stop=0.2, probe=2),
    Dynamic(ngram=1, probe=1, draft_costs=(0.4, 0.5, 0.6, 0.7, 0.9)),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_greedy_tokens_are_autoregressive_decodings(model, settings, rows):
    prompts = (PROMPTS * 2)[:rows]
    plain = decode(model, prompts, Autoregressive(), max_new_tokens=30).tokens
    for options in ({}, {"async_readback": True}, {"batch_size": 3}):
        found = decode(model, prompts, settings, max_new_tokens=30, **options)
        assert found.tokens == plain
    # Beside lookups, or in a single row, none may be right.
    assert found.counters.leaves or rows == 1 or settings.branch == 1 or settings.ngram
    if settings.verify_costs[0] < 1:
        assert found.counters.drafted > 0


@pytest.mark.parametrize(
    "name",
    [
        "dynamic:verify_costs=0.1:probe=1",
        "dynamic:exits=1:verify_costs=0.1:probe=2:stop=0.35",
        "dynamic:verify_costs=0.1:lookup_cost=0.1:ngram=1:probe=2",
        "dynamic:verify_costs=1000:lookup_cost=0.1:ngram=1",
        "dynamic:verify_costs=0.1:branch=3:probe=2",
        "dynamic:verify_costs=0.1:branch=2:lookup_cost=0.1:ngram=1:probe=1:longest_probe=2",
    ],
)
def test_sampled_tokens_have_the_full_models_distribution(biased_model, name):
    hot = Sampling(temperature=1.0)
    assert excess(biased_model, hot, E=None, d=2, name=name) < 4


def test_the_statistic_catches_a_biased_choice(biased_model, monkeypatch):
    def accept_round_all(state, drafted, p):
        return dynamic_rounds.Round(
            torch.cat((drafted.tokens, p[:, -1:].argmax(-1)), 1),
            torch.full_like(state.batch.positions, drafted.tokens.shape[1]),
            torch.full_like(state.batch.positions, drafted.tokens.shape[1]),
        )

    monkeypatch.setattr(dynamic_rounds, "accept_round", accept_round_all)
    hot = Sampling(temperature=1.0)
    assert excess(biased_model, hot, E=None, d=2, name="dynamic:verify_costs=0.1") > 20


def test_an_exit_that_always_agrees_is_found_and_used(started):
    model = build(small(n_layers=6)).eval().requires_grad_(False)
    for l in (2, 3, 4, 5):  # from two layers on, all exits agree
        model.layers[str(l)].attention.wo.weight.zero_()
        model.layers[str(l)].feed_forward.w2.weight.zero_()
    settings = Dynamic(d=4, probe=1, longest_probe=1)
    generation = decode(model, PROMPTS, settings, max_new_tokens=40)
    assert generation.counters.acceptance_rate > 0.9
    rounds = with_all_stats(started)
    assert min(rounds.exits[E].lower_bound() for E in (2, 3, 4, 5)) > 0.9
    assert rounds._shape(4)[:3] == (2, 4, 1)


@pytest.fixture
def no_layer_drafts(monkeypatch):
    always_draft(monkeypatch, 1, 0, gain=1.0)


def drawn_from(logits, sampling):
    least = logits.topk(sampling.top_k or logits.shape[-1]).values[:, -1:]
    p = torch.where(logits >= least, (logits / sampling.temperature).exp(), 0.0)
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("ngram", [0, 1])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.5), Sampling(temperature=0.5, top_k=3)]
)
@pytest.mark.usefixtures("no_layer_drafts")
def test_the_exits_agreement_is_what_a_full_forward_finds(model, started, ngram, sampling):
    settings = Dynamic(d=3, probe=1, longest_probe=1, memory=0.999999)
    settings = replace(settings, lookup_cost=0.01, ngram=1) if ngram else settings
    generation = Generation(model, [[7, 8, 7]], settings, max_new_tokens=30, sampling=sampling)
    tokens, positions = [7, 8, 7], []
    for [emission] in generation:
        if not emission.drafted:
            positions.append(len(tokens) - 1)
        tokens += emission.tokens
    assert (generation.counters.drafted > 0) == (ngram > 0)
    assert (len(positions) < 30) == (ngram > 0)
    _, exits = model.run_layers(model.embed(torch.tensor([tokens])), 0, 6, exit_layers=range(6))
    logits = [model.exit_logits(exits[l][0, positions]) for l in range(6)]
    for E in range(1, 6):
        if sampling.temperature:
            q, p = (drawn_from(logits[l], sampling) for l in (E - 1, 5))
            true = torch.minimum(q, p).sum().item()
        else:
            true = (logits[E - 1].argmax(-1) == logits[5].argmax(-1)).sum().item()
        assert with_all_stats(started).exits[E].agreed == pytest.approx(1.0 + true, abs=0.01)
    assert with_all_stats(started).exits[1].tried == pytest.approx(2.0 + len(positions), abs=0.01)


def test_exits_below_and_above_the_one_that_drafts_are_probed_where_it_drafted(model, started):
    settings = Dynamic(d=3, probe=1, longest_probe=1, memory=0.999999, verify_costs=(0.1,))
    generation = Generation(model, [[7, 8, 7]], settings, max_new_tokens=40)
    assert_agreement_is_a_full_forwards(model, generation, started)


def assert_agreement_is_a_full_forwards(model, generation, started, exits=(1, 2, 3, 4, 5)):
    tokens, positions = [7, 8, 7], []
    for [emission] in generation:
        seen = min(len(emission.tokens), emission.drafted or 1)  # not after a draft accepted whole
        positions += range(len(tokens) - 1, len(tokens) - 1 + seen)
        tokens += emission.tokens
    assert generation.counters.drafted > 30
    _, x = model.run_layers(model.embed(torch.tensor([tokens])), 0, 6, exit_layers=range(6))
    predicted = [model.exit_logits(x[l][0, positions]).argmax(-1) for l in range(6)]
    assert list(with_all_stats(started).exits) == [*exits]
    for E in exits:
        true = (predicted[E - 1] == predicted[5]).sum().item()
        assert with_all_stats(started).exits[E].agreed == pytest.approx(1.0 + true, abs=0.01)


def test_exits_keep_apart_where_a_deep_one_drafts(model, started, monkeypatch):
    always_draft(monkeypatch, 4, 3)
    settings = Dynamic(d=3, probe=1, longest_probe=1, memory=0.999999)
    generation = Generation(model, [[7, 8, 7]], settings, max_new_tokens=40)
    assert_agreement_is_a_full_forwards(model, generation, started)
    assert with_all_stats(started).exits[1].agreed != pytest.approx(
        with_all_stats(started).exits[3].agreed, abs=0.5
    )


def test_rows_that_have_ended_are_not_probed(model, started):
    prompts = [
        [7, 8, 7],
        [*range(30), *range(30), *range(31)],
    ]  # 5 positions before the context's end
    settings = Dynamic(probe=1, longest_probe=1, memory=0.999999, verify_costs=(100.0,))
    for each in (prompts, prompts[:1], prompts[1:]):
        decode(model, each, settings, max_new_tokens=30, async_readback=False)
    for rounds in started:
        rounds.read_stats(rounds.rounds + 1)
    together, *alone = started
    assert together.exits[1].tried == pytest.approx(2.0 + 30 + 5, abs=0.01)
    for E, both in together.exits.items():
        each = [rounds.exits[E] for rounds in alone]
        assert both.agreed == pytest.approx(sum(e.agreed for e in each) - 1.0, abs=0.01)


@pytest.mark.parametrize(
    ("probe", "longest", "probes"),
    [
        (1, 4, [0, 2, 6, 10, 14, 18, 22, 26]),
        (3, 8, [0, 1, 2, 4, 8, 16, 24]),
        (1, 64, [0, 2, 6, 14]),
    ],
)
def test_probes_come_every_round_at_first_and_then_in_intervals_that_double(
    model, monkeypatch, probe, longest, probes
):
    probed = []
    probe_exits = dynamic_rounds.Rounds._probe_exits
    monkeypatch.setattr(
        dynamic_rounds.Rounds, "_probe_exits", lambda *given: probed.append(probe_exits(*given))
    )
    # A token a round.
    settings = Dynamic(probe=probe, longest_probe=longest, verify_costs=(100.0,))
    counts = [len(probed) for _ in Generation(model, [[7, 8, 7]], settings, max_new_tokens=30)]
    assert [n for n in range(30) if counts[n] > (counts[n - 1] if n else 0)] == probes


def test_costs_by_exit_worked_by_hand(model, started):
    given = Dynamic(exits=(2, 4), draft_costs=(0.25, 0.5), verify_costs=(1.5, 1.25))
    for settings in (Dynamic(), replace(given, verify_costs=(1.75,)), given):
        Generation(model, PROMPTS, settings, max_new_tokens=1)
    of_defaults, one_for_all, each = started
    block = 2 * 32 * 8 * (4 + 2) + 3 * 32 * 48 + 2 * 32  # the parameters of one layer
    head = 32 * 61 / block
    expected = {E: (E + head) / (6 + head) for E in range(1, 6)}
    assert of_defaults.draft_costs == pytest.approx(expected)
    assert of_defaults.verify_costs == dict.fromkeys(range(1, 6), 1.0)
    assert one_for_all.verify_costs == {2: 1.75, 4: 1.75}
    assert each.draft_costs == {2: 0.25, 4: 0.5}
    assert each.verify_costs == {2: 1.5, 4: 1.25}


def test_of_some_exits_only_these_are_probed_and_draft(model, started):
    settings = Dynamic(
        d=3, probe=1, longest_probe=1, memory=0.999999, exits=(2, 4), verify_costs=(0.1,)
    )
    generation = Generation(model, [[7, 8, 7]], settings, max_new_tokens=40)
    ran = set()
    state, run = generation._state, generation._state.run_and_tap

    def watch(h, start, stop, **options):
        ran.add((start, stop))
        return run(h, start, stop, **options)

    state.run_and_tap = watch
    assert_agreement_is_a_full_forwards(model, generation, started, exits=(2, 4))
    assert {stop for start, stop in ran if start == 0} <= {2, 4, 6}
    probed = generation.counters.head_evaluations
    everywhere = decode(model, [[7, 8, 7]], replace(settings, exits=None), max_new_tokens=40)
    assert probed < everywhere.counters.head_evaluations


@pytest.mark.usefixtures("no_layer_drafts")
def test_a_row_with_a_lookup_is_not_probed_beside_one_without(model, started):
    settings = Dynamic(d=3, probe=1, longest_probe=1, memory=0.999999, lookup_cost=0.01, ngram=1)
    generation = Generation(model, [[7, 8, 9], [5, 5, 5]], settings, max_new_tokens=20)
    without = sum(not emission.drafted for emissions in generation for emission in emissions)
    assert 10 < without < generation.counters.rounds - 10
    assert with_all_stats(started).exits[1].tried == pytest.approx(2.0 + without, abs=0.01)


@pytest.mark.usefixtures("no_layer_drafts")
@pytest.mark.parametrize("lookup_cost", [0.01, 100.0])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_lookups_agreement_is_that_of_each_rounds_lookup(model, started, lookup_cost, temperature):
    settings = Dynamic(d=3, memory=0.999999, lookup_cost=lookup_cost, ngram=1)
    sampling = Sampling(temperature=temperature)
    generation = Generation(
        model, [[7, 8, 7]], settings, max_new_tokens=80, sampling=sampling, async_readback=False
    )
    tokens, agreed, tried = [7, 8, 7], 0, 0
    for [emission] in generation:
        positions = torch.tensor([len(tokens) - 1])
        [drafts], found = look_up(torch.tensor([tokens]), positions, 1, 3)
        right = [g == t for g, t in zip(drafts.tolist(), emission.tokens, strict=False)]
        right = right[: min(3, 83 - len(tokens) - 1)]
        n = right.index(False) if False in right else len(right)
        if found:
            agreed, tried = agreed + n, tried + min(n + 1, len(right))
        tokens += emission.tokens
    assert agreed > 1
    assert with_all_stats(started).lookups.agreed == pytest.approx(1.0 + agreed, abs=0.01)
    assert with_all_stats(started).lookups.tried == pytest.approx(2.0 + tried, abs=0.01)
    assert (generation.counters.drafted > 0) == (lookup_cost < 1)


def rounds_with(model, monkeypatch, settings, agreement, lookups):
    """Return rounds whose exits, and whose lookups, have this agreement."""
    monkeypatch.setattr(Agreement, "lower_bound", lambda self: self.agreed)
    state = allocate(model, 8, slots=40, sampling=Sampling(), seed=0)
    rounds = settings.start(state)
    rounds.exits = {E: Agreement(0.9, agreed=a) for E, a in enumerate(agreement, start=1)}
    rounds.lookups = Agreement(0.9, agreed=lookups)
    return rounds


def test_when_lookups_pay_worked_by_hand(model, monkeypatch):
    draft_costs = (0.375, 0.5, 0.625, 0.75, 0.875)
    settings = Dynamic(d=3, draft_costs=draft_costs, lookup_cost=1.5, ngram=2)
    rounds = rounds_with(model, monkeypatch, settings, [0.0] * 5, 0.8)
    # Layers do not pay. A row's lookups give 1 + 0.8 + 0.64 + 0.512 = 2.952 tokens for 1.5 steps.
    plain = rounds._shape(3)
    assert plain == (1, 0, 1, 1.0)
    assert rounds._lookups_pay(0, 1, plain, 3)
    assert not rounds._lookups_pay(7, 1, plain, 3), "(2.952 + 7) / (8 * 1.5) < 1"
    assert rounds._lookups_pay(5, 3, plain, 3), "(3 * 2.952 + 5) / (8 * 1.5) > 1"
    assert not rounds._lookups_pay(6, 2, plain, 3), "(2 * 2.952 + 6) / (8 * 1.5) < 1"
    assert not rounds._lookups_pay(0, 1, plain, 0), "a plain step costs 1, not 1.5"
    free = replace(settings, lookup_cost=1.25)
    rounds = rounds_with(model, monkeypatch, free, [0.0] * 5, 0.2)
    # 1 + 0.2 + 0.04 + 0.008 = 1.248 for 1.25 steps; with 0.203 there would be 1.253.
    assert not rounds._lookups_pay(0, 1, plain, 3)
    rounds.lookups.agreed = 0.203
    assert rounds._lookups_pay(0, 1, plain, 3)
    # An exit that drafts well is better than lookups, for all rows or beside some.
    rounds = rounds_with(model, monkeypatch, free, [0.99, 0.0, 0.0, 0.0, 0.0], 0.2)
    shape = rounds._shape(3)
    assert shape[:3] == (1, 3, 1)
    assert shape.gain > 1.248 / 1.25
    assert not rounds._lookups_pay(0, 1, shape, 3)
    assert not rounds._lookups_pay(1, 1, shape, 3)
    rounds.lookups.agreed = 0.9
    assert not rounds._lookups_pay(1, 1, shape, 3)
    rounds.lookups.agreed = 0.995
    assert rounds._lookups_pay(1, 1, shape, 3)
    assert rounds._lookups_pay(0, 1, shape, 3)


def test_rows_that_have_ended_do_not_count_for_lookups(model, monkeypatch):
    rounds = rounds_with(model, monkeypatch, Dynamic(), [0.0] * 5, 0.5)
    found = torch.tensor([True, True, False, False, False, False, False, True])
    lookups = NgramDrafts(torch.zeros(8, 2, dtype=torch.int64), found, 61, greedy=True)
    assert rounds._count_lookups(lookups) == (5, 3)
    rounds.state.batch.finished[2:] = True
    assert rounds._count_lookups(lookups) == (0, 2)
    assert rounds.state.counters.syncs == 2


@pytest.mark.usefixtures("no_layer_drafts")
def test_lookups_of_some_rows_are_verified_where_they_pay_for_all(model, monkeypatch):
    monkeypatch.setattr(dynamic_rounds.Rounds, "_probe_is_due", lambda self: False)
    settings, prompts = Dynamic(d=3, ngram=1, lookup_cost=0.01), [[7, 8, 9], [5, 5, 5]]
    generation = Generation(model, prompts, settings, max_new_tokens=20)
    mixed = [len({bool(e.drafted) for e in emissions}) == 2 for emissions in generation]
    assert mixed.count(True) > 3


@pytest.mark.parametrize("stop", [{"stop": 1.1}, {"stop_entropy": 0.0}])
def test_a_draft_that_is_not_confident_ends(model, monkeypatch, stop):
    always_draft(monkeypatch, 4, 3)
    for settings, drafted in ((Dynamic(d=3, **stop), 1), (Dynamic(d=3), 3)):
        generation = Generation(model, [[7, 8, 7]], settings, max_new_tokens=30)
        assert next(iter(generation))[0].drafted == drafted


def test_counts_of_a_round_are_read_two_rounds_later(model, monkeypatch):
    log = []

    class Noted(HostCopy):
        def __init__(self, tensor):
            super().__init__(tensor)
            self.sent = len(log)

        def read(self):
            log[-1].append(self.sent)
            return super().read()

    def counted(self, max_tokens, call=dynamic_rounds.Rounds.__call__):
        log.append([])
        return call(self, max_tokens)

    monkeypatch.setattr(dynamic_rounds, "HostCopy", Noted)
    monkeypatch.setattr(dynamic_rounds.Rounds, "__call__", counted)
    always_draft(monkeypatch, 4, 1)
    decode(model, [[7, 8, 7]], Dynamic(d=1), max_new_tokens=30)
    assert len(log) > 14
    assert log[:2] == [[], []]
    assert log[2:] == [[n] for n in range(1, len(log) - 1)], "one a round, of the one before last"


def test_the_choice_follows_the_agreement_observed_while_a_generation_goes_on():
    model = build(small(n_layers=6, max_seq_len=256)).eval().requires_grad_(False)
    for l in (2, 3, 4, 5):  # from two layers on, all exits agree
        model.layers[str(l)].attention.wo.weight.zero_()
        model.layers[str(l)].feed_forward.w2.weight.zero_()
    generation = Generation(model, [[7, 8, 7]], Dynamic(d=4), max_new_tokens=150)
    drafted = [emission.drafted for [emission] in generation]
    assert drafted[:2] == [0, 0], "nothing is observed yet"
    assert drafted[12:-2] == [4] * (len(drafted) - 14)


def test_exits_are_not_credited_with_the_lookups_of_other_rows(model, started, monkeypatch):
    always_draft(monkeypatch, 4, 2, gain=1.01)
    monkeypatch.setattr(dynamic_rounds.Rounds, "_probe_is_due", lambda self: False)
    monkeypatch.setattr(dynamic_rounds.Rounds, "_lookups_pay", lambda *given: True)
    settings = Dynamic(d=2, memory=0.999999, ngram=1)
    prompts = [[7, 8, 9], [5, 5, 5]]
    generation, rows, tried, mixed = (
        Generation(model, prompts, settings, max_new_tokens=20),
        {},
        0,
        0,
    )
    rows = {i: list(p) for i, p in enumerate(prompts)}
    for emissions in generation:
        found = {}
        for row, tokens in rows.items():
            position = torch.tensor([len(tokens) - 1])
            found[row] = bool(look_up(torch.tensor([tokens]), position, 1, 1)[1])
        alone = all(found[emission.prompt_index] for emission in emissions)
        mixed += not alone and any(found[emission.prompt_index] for emission in emissions)
        for emission in emissions:
            if not found[emission.prompt_index] and emission.drafted:
                tried += min(emission.accepted + 1, emission.drafted)
            rows[emission.prompt_index] += emission.tokens
    assert mixed > 3
    assert tried > 5
    assert with_all_stats(started).exits[4].tried == pytest.approx(2.0 + tried, abs=0.01)


def test_lookups_are_verified_where_layers_do_not_pay(model):
    settings = Dynamic(verify_costs=(1000.0,), lookup_cost=0.95, ngram=1, d=3)
    alone = decode(model, [[7, 8, 7]], settings).counters
    assert alone.drafted > 0
    assert decode(model, [[7, 8, 7]], Dynamic(verify_costs=(1000.0,), d=3)).counters.drafted == 0


@pytest.mark.parametrize(("agreed", "used"), [(0, False), (1, True)])
def test_lookups_stop_once_they_do_not_agree(model, monkeypatch, agreed, used):
    def count(lookups, result, live):
        return torch.tensor([agreed, 1]) * (lookups.found & live).sum()

    monkeypatch.setattr(dynamic_rounds, "count_agreed_lookups", count)
    settings = Dynamic(verify_costs=(1000.0,), lookup_cost=1.5, ngram=1, d=3)
    counters = decode(model, PROMPTS[:1], settings, max_new_tokens=60).counters
    assert (counters.drafted > 0) == used
    layers = replace(settings, verify_costs=(1.0,), lookup_cost=1.0)
    always_draft(monkeypatch, 1, 1, gain=1.9)
    by_layers = decode(model, PROMPTS[:1], layers, max_new_tokens=60).counters
    assert (by_layers.drafted > by_layers.rounds) == used, "three lookups, or one drafted token"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Dynamic(d=0), "d: 0, give at least 1"),
        (Dynamic(probe=0, memory=1.0), "probe: 0, .*; memory: 1.0, give a number between"),
        (Dynamic(longest_probe=0), "longest_probe: 0, give at least 1 round"),
        (Dynamic(exits=(2, 1)), r"exits: 2\+1, dynamic needs ascending layers from 1 to 5"),
        (Dynamic(exits=(3, 6)), r"exits: 3\+6, dynamic needs"),
        (Dynamic(exits=()), "exits: none, dynamic needs"),
        (Dynamic(exits=(1, 2), draft_costs=(0.5, -1.0)), r"draft_costs: 0.5\+-1.0, give full"),
        (Dynamic(draft_costs=(0.5,)), "draft_costs: 0.5, give 5 of them"),
        (Dynamic(verify_costs=(0.0,)), "verify_costs: 0.0, give full steps, more than 0"),
        (Dynamic(verify_costs=(1.0, 2.0)), r"verify_costs: 1.0\+2.0, give 1 or 5 of them"),
        (Dynamic(verify_costs=()), "verify_costs: , give 1 or 5 of them"),
        (Dynamic(lookup_cost=inf), "lookup_cost: inf"),
        (Dynamic(ngram=-1), "ngram: -1"),
        (Dynamic(branch=2, leaf_costs=(0.1,)), "leaf_costs: 0.1, give 2 of them"),
    ],
    ids=range(14),
)
def test_settings_that_do_not_fit_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, settings)
