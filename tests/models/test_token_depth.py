"""Tokens run the layers that rules worked by hand give them, as a slow form computes them."""

import numpy as np
import pytest
import torch

from models.attention_mask import document_mask
from models.layer_dropout import draw_kept_rows, uniform
from models.layer_masks import LayerMasks
from models.token_depth import (
    TokenDepthConfig,
    TokenLayers,
    draw_exits,
    new_tokens,
    token_layers,
)
from tests.models.families import ALL, build_random, shape
from tests.models.test_llama import build, small
from tests.models.token_by_token import token_by_token

L = 6
# A prompt of three tokens and two new ones; a text that is learnt from its first token on, after
# the end of a prompt that no response follows; padding, each token a text of its own.
LEARNT = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]]).bool()
DOCUMENTS = torch.tensor([[1, 1, 1, 1, 1, 1, 2, 3], [0, 0, 0, 1, 1, 1, 1, 1]])


def test_new_tokens_are_counted_from_the_end_of_each_texts_prompt():
    # The token before the first new one is pending when decoding begins: n = -1.
    assert new_tokens(LEARNT, None).tolist() == [
        [-3, -2, -1, 0, 1, 2, 3, 4],
        [-4, -3, -2, -1, 0, 1, 2, 3],
    ]
    n = new_tokens(LEARNT, DOCUMENTS)
    assert n[0, :6].tolist() == [-3, -2, -1, 0, 1, 2]
    assert n[1, 3:].tolist() == [-1, 0, 1, 2, 3]
    assert n[0, 6:].max() < -1, "a text without a loss is all prompt"
    assert n[1, :3].max() < -1
    assert new_tokens(torch.ones(1, 4).bool(), None).tolist() == [[-1, 0, 1, 2]]
    every = torch.arange(1, 5)[None]  # as many documents as tokens
    assert new_tokens(torch.ones(1, 4).bool(), every).tolist() == [[-1] * 4]


def layers_of(layers, row=0):
    """Return the layers l that each token of a row runs."""
    seq = LEARNT.shape[1]
    runs = [torch.ones(2, seq).bool() if each is None else each for each in layers.runs]
    return [[l for l in range(L) if runs[l][row, i]] for i in range(seq)]


def test_unified_runs_all_layers_for_prompts_and_the_kept_ones_for_new_tokens():
    config = TokenDepthConfig(kind="unified", speedup=2.0)
    layers = token_layers(config, L, LEARNT, None, None)
    whole = list(range(L))
    assert layers_of(layers) == [whole] * 3 + [[0, 2, 5]] * 5
    assert layers.runs[0] is None
    masked = token_layers(config, L, LEARNT, DOCUMENTS, None)
    assert layers_of(masked) == [whole] * 3 + [[0, 2, 5]] * 3 + [whole] * 2
    assert layers_of(masked, 1) == [whole] * 4 + [[0, 2, 5]] * 4


def test_skipdecodes_budget_falls_with_new_tokens():
    config = TokenDepthConfig(kind="skipdecode", max_layers=5, min_layers=2, length=3)
    layers = layers_of(token_layers(config, L, LEARNT, None, None))
    most = [0, 2, 3, 4, 5]
    assert layers == [most] * 4 + [[0, 3, 4, 5], [0, 4, 5], [0, 5], [0, 5]]
    for earlier, later in zip(layers, layers[1:], strict=False):
        assert set(later) <= set(earlier)


def test_mixed_draws_each_tokens_exit_from_seed_step_sample_and_position_alone():
    config = TokenDepthConfig(kind="mixed")
    fields = dict(seed=3, t=5, seq_len=50)
    whole = draw_exits(config, L, samples=np.arange(100), **fields)
    assert whole.shape == (100, 50)
    counts = np.bincount(whole.ravel(), minlength=L + 1)
    assert counts[0] == 0
    assert ((counts[1:] - 5000 / L) ** 2 / (5000 / L)).sum() < 20.5  # chi-square, 5 degrees, 0.001
    alone = draw_exits(config, L, samples=np.array([7]), **fields)
    assert np.array_equal(alone[0], whole[7])
    for other in ({"seed": 4}, {"t": 6}):
        changed = draw_exits(config, L, samples=np.arange(100), **(fields | other))
        assert np.mean(changed == whole) == pytest.approx(1 / L, abs=0.03)
    rows = np.mean(whole[0] == whole[1:], axis=1)
    assert rows.max() < 0.6, "rows were to draw alike"
    drops = uniform(3, 5, 50, np.arange(100)).T  # layer dropout, if it had as many layers
    assert abs(np.corrcoef(drops.ravel(), whole.ravel())[0, 1]) < 0.05
    listed = draw_exits(TokenDepthConfig(kind="mixed", exits=(2, 6)), L, samples=np.arange(9), **fields)  # fmt: skip  # noqa: E501
    assert set(listed.ravel()) == {2, 6}
    runs = token_layers(config, L, LEARNT, None, torch.tensor([[1] * 8, [4] * 8]))
    assert layers_of(runs) == [[0]] * 8
    assert layers_of(runs, 1) == [[0, 1, 2, 3]] * 8
    assert token_layers(config, L, LEARNT, None, None) is None
    assert token_layers(TokenDepthConfig(), L, LEARNT, None, None) is None


CONFIGS = [
    TokenDepthConfig(kind="unified", speedup=3.0),
    TokenDepthConfig(kind="skipdecode", max_layers=5, min_layers=2, length=3),
    TokenDepthConfig(kind="mixed"),
]


def make_layers(config, documents):
    drawn = draw_exits(config, L, seed=0, t=0, samples=np.arange(2), seq_len=8)
    return token_layers(config, L, LEARNT, documents, torch.from_numpy(drawn))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
@pytest.mark.parametrize(
    ("documents", "changes"),
    [(None, {}), (DOCUMENTS, {}), (None, ALL)],
    ids=["one text", "documents", "no Llama"],
)
def test_states_and_gradients_equal_the_slow_form(config, documents, changes):
    model = build_random(shape(n_layers=L, **changes))
    tokens = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(0))
    layers = make_layers(config, documents)
    window = model.config.sliding_window
    mask = None if documents is None else document_mask(documents, window)
    masks, h = LayerMasks(documents=mask, token_layers=layers), model.embed(tokens)
    _, states = model.run_layers(h, 0, L, masks=masks, exit_layers=range(L))
    fast = torch.stack([states[l] for l in range(L)])
    slow = []
    for row in range(2):
        runs = layers_of(layers, row)
        outputs = token_by_token(
            model,
            tokens[row],
            lambda l, states, runs=runs: [float(l in each) for each in runs],
            None if documents is None else documents[row].tolist(),
        )
        slow.append(torch.stack([torch.stack(states) for states in outputs]))
    slow = torch.stack(slow, dim=1)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    scale = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for states in (fast, slow):
        model.zero_grad()
        (states * scale).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[1].items():  # sums of 16 tokens in another order
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_every_block_is_called_and_stochastic_depth_composes():
    model = build(small(n_layers=L))
    calls = []
    for block in model.layers.values():
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.arange(16).view(2, 8)
    none = LayerMasks(token_layers=TokenLayers((torch.zeros(2, 8).bool(),) * L))
    h = model.embed(tokens)
    assert torch.equal(model.run_layers(h, 0, L, masks=none)[0], h)
    assert len(calls) == L
    kept = draw_kept_rows(
        [0.5] * L, seed=4, t=0, keys=np.arange(2), scale_kept=False, device=h.device
    )
    layers = make_layers(CONFIGS[1], None)
    masks = LayerMasks(kept_rows=kept, token_layers=layers)
    together, _ = model.run_layers(h, 0, L, masks=masks)
    expected = h
    for l in range(L):
        out, _ = model.run_layers(expected, l, l + 1, masks=LayerMasks(kept_rows=kept))
        runs = layers.runs[l]
        expected = out if runs is None else torch.where(runs[:, :, None], out, expected)
    assert torch.equal(together, expected)


def test_what_does_not_fit_the_model_is_refused():
    for config, message in (
        (TokenDepthConfig(kind="unified", speedup=0.5), "token_depth.speedup: 0.5, unified needs"),
        (
            TokenDepthConfig(kind="unified", speedup=8.0),
            "token_depth.speedup: 8.0, unified keeps 2 of this model's 6 layers at least, give at "
            "most 3",
        ),
        (
            TokenDepthConfig(kind="skipdecode", max_layers=7),
            "token_depth.max_layers: 7, skipdecode",
        ),  # noqa: E501
        (TokenDepthConfig(kind="mixed", exits=(0, 3)), "token_depth.exits: (0, 3), mixed needs 1"),
    ):
        [problem] = config.problems(L)
        assert problem.startswith(message)
    for config in CONFIGS:
        assert config.problems(L) == []
