"""Rounds replayed from graphs give the tokens and counts of rounds that are run."""

from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch

from inference.engine.batch import Round
from inference.engine.compiled import WINDOW_STEP
from inference.engine.cuda_graphs import GraphedRounds, graphed, round_graphs
from inference.engine.decoder import GraphableDecoder, advancing
from inference.engine.generation import Generation
from inference.engine.prefill import allocate, prefill
from inference.engine.sampling import Sampling
from inference.evaluation.costs import measure_costs
from inference.evaluation.measurement import AUTOREGRESSIVE, Workload, measure
from inference.strategies import speculative
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.early_exit import EarlyExit
from inference.strategies.pruned import Pruned
from inference.strategies.registry import describe, parse_strategy
from inference.strategies.self_speculative import SelfSpeculative
from inference.strategies.skip_draft import SkipDraft
from inference.strategies.speculative import Speculative
from inference.strategies.unified import Unified
from models.host_copy import HostCopy
from models.llama import NOTHING, Llama
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.inference.recorders import Rerunner, on_device_alone, rerunning
from tests.models.test_llama import build, small

SKIP_DRAFT = SkipDraft(d=3, gamma=0.0, attention=(1,), feed_forward=(2,))
GRAPHABLE = [
    Autoregressive(),
    EarlyExit(E=2),
    SelfSpeculative(E=2, d=3),
    SelfSpeculative(E=2, d=3, branch=2),
    Unified(speedup=2.0),
    Pruned(keep=(0, 2, 3)),
    SKIP_DRAFT,
    Speculative(draft="another", d=3),
]
MORE_PROMPTS = [*PROMPTS, [11], [12, 13, 14, 15, 16], [17, 18], [3, 4], [19] * 12, [20, 21], [22]]


@pytest.fixture(scope="module")
def model():
    return make_model(4)


@pytest.fixture(autouse=True)
def another_model(monkeypatch):
    draft = build(small(n_layers=2, n_kv_heads=2), seed=2).eval().requires_grad_(False)

    class Loaded:
        model = draft

    monkeypatch.setattr(speculative, "_load", lambda *where: Loaded)
    return draft


def counts(generation):
    counters = asdict(generation.counters)
    return {name: n for name, n in counters.items() if not name.endswith("seconds")}


@pytest.mark.parametrize("strategy", GRAPHABLE, ids=describe)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_tokens_and_counts_are_those_without_graphs(model, strategy, batch_size):
    prompts = MORE_PROMPTS if batch_size > 1 else MORE_PROMPTS[:4]
    whole = decode(model, prompts, strategy).tokens
    stops = [whole[0][4], whole[2][9]]
    graphs, recorders = rerunning()
    for options in ({}, {"stop_tokens": stops}, {"async_readback": True, "stop_tokens": stops}):
        options = {"batch_size": batch_size, **options}
        plain = decode(model, prompts, strategy, **options)
        ours = decode(model, prompts, strategy, graphs=graphs, **options)
        assert ours.tokens == plain.tokens
        assert counts(ours) == counts(plain)
    [recorder] = recorders
    # One for each number of tokens at most: all rows fit the first window.
    assert 0 < recorder.recorded <= (1 if plain.counters.drafted == 0 else 4)
    assert recorder.replayed > 20


@pytest.mark.parametrize("d", [1, 3, 50])
@pytest.mark.parametrize("longest", [1, 18, 23])
@pytest.mark.parametrize("late", [False, True])
def test_rows_fill_the_context_and_end(another_model, d, longest, late):
    model = build(small(n_layers=3, n_kv_heads=2, max_seq_len=24)).eval().requires_grad_(False)
    prompts = [list(range(longest)), [5, 6]]
    plain = decode(model, prompts, AUTOREGRESSIVE, max_new_tokens=100).tokens
    for strategy in (
        SelfSpeculative(E=2, d=d),
        replace(SKIP_DRAFT, d=d),
        Speculative(draft="another", d=d),
    ):
        graphs, [*_] = rerunning()
        for _ in range(2):
            ours = decode(
                model, prompts, strategy, max_new_tokens=100, graphs=graphs, async_readback=late
            )
            assert ours.tokens == plain


def test_windows_are_few_and_hold_every_token(another_model):
    slots = 2 * WINDOW_STEP + 44
    for strategy, most in ((AUTOREGRESSIVE, 1), (SelfSpeculative(E=2, d=3), 4)):
        model = build(small(n_layers=3, n_kv_heads=2, max_seq_len=slots)).eval()
        plain = decode(model, PROMPTS[:2], strategy, max_new_tokens=slots)
        graphs, [*_] = rerunning()
        generation = Generation(
            model, PROMPTS[:2], strategy, max_new_tokens=slots, graphs=graphs, async_readback=False
        )
        state, windows = generation._state, set()
        set_window = state.cache.set_window

        def watch(n, state=state, windows=windows, set_window=set_window):
            set_window(n)
            assert n > int(state.batch.positions.max())
            windows.add(state.cache.window)

        state.cache.set_window = watch
        assert generation.finish().tokens == plain.tokens
        batch = graphs.take(model, 2, slots=slots, sampling=Sampling(), seed=0)
        ends = (WINDOW_STEP, 2 * WINDOW_STEP, slots)
        assert windows <= {end - i for end in ends for i in range(most)} | {len(PROMPTS[0]) - 1}
        by_tokens = [n for n, _ in batch._decoders[strategy]._graphs]
        assert by_tokens.count(most) == 3
        assert batch.recorder.recorded <= 3 * most


@pytest.mark.parametrize("strategy", GRAPHABLE, ids=describe)
def test_the_host_keeps_the_same_length_after_every_round(model, strategy):
    seen = []
    for recorder in (None, Rerunner()):
        state = allocate(model, 3, slots=60, sampling=Sampling(), seed=0)
        prefill(state, PROMPTS[:3], (4, NOTHING))
        decoder = advancing(state.batch, strategy.with_defaults(4).start(state))
        if recorder is not None:
            decoder = graphed(state, decoder, recorder)
        seen.append([])
        for max_tokens in (9, 9, 9, 9, 2, 2, 2, 9, 1, 1, 1, 9):
            decoder(max_tokens)
            assert state.batch.max_position >= int(state.batch.positions.max())
            seen[-1].append(
                (state.batch.max_position, deepcopy(state.counters), state.batch.positions.tolist())
            )
    assert seen[0] == seen[1]
    assert recorder.replayed > 3


@pytest.mark.parametrize(
    "text", ["self_speculative:E=2:d=3", "skip_draft:d=3:gamma=0.0", "speculative:draft=x:d=3"]
)
def test_every_replay_draws_on_and_the_seed_decides(model, text):
    strategy = parse_strategy(text)
    graphs, _ = rerunning()
    options = {"sampling": Sampling(temperature=1.0, top_p=0.9), "max_new_tokens": 30}
    plain = [decode(model, PROMPTS, strategy, seed=seed, **options).tokens for seed in (1, 2)]
    assert plain[0] != plain[1]
    for seed in (1, 2, 1):
        ours = decode(model, PROMPTS, strategy, seed=seed, graphs=graphs, **options)
        assert ours.tokens == plain[seed - 1]


@pytest.mark.parametrize(
    "text",
    [
        "self_speculative:E=2:d=3:stop=0.1",
        "self_speculative:E=2:d=3:ngram=1",
        "skip_draft:d=3",
        "dynamic:d=3",
        "calm:threshold=0.1",
        "skipdecode:min_layers=2:length=6",
        "free:exits=1+3:threshold=0.08:max_pending=4",
    ],
)
def test_rounds_that_sync_are_run_as_they_are(model, text):
    strategy, (graphs, recorders) = parse_strategy(text), rerunning()
    for _ in range(2):  # what one generation learned is not the next one's
        plain = decode(model, MORE_PROMPTS, strategy, batch_size=2)
        ours = decode(model, MORE_PROMPTS, strategy, batch_size=2, graphs=graphs)
        assert ours.tokens == plain.tokens
        assert counts(ours) == counts(plain)
    assert [recorder.recorded for recorder in recorders] == [0]


def test_arms_in_turn_share_a_batch_and_keep_their_graphs(model):
    graphs, recorders = rerunning()
    arms = [strategy.with_defaults(4) for strategy in GRAPHABLE]
    arms.sort(key=lambda arm: arm.spare_slots(60), reverse=True)
    plain = [decode(model, PROMPTS, arm).tokens for arm in arms]
    recorded = []
    for _ in range(3):
        assert [decode(model, PROMPTS, arm, graphs=graphs).tokens for arm in arms] == plain
        recorded.append(recorders[0].recorded)
    assert len(recorders) == 1, "the spare slots of one serve all"
    assert recorded[1] == recorded[2], "by then every kind of round has its graph"
    decode(model, PROMPTS[:2], arms[0], graphs=graphs)
    assert len(recorders) == 2, "another number of rows is another batch"


def test_generations_at_the_same_time_do_not_share_a_batch(model):
    graphs, recorders = rerunning()
    plain = [decode(model, [prompt], AUTOREGRESSIVE).tokens for prompt in ([1, 2], [8, 9])]
    assert decode(model, [[1, 2]], AUTOREGRESSIVE, graphs=graphs).tokens == plain[0]
    two = [
        Generation(model, [prompt], AUTOREGRESSIVE, max_new_tokens=20, graphs=graphs)
        for prompt in ([1, 2], [8, 9])
    ]
    for _ in zip(*two, strict=True):
        pass
    assert [generation.tokens for generation in two] == plain
    assert len(recorders) == 2


def test_measurements_take_graphs(model):
    graphs, recorders = rerunning()
    workload = Workload(
        prompts=PROMPTS, max_new_tokens=20, batch_size=2, sampling=Sampling(), seed=0
    )
    arms = [AUTOREGRESSIVE, SelfSpeculative(E=2, d=3), SelfSpeculative(E=2, d=3, branch=2)]
    plain = measure(model, arms, workload, repeats=1, report=str)
    ours = measure(model, arms, workload, repeats=1, report=str, graphs=graphs)
    for name in ("layers_per_token", "heads_per_token", "acceptance_rate", "same_tokens"):
        assert [getattr(r, name) for r in ours] == [getattr(r, name) for r in plain]
    assert len(recorders) == 2, "one for the decoding, one for the costs"
    assert all(recorder.replayed > 10 for recorder in recorders)
    assert min(r.peak_bytes for r in ours) >= recorders[0].idle_bytes()
    costs = measure_costs(model, [[1, 2, 3], [4, 5, 6]], 2, branch=2, graphs=graphs)
    assert (len(costs.draft), len(costs.layers)) == (3, 3)
    assert recorders[2].recorded == 4 + 2 * 3 + 2 * 3 + 1 + 1 + 1 + 2, (
        "step, pass, round, lookups, all heads, a pass with leaves, rounds with them"
    )


def test_a_copy_is_of_the_numbers_as_they_were():
    numbers = torch.tensor([[1, 2], [3, 4]])
    copy = HostCopy(numbers)
    numbers.zero_()
    assert copy.read() == [[1, 2], [3, 4]]


def test_only_gpus_have_graphs():
    assert round_graphs(torch.device("cpu")) is None
    assert round_graphs(torch.device("cuda", 1)) is not None


def test_a_decoder_that_syncs_is_refused_before_it_is_captured(model):
    state = allocate(model, 1, slots=20, sampling=Sampling(), seed=0)
    prefill(state, [[1, 2]], (4, NOTHING))

    def syncs(n):
        state.sync_bool(state.batch.positions.sum() > 0)
        return Round.plain(state.batch.pending[:, None])

    recorder = Rerunner()
    with pytest.raises(AssertionError, match="may not sync with the host"):
        GraphedRounds(state, GraphableDecoder(1, syncs), recorder)(1)
    assert recorder.recorded == 0


def on_no_data(**options):
    """Return a model on torch's device without data, where every answer is an error."""
    with torch.device("meta"):
        return Llama(small(**options)).requires_grad_(False)


def start_on_no_data(strategy, *, temperature=0.0):
    model = on_no_data(n_layers=4, n_kv_heads=2)
    state = allocate(model, 3, slots=30, sampling=Sampling(), seed=0)
    state.batch.max_position, decoder = 5, strategy.with_defaults(4).start(state)
    if temperature:  # not before: there are no generators of this device
        state.sampling = Sampling(temperature=temperature, top_k=5, top_p=0.9)
        state.generator = torch.Generator()
        if isinstance(strategy, Speculative):
            decoder.run._drafter.sampling = state.sampling
    return state, decoder


@torch.no_grad()
@pytest.mark.parametrize("strategy", GRAPHABLE, ids=describe)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rounds_neither_sync_nor_take_anything_of_the_host(monkeypatch, strategy, temperature):
    monkeypatch.setattr(speculative._load(), "model", on_no_data(n_layers=2))
    state, decoder = start_on_no_data(strategy, temperature=temperature)
    assert isinstance(decoder, GraphableDecoder)
    for n in range(1, decoder.max_tokens + 1):
        with on_device_alone():
            result = advancing(state.batch, decoder.run)(n)
        assert result.tokens.shape == (3, n)
        assert result.tokens.device.type == "meta"


@torch.no_grad()
@pytest.mark.parametrize(
    "mistake",
    [
        lambda h: h.sum().item(),
        lambda h: h.amax(-1).tolist(),
        lambda h: h[h > 0],
        lambda h: bool((h > 0).all()),
        lambda h: h + torch.tensor([1.0, 2.0], device=h.device).sum(),
        lambda h: h + torch.ones(1).to(h.device),
        lambda h: h.cpu(),
        lambda h: h.masked_fill(torch.tensor(True), 0.0),
    ],
    ids=["item", "tolist", "mask", "bool", "constant", "to", "cpu", "scalar"],
)
def test_what_a_round_may_not_do_is_seen(monkeypatch, mistake):
    state, decoder = start_on_no_data(Autoregressive())
    run = state.model.run_layers

    def wrong(h, *args, **options):
        mistake(h)
        return run(h, *args, **options)

    monkeypatch.setattr(state.model, "run_layers", wrong)
    with on_device_alone(), pytest.raises((AssertionError, RuntimeError), match="host|meta"):
        decoder.run(1)


@torch.no_grad()
def test_strategies_that_sync_are_not_graphable():
    _, decoder = start_on_no_data(parse_strategy("self_speculative:E=2:d=3:stop=0.5"))
    assert not isinstance(decoder, GraphableDecoder)
    with on_device_alone(), pytest.raises(RuntimeError, match="meta"):
        decoder(4)
