"""Shared by the tests of all strategies: a model whose layers disagree, prompts, a slow form."""

import torch

from inference.engine.generation import Generation
from models.llama import NOTHING
from tests.models.test_llama import build, small

PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]


def make_model(n_layers=6, **changes):
    model = build(small(n_layers=n_layers, n_kv_heads=2, **changes), seed=2)
    for name, weight in model.named_parameters():
        if name.endswith(("wo.weight", "w2.weight")):
            weight.data.mul_(2)
    return model.eval().requires_grad_(False)


def decode(model, prompts, strategy, **options):
    return Generation(model, prompts, strategy, **({"max_new_tokens": 20} | options)).finish()


def slow_greedy(model, prompt, count, parts_of):
    """Decode without a cache: all tokens again for every new one.

    `parts_of(position, prompt_length)` are the parts that the token at `position` leaves out; for a
    token that skips a layer, later tokens must not attend to it there, so only rules under which
    they never do can be checked like this.
    """
    tokens = list(prompt)
    n_layers = model.config.n_layers
    for _ in range(count):
        h = model.embed(torch.tensor([tokens]))
        for l in range(n_layers):
            runs = [
                l not in parts_of(position, len(prompt)).attention
                for position in range(len(tokens))
            ]
            after, _ = model.run_layers(h, l, l + 1, skipped=NOTHING)
            h = torch.where(torch.tensor(runs)[None, :, None], after, h)
        tokens.append(int(model.exit_logits(h[:, -1]).argmax(-1)))
    return tokens[len(prompt) :]
