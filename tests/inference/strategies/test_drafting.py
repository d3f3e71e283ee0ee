"""Drafts are what the first layers alone decode, and their distributions those drawn from."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from data.shards import TokenStream
from inference.engine.prefill import allocate, prefill
from inference.engine.sampling import Sampling
from inference.frequent_tokens import FrequentTokensOptions, count_tokens, run_count
from inference.strategies.drafting import NgramDrafts, Stop, draft
from inference.strategies.reduced_head import load_reduced_head, most_frequent, reduced_head
from models.llama import NOTHING
from tests.models.test_llama import build, small

PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]
E, D = 2, 4


@pytest.fixture(scope="module")
def model():
    model = build(small(n_layers=4, n_kv_heads=2)).eval().requires_grad_(False)
    model.lm_head.weight.mul_(2)
    return model


def filled(model, **sampling):
    state = allocate(model, 4, slots=30, sampling=Sampling(**sampling), seed=0)
    prefill(state, PROMPTS, (4, NOTHING))
    return state


def by_hand(model, prompt):
    """Return D tokens of the first E layers, and how sure each was."""
    tokens, sure = list(prompt), []
    for _ in range(D):
        h, _ = model.run_layers(model.embed(torch.tensor([tokens])), 0, E)
        probs = model.exit_logits(h[0, -1]).softmax(-1)
        tokens.append(int(probs.argmax()))
        sure.append(float(probs.max()))
    return tokens[len(prompt) :], sure


def test_a_row_stops_after_its_own_first_token_that_is_not_confident(model):
    expected = [by_hand(model, prompt) for prompt in PROMPTS]
    stop = sorted(sure for _, row in expected for sure in row)[8] - 1e-6
    drafted = draft(filled(model), E, D, stop=Stop(stop))
    lengths = []
    for row, (tokens, sure) in enumerate(expected):
        unsure = [i for i in range(D) if sure[i] < stop]
        lengths.append(min(unsure[0] + 1 if unsure else D, D))
        assert drafted.tokens[row, : lengths[-1]].tolist() == tokens[: lengths[-1]]
    assert drafted.lengths.tolist() == lengths
    assert drafted.tokens.shape[1] == max(lengths)
    assert len(set(lengths)) > 1, "rows were to stop apart"


def test_a_draft_as_confident_as_the_threshold_goes_on():
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, -torch.inf]]])  # 1/2 each; one alone
    assert Stop(probability=0.5).is_confident(logits).tolist() == [True, True]
    assert Stop(probability=1.0).is_confident(logits).tolist() == [False, True]
    assert Stop(entropy=0.0).is_confident(logits).tolist() == [False, True]


def test_tokens_drafted_with_layers_beside_lookups_are_drawn_from_their_own_distribution(model):
    tokens = torch.arange(4 * D).view(4, D) + 20
    found = torch.tensor([False, True, False, True])
    lookups = NgramDrafts(tokens, found, 61, greedy=False)
    q = draft(filled(model, temperature=0.7), E, 1, lookups=lookups).q
    for row in (0, 2):
        h, _ = model.run_layers(model.embed(torch.tensor([PROMPTS[row]])), 0, E)
        expected = (model.exit_logits(h[0, -1]) / 0.7).softmax(-1)
        torch.testing.assert_close(q[row, 0], expected, atol=1e-6, rtol=0)


def test_the_loop_ends_when_every_row_that_counts_has_stopped(model):
    state = filled(model)
    state.batch.finished[2] = True
    drafted = draft(state, E, D, stop=Stop(1.1))
    assert drafted.lengths.tolist() == [1, 1, 0, 1]
    assert state.counters.syncs == 1
    assert state.counters.token_layers == 4 * 7 * 4 + 4 * E, (
        "the prompts, and one token of each row"
    )


class LookupsGoOn:
    """Would let the rows with a lookup, and them alone, go on."""

    never = False

    def is_confident(self, logits):
        return torch.tensor([False, True, False, True])


@pytest.mark.parametrize("stop", [Stop(), LookupsGoOn()], ids=["never", "at once"])
def test_rows_with_a_lookup_draft_it_beside_rows_that_draft_with_layers(model, stop):
    tokens = torch.arange(4 * D).view(4, D) + 20
    found = torch.tensor([False, True, False, True])
    lookups = NgramDrafts(tokens, found, 61, greedy=True)
    state = filled(model)
    drafted = draft(state, E, D, stop=stop, lookups=lookups)
    assert drafted.q is None
    ran = D if stop.never else 1
    assert drafted.tokens.shape == (4, D)
    assert len(drafted.exits) == ran
    if stop.never:
        assert drafted.lengths is None
    else:
        assert drafted.lengths.tolist() == [1, D, 1, D]
    for row, prompt in enumerate(PROMPTS):
        own = tokens[row] if found[row] else torch.tensor(by_hand(model, prompt)[0])
        count = D if found[row] else ran
        assert torch.equal(drafted.tokens[row, :count], own[:count])
        seen = torch.cat((torch.tensor(prompt), own))[None, : len(prompt) + ran - 1]
        x_E, _ = model.run_layers(model.embed(seen), 0, E)
        kept = torch.cat(drafted.exits, dim=1)[row]
        torch.testing.assert_close(kept, x_E[0, -ran:], atol=1e-5, rtol=0)


def test_lookups_alone_count_in_the_rows_that_have_one():
    tokens, found = torch.arange(6).view(2, 3), torch.tensor([True, False])
    drafted = NgramDrafts(tokens, found, 61, greedy=True).as_draft()
    assert drafted.lengths.tolist() == [3, 0]
    assert not drafted.exits


def test_part_of_the_head_draws_from_its_tokens_as_the_head_would_if_there_were_no_others(model):
    tokens = torch.tensor([60, 3, 17, 0, 44])
    state = filled(model, temperature=0.7)
    before = state.counters.head_evaluations
    drafted = draft(state, E, 1, head=reduced_head(model, tokens))
    assert state.counters.head_evaluations - before == pytest.approx(4 * 5 / 61)
    for row, prompt in enumerate(PROMPTS):
        h, _ = model.run_layers(model.embed(torch.tensor([prompt])), 0, E)
        logits = model.exit_logits(h[0, -1])
        others = torch.ones(61, dtype=torch.bool)
        others[tokens] = False
        expected = (logits.masked_fill(others, -torch.inf) / 0.7).softmax(-1)
        torch.testing.assert_close(drafted.q[row, 0], expected, atol=1e-6, rtol=0)
        assert drafted.tokens[row, 0] in tokens


def test_tokens_are_counted_and_the_most_frequent_found():
    draw = np.random.default_rng(0)
    shards = [draw.zipf(1.5, size=n) % 61 for n in (1000, 1, 700)]
    counts = count_tokens(TokenStream(shards), 61, most=10_000)
    expected = Counter(np.concatenate(shards).tolist())
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == expected
    assert expected.most_common(1)[0][0] == most_frequent(counts, 1)[0]
    assert most_frequent(np.array([1, 5, 0, 5, 7]), 4).tolist() == [4, 1, 3, 0]
    assert count_tokens(TokenStream(shards), 61, most=100).sum() == 100


def test_the_command_counts_what_drafts_then_read(run_folder, tmp_path, capsys):
    copy = tmp_path / "counts.json"
    run_count(FrequentTokensOptions(run=run_folder, device="cpu", json=copy))
    assert "the 256 most frequent tokens of" in capsys.readouterr().out
    [path] = run_folder.glob("checkpoints/*.decode/token_counts.json")
    assert path.read_text() == copy.read_text()
    counts = json.loads(path.read_text())["counts"]
    model = build(small(vocab_size=len(counts)))
    head = load_reduced_head(model, path, 10)
    assert (
        sorted((counts[i] for i in head.tokens.tolist()), reverse=True) == sorted(counts)[:-11:-1]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "token_counts: .* is damaged"),
        ('{"counts": "abc"}', "token_counts: .* is damaged"),
        ('{"counts": [1, 2]}', "counts 2 tokens and the model has 61"),
        (json.dumps({"counts": [1] * 61}), "draft_vocab: 62, give at most this model's 61"),
    ],
)
def test_counts_that_do_not_fit_are_refused(model, tmp_path, content, message):
    (tmp_path / "counts.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_reduced_head(model, tmp_path / "counts.json", 62)
