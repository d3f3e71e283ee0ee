"""Texts come and go, and each gets the tokens it would get alone, whatever decodes it."""

import random

import pytest
import torch

from inference.engine.open_batch import OpenBatch
from inference.engine.row_draws import RowDraw, RowDraws, gumbel
from inference.engine.sampling import Sampling, draw_weights
from inference.strategies.registry import parse_strategy
from tests.inference.every_strategy import decode, make_model

GREEDY = RowDraw(Sampling(), 0)
LOSSLESS = (
    "autoregressive",
    "self_speculative:E=2:d=3:stop=0.2",
    "self_speculative:E=3:d=2:branch=3",
    "dynamic:d=4:ngram=2",
    "skip_draft:d=3",
    "free:rollback=exact:threshold=0.2",
)
LOSSY = ("calm:threshold=0.2", "skipdecode", "unified")
LIMIT = 9


@pytest.fixture(scope="module")
def model():
    return make_model(n_layers=4)


def jobs():
    """Return 21 texts to continue, greedy and sampled, as (prompt, draw, limit)."""
    draw = random.Random(1)
    settings = [
        Sampling(),
        Sampling(temperature=1.0),
        Sampling(temperature=0.8, top_p=0.7),
        Sampling(temperature=1.3, top_k=5),
    ]
    return [
        (
            [draw.randrange(20) for _ in range(draw.randint(1, 9))],
            RowDraw(settings[i % 4], 2**64 - 1 - i),
            LIMIT - i % 3,
        )
        for i in range(21)
    ]


def run(model, strategy, jobs, *, rows, arrivals=None):
    """Return the tokens of each job; `arrivals` holds the round at which it may join."""
    batch = OpenBatch(model, lambda n: strategy, rows=rows, slots=24)
    waiting, tokens, rounds = [*enumerate(jobs)], {}, 0
    while waiting or len(batch):
        while batch.free and waiting and (arrivals is None or arrivals[waiting[0][0]] <= rounds):
            key, (prompt, draw, limit) = waiting.pop(0)
            batch.join(key, prompt, limit=limit, draw=draw)
            tokens[key] = []
        rounds += 1
        if len(batch):
            for key, emission in batch.round().items():
                tokens[key] += emission.tokens
    return [tokens[key] for key in range(len(jobs))]


@pytest.fixture(scope="module")
def plain(model):
    """What plain decoding gives each text alone."""
    return [run(model, parse_strategy("autoregressive"), [job], rows=1)[0] for job in jobs()]


ARRIVALS = sorted([0, 0, 0, *range(18)])


@pytest.mark.parametrize("text", LOSSLESS)
def test_a_text_among_20_others_gets_its_tokens_whatever_drafts_them(model, plain, text):
    assert run(model, parse_strategy(text), jobs(), rows=5, arrivals=ARRIVALS) == plain
    assert [len(tokens) for tokens in plain] == [limit for _, _, limit in jobs()]
    assert len({tuple(tokens) for tokens in plain}) > 15


@pytest.mark.parametrize("text", LOSSY)
def test_a_text_among_20_others_gets_what_a_lossy_strategy_gives_it_alone(model, text):
    strategy = parse_strategy(text)
    together = run(model, strategy, jobs(), rows=5, arrivals=ARRIVALS)
    for i in (0, 6, 20):
        assert run(model, strategy, [jobs()[i]], rows=1) == [together[i]]


def test_greedy_tokens_are_those_of_a_generation(model):
    prompts = [prompt for prompt, _, _ in jobs()[:6]]
    greedy = [(prompt, GREEDY, LIMIT) for prompt in prompts]
    strategy = parse_strategy("self_speculative:E=2:d=3")
    generation = decode(model, prompts, strategy, max_new_tokens=LIMIT)
    assert run(model, strategy, greedy, rows=3) == generation.tokens


def test_drafts_that_see_the_same_noise_are_often_accepted(model):
    batch = OpenBatch(
        model, lambda n: parse_strategy("self_speculative:E=3:d=3"), rows=2, slots=100
    )
    batch.join(0, [3, 4], limit=90, draw=RowDraw(Sampling(temperature=1.0), 5))
    while len(batch):
        batch.round()
    assert batch.counters.acceptance_rate > 0.5


def test_a_row_left_is_free_and_the_others_go_on(model):
    strategy = parse_strategy("self_speculative:E=2:d=3")
    [alone] = run(model, strategy, [([7, 8], GREEDY, LIMIT)], rows=1)
    batch, tokens = OpenBatch(model, lambda n: strategy, rows=3, slots=24), []
    for key in (0, 1, 2):
        batch.join(key, [7, 8] if key == 2 else [key + 1], limit=LIMIT, draw=GREEDY)
    tokens += batch.round()[2].tokens
    batch.leave(0)
    batch.leave(1)
    assert batch.free == 2
    while len(batch):
        tokens += batch.round()[2].tokens
    assert tokens == alone


def test_a_strategy_for_each_number_of_rows_changes_no_token(model, plain):
    by_rows = {1: "self_speculative:E=2:d=4", 2: "dynamic:d=3", 4: "autoregressive"}
    batch = OpenBatch(model, lambda n: parse_strategy(by_rows[n]), rows=4, slots=24)
    tokens, used = {key: [] for key in range(4)}, set()
    for key, (prompt, draw, limit) in enumerate(jobs()[:4]):
        batch.join(key, prompt, limit=limit - 2 * key, draw=draw)
    while len(batch):
        used.add(batch.strategy.name)
        for key, emission in batch.round().items():
            tokens[key] += emission.tokens
    for key, one in enumerate(plain[:4]):
        assert tokens[key] == one[: len(tokens[key])]
    assert used == {"self_speculative", "dynamic", "autoregressive"}


def test_a_stop_token_ends_a_text(model):
    [alone] = run(model, parse_strategy("autoregressive"), [([7], GREEDY, LIMIT)], rows=1)
    strategy = parse_strategy("self_speculative:E=2:d=3")
    stop = alone[3]
    batch = OpenBatch(model, lambda n: strategy, rows=1, slots=24, stop_tokens=(stop,))
    batch.join(0, [7], limit=LIMIT, draw=GREEDY)
    found = []
    while len(batch):
        found += batch.round()[0].tokens
    assert found == alone[: alone.index(stop) + 1]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.8),
        Sampling(temperature=1.5, top_k=3),
        Sampling(temperature=1.5, top_k=4, top_p=0.6),
    ],
)
def test_draws_over_seeds_and_positions_have_the_models_distribution(sampling):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    expected = draw_weights(logits, sampling)
    rows, length = 40, 500
    draws = RowDraws.of([RowDraw(sampling, seed) for seed in range(rows)], logits.device)
    positions = torch.arange(length).expand(rows, -1)
    tokens = draws.scores(logits.expand(rows, length, -1), positions).argmax(-1)
    counts = torch.bincount(tokens.flatten(), minlength=8).double()
    assert not counts[expected == 0].any()
    kept = expected > 0
    n = rows * length
    chi2 = ((counts - n * expected) ** 2 / (n * expected))[kept].sum()
    assert chi2 < 24.3  # 7 degrees of freedom: above it once in 1000
    # Neighbours in position and in seed are independent: their pairs have the product's counts.
    pairs = torch.bincount((tokens[:, 1:] * 8 + tokens[:, :-1]).flatten(), minlength=64).double()
    product = (expected[:, None] * expected).flatten() * rows * (length - 1)
    there = product > 5
    assert ((pairs - product) ** 2 / product)[there].sum() < 110  # 63: above it once in 5000


def test_noise_is_that_of_gumbel():
    noise = gumbel(torch.arange(4)[:, None], torch.arange(50).expand(4, -1), 500).double()
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.57722, abs=0.02)  # 5 standard errors
    assert noise.var() == pytest.approx(1.64493, abs=0.05)
    assert len(noise.unique()) > 0.99 * noise.numel()
