"""Where tokens come from, against what a strategy's parts were called for."""

import pytest
import torch

from inference.evaluation.exit_traces import record_exits, record_predictions
from inference.loading.run import load_run
from inference.report_page.origins import decode_with_origins
from inference.strategies import self_speculative
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.dynamic import Dynamic
from inference.strategies.self_speculative import SelfSpeculative


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder, device="cpu")


@pytest.fixture(scope="module")
def prompt(run):
    return [run.tokenizer.bos_id, *run.tokenizer.encode("the cat sat on a mat the cat sat")]


@pytest.mark.parametrize("ngram", [0, 2])
def test_lookups_are_the_rounds_in_which_no_layers_draft(ngram, run, prompt, monkeypatch):
    drafted, draft = [], self_speculative.draft
    accept = self_speculative.accept_round

    def spy(*args, **options):
        drafted.append(True)
        return draft(*args, **options)

    ends = []

    def count(*args):
        ends.append(len(drafted))
        return accept(*args)

    monkeypatch.setattr(self_speculative, "draft", spy)
    monkeypatch.setattr(self_speculative, "accept_round", count)
    text = decode_with_origins(run, prompt, SelfSpeculative(E=2, d=3, ngram=ngram), 40)
    by_layers = [a != b for a, b in zip([0, *ends], ends, strict=False)]
    accepted = [token for token in text.tokens if token.origin in ("drafted", "lookup")]
    assert len(accepted) == text.accepted
    for token in accepted:
        assert token.origin == ("drafted" if by_layers[token.round - 1] else "lookup")
        assert token.layers == (2 if token.origin == "drafted" else 0)
    assert {t.origin for t in text.tokens} >= ({"drafted", "lookup"} if ngram else {"corrected"})


@pytest.mark.parametrize("strategy", [Autoregressive(), Dynamic(d=3), SelfSpeculative(E=1, d=2)])
def test_tokens_texts_and_probabilities_are_the_models_own(strategy, run, prompt):
    text = decode_with_origins(run, prompt, strategy, 30)
    plain = decode_with_origins(run, prompt, Autoregressive(), 30)
    assert [t.token for t in text.tokens] == [t.token for t in plain.tokens]
    assert "".join(t.text for t in text.tokens) == "".join(t.text for t in plain.tokens)
    assert all(t.origin == "plain" and t.layers == 4 for t in plain.tokens)
    row = prompt + [t.token for t in text.tokens]
    logits = [step.log_softmax(-1) for step in _last_logits(run, row, len(prompt))]
    for token, log_probs in zip(text.tokens, logits, strict=True):
        assert token.probability == pytest.approx(log_probs[token.token].exp().item(), rel=1e-4)


def _last_logits(run, row, first):
    model = run.model
    with torch.inference_mode():
        h, _ = model.run_layers(model.embed(torch.tensor([row])), 0, model.config.n_layers)
        return model.exit_logits(h[0, first - 1 : -1], model.config.n_layers).float()


def test_predictions_are_those_of_the_exits_and_settle_where_they_stay(run, prompt):
    row = prompt + [t.token for t in decode_with_origins(run, prompt, Autoregressive(), 20).tokens]
    found = record_predictions(run.model, row, len(prompt))
    assert found.choices.equal(record_exits(run.model, row, len(prompt)))
    for i, settled in enumerate(found.settled()):
        same = [bool(row[i] == found.choices[-1, i]) for row in found.choices]
        slow = max((E for E in range(1, 5) if not same[E - 1]), default=0) + 1
        assert settled == slow
    assert found.entropy.min() >= 0
    assert (found.likelihood <= found.confidence + 1e-6).all()
