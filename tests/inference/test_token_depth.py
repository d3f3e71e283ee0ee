"""A model trained with a mask of layers sees what the decoding strategy computes with its cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from inference.engine.prefill import allocate, prefill
from inference.engine.sampling import Sampling
from inference.strategies.row_exits import decode_until_sure
from inference.strategies.skipdecode import SkipDecode
from inference.strategies.unified import Unified
from models.llama import NOTHING
from models.token_depth import TokenDepthConfig, draw_exits, token_layers
from tests.inference.every_strategy import PROMPTS, make_model

L = 6
RESPONSE = torch.randint(61, (9,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def model():
    return make_model(L)


@torch.inference_mode()
def decoded_logits(model, prompt, start, prefill_layers):
    """Return the logits of decoding at each token of RESPONSE, which is forced."""
    state = allocate(model, 1, slots=40, sampling=Sampling(), seed=0)
    for buffer in state.cache.keys + state.cache.values:
        buffer.fill_(torch.nan)  # whatever reads a slot that nobody wrote becomes NaN
    prefill(state, [prompt], prefill_layers)
    decoder, read = start(state), []
    hook = model.norm.register_forward_hook(lambda module, inputs, out: read.append(out[0, 0]))
    for token in RESPONSE:
        result = decoder(len(RESPONSE))
        state.batch.advance(replace(result, tokens=torch.tensor([[token]])))
    hook.remove()
    assert len(read) == len(RESPONSE)
    return F.linear(torch.stack(read), model.head_weight)


def trained_logits(model, prompt, config, exits=None):
    """Return the logits of the training forward there: a row of prompt and response."""
    row = torch.tensor([[*prompt, *RESPONSE]])
    learnt = torch.arange(row.shape[1] - 1)[None] >= len(prompt) - 1
    layers = token_layers(config, L, learnt, None, exits)
    hidden = model(row[:, :-1], exit_layers=[L - 1], token_layers=layers).exits[L - 1]
    return F.linear(hidden[0, len(prompt) - 1 :], model.head_weight)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize(
    ("strategy", "config"),
    [
        (Unified(speedup=2.0), TokenDepthConfig(kind="unified", speedup=2.0)),
        (Unified(speedup=1.5), TokenDepthConfig(kind="unified", speedup=1.5)),
        (SkipDecode(length=4), TokenDepthConfig(kind="skipdecode", length=4)),
        (
            SkipDecode(warmup=2, max_layers=5, min_layers=3, length=7),
            TokenDepthConfig(kind="skipdecode", warmup=2, max_layers=5, min_layers=3, length=7),
        ),
    ],
    ids=["unified", "unified 1.5", "skipdecode", "skipdecode 5 to 3"],
)
def test_training_computes_what_decoding_does(model, prompt, strategy, config):
    strategy = strategy.with_defaults(L)
    decoded = decoded_logits(model, prompt, strategy.start, strategy.prefill_layers(L))
    trained = trained_logits(model, prompt, config)
    torch.testing.assert_close(trained, decoded, atol=1e-5, rtol=1e-5)
    plain = trained_logits(model, prompt, TokenDepthConfig())
    assert (plain - decoded).abs().max() > 0.1, "the rule was to change something"


def test_mixed_training_computes_what_projecting_an_early_exit_does(model):
    config, prompt = TokenDepthConfig(kind="mixed"), [7]  # one token: nothing but new ones
    exits = draw_exits(config, L, seed=1, t=0, samples=np.array([3]), seq_len=len(RESPONSE))
    assert len(set(exits[0])) > 3

    def start(state):
        def exiting(exit_):
            return torch.tensor([exits[0, int(state.batch.positions)] == exit_.E])

        return decode_until_sure(state, range(1, L), lambda: exiting)

    decoded = decoded_logits(model, prompt, start, (L, NOTHING))
    trained = trained_logits(model, prompt, config, torch.from_numpy(exits))
    torch.testing.assert_close(trained, decoded, atol=1e-5, rtol=1e-5)
