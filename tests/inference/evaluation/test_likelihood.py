"""A continuation read by the full model, against one forward pass for each token."""

import pytest
import torch

from inference.evaluation.likelihood import read_continuation
from tests.inference.every_strategy import make_model


def test_a_continuation_is_read_token_by_token():
    model = make_model(4)
    prompt, tokens = [3, 4, 5], [7, 8, 9, 10]
    likelihood, chosen, row = 0.0, 0, list(prompt)
    for token in tokens:
        h, _ = model.run_layers(model.embed(torch.tensor([row])), 0, 4)
        log_probs = model.exit_logits(h[0, -1]).log_softmax(-1)
        likelihood += log_probs[token].item()
        chosen += int(log_probs.argmax()) == token
        row.append(token)
    found = read_continuation(model, prompt, tokens)
    assert found == (pytest.approx(likelihood, abs=1e-4), chosen)
