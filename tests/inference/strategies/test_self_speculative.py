"""Self-speculation decodes what the full model decodes: its tokens, its distribution, its KV."""

import json
from itertools import product

import pytest
import torch

from inference.engine.generation import Generation
from inference.engine.sampling import Sampling, draw_weights, sample
from inference.strategies import drafting, self_speculative
from inference.strategies.registry import parse_strategy
from models.rope import apply_rope
from tests.models.test_llama import build, small

PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="module")
def model():
    return build(small(n_layers=4, n_kv_heads=2)).eval().requires_grad_(False)


def start(model, prompts, E=None, d=None, *, name="self_speculative", **options):
    """Begin to decode with a strategy, or with what stands behind its name as text."""
    strategy = parse_strategy(name, E=E and str(E), d=d and str(d))
    return Generation(model, prompts, strategy, **({"max_new_tokens": 30} | options))


@pytest.fixture(scope="module")
def greedy(model):
    return start(model, PROMPTS, name="autoregressive").finish().tokens


@pytest.mark.parametrize("d", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("E", [1, 2, 3])
def test_greedy_tokens_are_autoregressive_decodings(model, greedy, E, d):
    together = start(model, PROMPTS, E, d).finish()
    assert together.tokens == greedy
    assert 0 < together.counters.accepted < together.counters.drafted
    assert start(model, PROMPTS[:1], E, d).finish().tokens == greedy[:1]


def test_drafts_of_a_model_whose_later_layers_do_nothing_are_all_accepted():
    model = build(small(n_layers=4)).eval().requires_grad_(False)
    for l in (2, 3):
        model.layers[str(l)].attention.wo.weight.zero_()
        model.layers[str(l)].feed_forward.w2.weight.zero_()
    counters = start(model, PROMPTS, 2, 4).finish().counters
    assert counters.acceptance_rate == 1.0
    assert counters.tokens_per_round == 5.0


def test_kv_of_draft_and_verify_is_kv_of_a_full_forward(model):
    generation = start(model, PROMPTS, 2, 3)
    for _ in range(6):
        next(generation)
    for row, prompt in enumerate(PROMPTS):
        ids = prompt + generation.tokens[row]
        tokens = torch.tensor([ids[:-1]])  # the last token is pending
        seq = tokens.shape[1]
        h = model.embed(tokens)
        _, exits = model.run_layers(h, 0, 4, exit_layers=range(4))
        cos, sin = model.rope_cos[:seq], model.rope_sin[:seq]
        for l, x in enumerate([h, exits[0], exits[1], exits[2]]):
            block = model.layers[str(l)]
            normed = block.attention_norm(x)
            k = block.attention.wk(normed).view(1, seq, 2, 8).transpose(1, 2)
            v = block.attention.wv(normed).view(1, seq, 2, 8).transpose(1, 2)
            cache = generation._state.cache
            # One pass over the row and many over parts of it round differently.
            close = {"atol": 1e-5, "rtol": 0}
            torch.testing.assert_close(cache.values[l][row, :, :seq], v[0], **close)
            torch.testing.assert_close(
                cache.keys[l][row, :, :seq], apply_rope(k, cos, sin)[0], **close
            )


def poisoned(generation, value):
    for buffer in generation._state.cache.keys + generation._state.cache.values:
        buffer.fill_(value)
    return generation.finish().tokens


@pytest.mark.parametrize("name", ["autoregressive", "early_exit", "self_speculative"])
def test_one_row_reads_no_slot_nobody_wrote(model, name):
    clean = start(model, PROMPTS[:1], 2, 5, name=name).finish().tokens
    assert poisoned(start(model, PROMPTS[:1], 2, 5, name=name), torch.nan) == clean


@pytest.mark.parametrize("name", ["autoregressive", "early_exit", "self_speculative"])
def test_ragged_rows_give_no_weight_to_slots_nobody_wrote(model, name):
    # Inside a shorter row's window lie unwritten slots. Their weight is exactly 0, and 0 times a
    # huge value is 0; 0 times NaN would be NaN, which is why the buffers begin as zeros.
    clean = start(model, PROMPTS, 2, 5, name=name).finish().tokens
    assert poisoned(start(model, PROMPTS, 2, 5, name=name), 1e30) == clean


SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=1.5, top_k=4),
    Sampling(temperature=1.2, top_p=0.8),
    Sampling(temperature=0.8, top_k=5, top_p=0.9),
]
VOCAB, LENGTH, ROWS = 6, 3, 4_000


def exact_joint(model, prompt, sampling):
    """P(first LENGTH tokens), every sequence enumerated, each by one full forward."""
    sequences = torch.tensor(list(product(range(VOCAB), repeat=LENGTH)))
    tokens = torch.cat((torch.tensor(prompt).expand(len(sequences), -1), sequences), dim=1)
    h, _ = model.run_layers(model.embed(tokens), 0, model.config.n_layers)
    probs = draw_weights(model.exit_logits(h).double(), sampling)[:, len(prompt) - 1 : -1]
    return probs.gather(-1, sequences.unsqueeze(-1)).squeeze(-1).prod(-1)


def excess(model, sampling, *, E, d, name="self_speculative", prompt=(1, 2, 3)):
    """Pearson's chi-square over the joint, in standard deviations above what is expected.

    Cells expected fewer than 5 times are pooled; a draw that is impossible gives infinity.
    """
    prompt = [*prompt]
    expected = exact_joint(model, prompt, sampling) * ROWS
    generation = start(
        model, [prompt] * ROWS, E, d, name=name, max_new_tokens=LENGTH, sampling=sampling, seed=11
    ).finish()
    tokens = torch.tensor(generation.tokens)
    cells = (tokens * VOCAB ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)
    observed = cells.bincount(minlength=VOCAB**LENGTH).double()
    if observed[expected == 0].any():
        return float("inf")
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
    expected, observed = expected[expected > 0], observed[expected > 0]
    freedom = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    return (chi_square - freedom) / (2 * freedom) ** 0.5


def ignore_lengths(draft_tokens, q, p, generator, lengths):
    return sampling_accept(draft_tokens, q, p, generator)


def test_the_statistic_catches_tokens_accepted_behind_a_drafts_end(biased_model, monkeypatch):
    monkeypatch.setattr(self_speculative, "draft", forged_draft)
    assert excess(biased_model, Sampling(temperature=1.0), E=1, d=2) < 4
    monkeypatch.setattr(self_speculative, "accept", ignore_lengths)
    assert excess(biased_model, Sampling(temperature=1.0), E=1, d=2) > 20


def forged_draft(state, E, d, **options):
    """Draft tokens 3, 3 and claim one of them, with a q that is not what they were drawn from."""
    tokens = torch.full((len(state.batch), d), 3)
    q = torch.full((len(state.batch), d, VOCAB), 1e-6)
    q[:, :1] = torch.nn.functional.one_hot(tokens[:, :1], VOCAB).float()
    return drafting.Draft(tokens, q, torch.full_like(state.batch.pending, min(d, 1)), [], [])


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sampled_tokens_have_the_full_models_distribution(biased_model, sampling, d):
    assert excess(biased_model, sampling, E=1, d=d) < 4


MORE = [
    "self_speculative:stop=0.35",
    "self_speculative:stop_entropy=1.4",
    "self_speculative:ngram=2",
    "self_speculative:ngram=1:stop=0.3",
    "self_speculative:draft_vocab=3:token_counts=COUNTS",
    "self_speculative:draft_vocab=4:token_counts=COUNTS:ngram=1:stop=0.3",
]


def counting(name, path, vocab_size):
    """Return the name with a file of counts, by which frequent ids are spread over all of them."""
    path = path / "token_counts.json"
    path.write_text(json.dumps({"counts": [(i * 29) % 7 for i in range(vocab_size)]}))
    return name.replace("COUNTS", str(path))


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=str)
def test_cheaper_drafts_keep_the_distribution(biased_model, sampling, name, tmp_path):
    name = counting(name, tmp_path, VOCAB)
    assert excess(biased_model, sampling, E=1, d=2, name=name) < 4


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("d", [1, 3, 6])
def test_greedy_tokens_of_cheaper_drafts_are_autoregressive_decodings(
    model, greedy, name, d, tmp_path
):
    name = counting(name.replace("=3:", "=20:").replace("=4:", "=40:"), tmp_path, 61)
    for async_readback in (False, True):
        together = start(model, PROMPTS, 2, d, name=name, async_readback=async_readback).finish()
        assert together.tokens == greedy
    refilled = start(model, PROMPTS, 2, d, name=name, batch_size=2).finish()
    assert refilled.tokens == greedy
    alone = start(model, PROMPTS[:1], 2, d, name=name).finish()
    assert alone.tokens == greedy[:1]
    assert alone.counters.drafted <= d * alone.counters.rounds


def test_a_draft_stops_after_the_token_it_is_not_sure_of(model):
    never = start(model, PROMPTS[:1], 2, 5).finish().counters
    at_once = start(model, PROMPTS[:1], 2, 5, name="self_speculative:stop=1.1").finish().counters
    assert at_once.rounds - 1 <= at_once.drafted <= at_once.rounds
    assert at_once.syncs > 0 == never.syncs
    some = start(model, PROMPTS[:1], 2, 5, name="self_speculative:stop=0.1").finish().counters
    assert at_once.drafted / at_once.rounds < some.drafted / some.rounds <= 5


def rounds_of(generation, row):
    emissions = (emission for round_ in generation for emission in round_)
    own = [(e.accepted, e.drafted, e.tokens) for e in emissions if e.prompt_index == row]
    return own[:8]  # later on, drafts are cut where some row of the batch is nearly full


@pytest.mark.parametrize("name", MORE[:4])
def test_rows_of_a_batch_draft_what_they_would_alone(model, name):
    prompts = [[3, 4, 5], [7, 8, 7, 8, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9]]
    options = {"name": name, "max_new_tokens": 40}
    for row, prompt in enumerate(prompts):
        alone = rounds_of(start(model, [prompt], 2, 4, **options), 0)
        together = rounds_of(start(model, prompts, 2, 4, **options), row)
        assert together == alone


@pytest.mark.parametrize("name", MORE[:4])
def test_reported_work_of_cheaper_drafts_is_what_hooks_count(model, name):
    counted = {"layers": 0, "heads": 0}

    def count(key):
        def hook(module, args, output):
            counted[key] += output.shape[0] * output.shape[1]

        return hook

    hooks = [block.register_forward_hook(count("layers")) for block in model.layers.values()]
    hooks.append(model.norm.register_forward_hook(count("heads")))
    prompts = [[3, 4, 5], [7, 8, 7, 8, 7, 8], [9, 9]]
    counters = start(model, prompts, 2, 4, name=name).finish().counters
    for hook in hooks:
        hook.remove()
    assert counters.token_layers + counters.prompt_token_layers == counted["layers"]
    assert counters.head_evaluations == counted["heads"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("d=0", "d: 0, give at least 1"),
        ("stop=-1:stop_entropy=-1:ngram=-1", "stop: -1.0.*; stop_entropy: -1.0.*; ngram: -1"),
        ("draft_vocab=9", "token_counts: none, draft_vocab needs them, count them with python"),
        ("token_counts=a", "draft_vocab: 0, token_counts are for"),
        ("draft_vocab=-1", "draft_vocab: -1, give a number"),
        ("draft_vocab=9:token_counts=nowhere", "token_counts: there is no nowhere, count them"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        start(model, PROMPTS, name=f"self_speculative:{settings}")


def test_lookups_run_no_layer_to_draft():
    model = build(small(n_layers=4)).eval().requires_grad_(False)
    for l in range(4):  # every token predicts itself: the row repeats, and lookup finds it
        model.layers[str(l)].attention.wo.weight.zero_()
        model.layers[str(l)].feed_forward.w2.weight.zero_()
    model.lm_head.weight.copy_(model.tok_embeddings.weight)
    counters = start(model, [[5, 5, 5]], 1, 4, name="self_speculative:ngram=2").finish().counters
    assert counters.acceptance_rate == 1.0
    assert counters.tokens_per_round == 5.0
    assert counters.token_layers == 4 * 30


def from_three_tokens(weights, generator):
    return sample(weights * torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]), generator)


def unsure_lookups(state, ngram, d):
    lookups = sure_lookups(state, ngram, d)
    if lookups is not None:
        lookups.__dict__["q"] = lookups.q / 4
    return lookups


sure_lookups = self_speculative.lookup_drafts


def greedy_draft(weights, generator):
    return weights.argmax(-1)


def residual_is_p(draft_tokens, q, p, generator, lengths):
    num_accepted, _ = sampling_accept(draft_tokens, q, p, generator, lengths)
    return num_accepted, sample(p[torch.arange(len(p)), num_accepted], generator)


def accept_all(draft_tokens, q, p, generator, lengths):
    d = draft_tokens.shape[1]
    return torch.full((len(p),), d), sample(p[:, d], generator)


sampling_accept = self_speculative.accept


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("sample", greedy_draft),
        ("sample", from_three_tokens),
        ("accept", residual_is_p),
        ("accept", accept_all),
        ("lookup_drafts", unsure_lookups),
    ],
)
def test_the_statistic_catches_a_biased_rule(biased_model, monkeypatch, name, wrong):
    monkeypatch.setattr(drafting if name == "sample" else self_speculative, name, wrong)
    options = {"E": 1, "d": 2}
    if name == "lookup_drafts":  # found in the first round already
        options |= {"name": "self_speculative:ngram=1", "prompt": (4, 3, 4)}
    assert excess(biased_model, Sampling(temperature=1.0), **options) > 20
