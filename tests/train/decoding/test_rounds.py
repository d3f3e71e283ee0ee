"""Rounds counted from one greedy continuation are those that self-speculation really makes."""

from dataclasses import replace

import pytest
import torch

from inference.engine.generation import Generation
from inference.evaluation.exit_traces import record_continuations
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.self_speculative import SelfSpeculative
from models.config import LlamaConfig
from models.flops import total_params
from models.llama import Llama
from train.decoding.continuation import continue_greedily
from train.decoding.rounds import Rounds, count_rounds, draft_cost, speedup_bound, up_to_end

CPU, NEW = torch.device("cpu"), 14
PLAIN = LlamaConfig(
    dim=16, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=24, vocab_size=31, max_seq_len=32
)
MODELS = {
    "plain": PLAIN,
    "window": replace(PLAIN, sliding_window=5),
    "routed": replace(PLAIN, router="linear"),
    "own_exits": replace(PLAIN, own_exits=(1, 2), own_exit_mlp=True, tie_embeddings=True),
}
PROMPTS = [[7, 3, 9, 1, 30, 4, 4, 12], [5], [11, 2, 29], [20, 20, 8, 6, 19], [1, 13], [9, 17, 25]]


def build(config):
    """Return a model whose exits are often right and often wrong."""
    model = Llama(config)
    model.init_weights(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "routers" in name:  # some tokens skip some layers
                parameter += 0.3 * torch.randn(parameter.shape, generator=SEEDED)
            elif "layers" in name and parameter.dim() == 2:
                parameter *= 4.0
    return model


SEEDED = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", MODELS)
def test_rounds_and_accepted_drafts_are_those_of_self_speculative(name):
    model = build(MODELS[name])
    L = model.config.n_layers
    choices = continue_greedily(model, PROMPTS, [L] * len(PROMPTS), NEW, CPU)
    plain = record_continuations(model, PROMPTS, max_new_tokens=NEW, batch_size=len(PROMPTS))
    assert torch.equal(choices, torch.stack(plain))
    # Tokens that end a row: one that no row has, one that some do.
    texts = [row[-1].tolist() for row in choices]
    common = max(set(sum(texts, [])), key=lambda token: sum(token in text for text in texts[:-1]))
    unused = next(token for token in range(31) if all(token not in text for text in texts))
    shares = set()
    pairs = ((1, 1), (1, 3), (2, 30), (3, 4)) if name == "plain" else ((2, 3),)
    for end in (unused, common):
        for E, d in pairs:
            counters = Generation(
                model, PROMPTS, SelfSpeculative(E=E, d=d),
                max_new_tokens=NEW, batch_size=1, stop_tokens=[end],
            ).finish().counters  # fmt: skip
            rows = choices.tolist()
            found = sum((count_rounds(row[E - 1], row[-1], d, end) for row in rows), Rounds())
            real = (counters.tokens, counters.rounds, counters.drafted, counters.accepted)
            assert (found.tokens, found.rounds, found.drafted, found.accepted) == real, (E, d, end)
            shares.add(found.accepted / found.drafted)
    assert any(0.05 < share < 0.95 for share in shares), "the test would show nothing"


def test_each_row_goes_on_by_its_own_exit():
    model = build(PLAIN)
    grads = []
    model.register_forward_pre_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    prompts, exits = [PROMPTS[0], PROMPTS[0], PROMPTS[2]], [2, 4, 1]
    choices = continue_greedily(model, prompts, exits, NEW, CPU)
    for row, prompt, E in zip(choices, prompts, exits, strict=True):
        shallow = Llama(replace(PLAIN, n_layers=E))
        shallow.load_state_dict(
            {n: w for n, w in model.state_dict().items() if n in shallow.state_dict()}
        )
        text = Generation(shallow, [prompt], Autoregressive(), max_new_tokens=NEW).finish().tokens
        assert row[E - 1].tolist() == text[0]
    assert grads == NEW * [False]


def test_a_row_is_read_up_to_its_end():
    choices = torch.tensor([[1, 2, 3, 4], [5, 2, 2, 4]]).numpy()
    assert up_to_end(choices, 2).tolist() == [[1, 2], [5, 2]]
    assert up_to_end(choices, 9).shape == (2, 4)


def test_a_draft_costs_the_weights_it_reads_and_bounds_the_speedup():
    embedding, norm = PLAIN.vocab_size * PLAIN.dim, PLAIN.dim
    read = [
        total_params(replace(PLAIN, n_layers=E, tie_embeddings=True)) - norm for E in (1, 2, 3, 4)
    ]
    assert draft_cost(PLAIN, 4) == 1.0
    assert draft_cost(PLAIN, 2) == pytest.approx(read[1] / read[3])
    assert draft_cost(PLAIN, 1) > embedding / read[3]
    # Three tokens a round for one full step and four drafts of half of one.
    assert speedup_bound(Rounds(tokens=12, rounds=4, drafted=16, accepted=8), 4, 0.5) == 1.0
