"""Ids that the model has and its tokenizer has not are never predicted, drafted or written."""

import sys

import pytest
import torch

import inference
from inference import evaluate, frequent_tokens
from inference.engine.sampling import Sampling
from inference.loading.adapters import decode_folder
from inference.loading.run import load_run
from inference.loading.vocabulary import mask_missing, missing_ids
from inference.strategies.reduced_head import load_reduced_head
from inference.strategies.registry import describe, parse_strategy
from tests.inference.engine.test_generation import ALL
from tests.inference.every_strategy import PROMPTS, decode, make_model

IDS = {*range(0, 26), 30}  # ends early, and with a gap
HOT = Sampling(temperature=2.0, top_k=40)  # more than there are


@pytest.fixture(scope="module")
def model():
    model = make_model(n_layers=4, vocab_size=64)
    model.lm_head.weight.data[26:30].mul_(3)
    mask_missing(model, IDS)
    return model


@pytest.mark.parametrize("strategy", ALL, ids=describe)
def test_no_strategy_writes_an_id_without_a_piece(model, strategy):
    for sampling in (Sampling(), HOT):
        found = decode(model, PROMPTS, strategy, batch_size=3, sampling=sampling).tokens
        assert {token for row in found for token in row} <= IDS


def test_without_the_mask_such_ids_are_written():
    model = make_model(n_layers=4, vocab_size=64)
    model.lm_head.weight.data[26:30].mul_(3)
    for sampling in (Sampling(), HOT):
        found = decode(model, PROMPTS, ALL[0], sampling=sampling).tokens
        assert not {token for row in found for token in row} <= IDS


def test_greedy_drafts_stay_lossless_over_the_ids_that_exist(model):
    plain = decode(model, PROMPTS, ALL[0]).tokens
    for text in ("self_speculative:E=2:d=3", "self_speculative:E=1:d=4:ngram=1", "dynamic:d=3"):
        assert decode(model, PROMPTS, parse_strategy(text)).tokens == plain


def test_the_distribution_is_that_of_the_ids_that_exist(model):
    h = torch.randn(3, model.config.dim, generator=torch.Generator().manual_seed(0))
    bare = h.mul(1.0) @ model.lm_head.weight.T
    ids = torch.tensor(sorted(IDS))
    wanted = torch.zeros_like(bare)
    wanted[:, ids] = bare[:, ids].softmax(-1)
    torch.testing.assert_close(model.head(h).softmax(-1), wanted, atol=1e-7, rtol=1e-5)


def test_equal_vocabularies_leave_the_head_as_it_is(run_folder):
    assert "head" not in vars(load_run(run_folder).model)


def test_a_padded_run_decodes_is_measured_and_counted(padded_run, monkeypatch, capsys, tmp_path):
    model = inference.load(padded_run)
    size = model.run.tokenizer.vocab_size
    assert missing_ids(model.run.model) == list(range(size, size + 30))
    for strategy in ("autoregressive", "self_speculative:E=2:d=4"):
        found = model.generate(
            ["the cat"], strategy=strategy, num_samples=4, temperature=3.0, max_new_tokens=40
        )
        assert all(token < size for each in found for token in each.tokens)
    for command, words in ((evaluate, ["--max_tokens", "96"]), (frequent_tokens, [])):
        monkeypatch.setattr(sys, "argv", ["x", "--run", str(padded_run), *words])
        command.main()
    counts = decode_folder(model.run.checkpoint) / "token_counts.json"
    printed = capsys.readouterr().out
    assert "nan" not in printed
    assert str(counts) in printed, printed
    head = load_reduced_head(model.run.model, counts, size + 30)
    assert sorted(head.tokens.tolist()) == list(range(size))
