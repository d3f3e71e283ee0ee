"""Routers run the tokens of p > 0.5 and learn by the straight-through gradient, as the slow form.

A token that skips still has keys and values; those beyond the capacity are the least probable.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from models.attention_mask import attend, document_mask, query_mask
from models.config import config_from_dict
from models.conversion.hugging_face import hugging_face_config
from models.conversion.pruning import prune
from models.layer_dropout import draw_kept_rows
from models.layer_masks import LayerMasks
from models.llama import Llama
from models.router import RouterConfig, Routing, most_probable, route
from tests.models.families import ALL, build_random, shape
from tests.models.test_llama import build, small
from tests.models.token_by_token import token_by_token

L, SEQ = 4, 9
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [1] * SEQ])


def scramble(model, write=torch.Tensor.copy_, seed=0, names=("routers",)):
    """Give routers weights under which tokens disagree."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if name.startswith(names):
            generator = torch.Generator().manual_seed(100 * seed + i)
            full = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                write(parameter, full if parameter.ndim == 1 else full * 4 / full.shape[-1] ** 0.5)


def make_model(router="linear", **changes):
    model = build_random(shape(n_layers=L, router=router, **changes))
    scramble(model)
    return model


def tokens_of(rows=2):
    return torch.randint(61, (rows, SEQ), generator=torch.Generator().manual_seed(0))


def probability(model, l, h):
    """Return p of one token, h: (dim,)."""
    router = model.routers[str(l)]
    x = h / (h.square().mean() + model.config.norm_eps).sqrt()
    if model.config.router == "mlp":
        x = router.hidden.weight @ x
        x = x * x.sigmoid()
    return 1 / (1 + (-(router.out.weight[0] @ x + router.out.bias[0])).exp())


def straight_through(model, l, states, capacity):
    """Return p and w = [p > 0.5] + p - p.detach() of a row's tokens; 0 where there is no room."""
    p = [probability(model, l, h) for h in states]
    room = math.ceil(capacity * len(p))
    admitted = sorted(range(len(p)), key=lambda i: (-p[i].item(), i))[:room]
    w = [float(each > 0.5) + each - each.detach() for each in p]
    return p, [each if i in admitted else 0.0 for i, each in enumerate(w)]


def run(model, tokens, capacity, documents, kept_rows=None):
    """Return {l: x_{l+1}} and {l: p} of one training pass."""
    routing = Routing(capacity)
    window = model.config.sliding_window
    documents = None if documents is None else document_mask(documents, window)
    masks = LayerMasks(kept_rows=kept_rows, documents=documents, routing=routing)
    h = model.embed(tokens)
    _, states = model.run_layers(h, 0, L, masks=masks, exit_layers=range(L))
    return states, routing.gates


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize(
    ("documents", "changes"),
    [(None, {}), (DOCUMENTS, {}), (DOCUMENTS, ALL)],
    ids=["one text", "documents", "no Llama"],
)
@pytest.mark.parametrize("capacity", [1.0, 0.5])
def test_states_and_gradients_equal_the_slow_form(router, documents, capacity, changes):
    model, tokens = make_model(router, **changes), tokens_of()
    states, gates = run(model, tokens, capacity, documents)
    fast = torch.stack([states[l] for l in range(L)])
    assert list(gates) == list(range(L))
    running = torch.stack([gates[l] > 0.5 for l in range(L)]).float().mean()
    assert 0.3 < running < 0.8, "routers were to disagree"
    slow = []
    for row in range(2):
        outputs = token_by_token(
            model,
            tokens[row],
            lambda l, states: straight_through(model, l, states, capacity)[1],
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
    assert gradients[1]["routers.2.out.weight"].abs().max() > 0
    for name, gradient in gradients[1].items():  # sums of 18 tokens in another order
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_the_gradient_is_that_of_the_formula():
    g = torch.Generator().manual_seed(0)
    h, f, upstream = (torch.randn(2, 3, 5, generator=g, dtype=torch.float64) for _ in range(3))
    p = torch.tensor([[0.9, 0.2, 0.51], [0.5, 0.49, 0.7]], dtype=torch.float64)
    found = []
    for form in ("ours", "formula"):
        leaves = [each.clone().requires_grad_() for each in (h, f, p)]
        x, branch, gate = leaves
        if form == "ours":
            out = route(x, x + branch, gate)
        else:
            w = (gate > 0.5).double() + gate - gate.detach()
            out = x + w[..., None] * branch
        out.backward(upstream)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, formula in zip(*found, strict=True):
        torch.testing.assert_close(ours, formula)
    assert torch.equal(found[0][0][1, 0], h[1, 0]), "p = 0.5 does not run"
    torch.testing.assert_close(found[0][3], (upstream * f).sum(-1))


def test_room_goes_to_the_most_probable():
    p = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2], [0.5, 0.5, 0.5, 0.5, 0.6]])
    assert most_probable(p, 0.4).tolist() == [[1, 3], [0, 4]]
    assert most_probable(p, 0.41).tolist() == [[1, 2, 3], [0, 1, 4]]
    assert most_probable(p, 1e-3).tolist() == [[1], [4]]
    assert most_probable(torch.rand(1, 100), 0.07).shape == (1, 7), "0.07 * 100 > 7"
    assert RouterConfig(capacity=1.0).problems() == []
    for capacity in (0.0, 1.5):
        [problem] = RouterConfig(capacity=capacity).problems()
        assert problem == f"router.capacity: {capacity}, must lie in (0, 1]"


def test_queries_and_feed_forward_of_the_others_are_not_computed():
    model, seen = make_model(), {}
    block = model.block(1)
    for name in ("attention.wq", "attention.wk", "attention.wo", "feed_forward.w1"):
        block.get_submodule(name).register_forward_hook(
            lambda _, inputs, out, name=name: seen.update({name: out.shape[:2].numel()})
        )
    model(tokens_of(), exit_layers=[L - 1], capacity=0.3)
    assert seen == {
        "attention.wq": 6, "attention.wk": 18, "attention.wo": 6, "feed_forward.w1": 6
    }  # fmt: skip


@pytest.mark.parametrize(("capacity", "changes"), [(1.0, ALL), (0.5, {})])
def test_stochastic_depth_composes_and_dropped_rows_cost_nothing(capacity, changes):
    model, tokens = make_model(**changes), tokens_of(6)
    kept = draw_kept_rows(
        [0.5] * L, seed=1, t=0, keys=np.arange(6), scale_kept=True, device=tokens.device
    )
    counts = [6 if choice.rows is None else len(choice.rows) for choice in kept.choices]
    assert 0 < min(counts) < 6
    seen = []
    for block in model.layers.values():
        block.feed_forward.register_forward_hook(lambda _, i, out: seen.append(out[..., 0].numel()))
    documents = DOCUMENTS[[0, 1, 0, 1, 0, 1]]
    states, gates = run(model, tokens, capacity, documents, kept)
    assert seen == [count * math.ceil(capacity * SEQ) for count in counts]
    assert all(p.shape == (6, SEQ) for p in gates.values()), "of dropped rows too"
    for row in range(6):

        def weights(l, states, row=row):
            choice = kept.at(l)
            dropped = choice.rows is not None and row not in choice.rows.tolist()
            scale = 0.0 if dropped else choice.scale
            return [scale * w for w in straight_through(model, l, states, capacity)[1]]

        outputs = token_by_token(model, tokens[row], weights, documents[row].tolist())
        for l in range(L):
            torch.testing.assert_close(
                states[l][row], torch.stack(outputs[l]), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one text", "documents"])
def test_blocks_of_some_queries_are_their_mask(documents):
    g = torch.Generator().manual_seed(0)
    positions = torch.tensor([[0, 4, 5, 8], [1, 2, 3, 7]])
    q = torch.randn(2, 4, 4, 16, generator=g)
    k, v = (torch.randn(2, 2, SEQ, 16, generator=g) for _ in range(2))
    dense, blocks = (query_mask(positions, SEQ, documents, blocks=each) for each in (False, True))
    found = attend(q, k, v, blocks.mask, grouped=True)
    torch.testing.assert_close(found, attend(q, k, v, dense.mask, grouped=True))
    rows = torch.tensor([1])
    mask, _, own = blocks.arguments(rows)
    assert own.tolist() == positions[1:].tolist()
    torch.testing.assert_close(attend(q[1:], k[1:], v[1:], mask, grouped=True), found[1:])


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_at_first_every_token_runs_every_layer_and_other_weights_are_the_plain_models(router):
    plain, routed = (build(small(router=kind), seed=4) for kind in ("none", router))
    state = routed.state_dict()
    assert not [name for name in plain.state_dict() if name.startswith("routers")]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name])
    ours = routed(tokens_of(), exit_layers=[2])
    assert torch.equal(ours.exits[2], plain(tokens_of(), exit_layers=[2]).exits[2])
    torch.testing.assert_close(ours.gates[1], torch.full((2, SEQ), 0.7310586))
    assert plain(tokens_of(), exit_layers=[2]).gates == {}


def test_pruning_keeps_the_routers_of_the_layers_kept():
    model = make_model("mlp")
    config, state = prune(model.config, model.state_dict(), [0, 2])
    small = Llama(config)
    small.load_state_dict(state)
    for new, l in ((0, 0), (1, 2)):
        for ours, theirs in zip(
            small.routers[str(new)].parameters(), model.routers[str(l)].parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_a_shape_written_before_there_were_routers_is_read():
    for router in ("none", "mlp"):
        config = small(router=router)
        fields = json.loads(json.dumps(dataclasses.asdict(config)))
        assert config_from_dict(fields) == config
    fields = json.loads(json.dumps(dataclasses.asdict(small())))
    del fields["router"]
    assert config_from_dict(fields) == small()


def test_hugging_face_has_no_place_for_routers():
    config = make_model().config
    with pytest.raises(ValueError, match=r"^router: a Hugging Face Llama cannot hold linear"):
        hugging_face_config(config)
    assert hugging_face_config(dataclasses.replace(config, router="none"))["hidden_size"] == 32
