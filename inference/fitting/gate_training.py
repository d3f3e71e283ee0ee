"""Fits a gate to a trace of the exits of a frozen model. Reads and writes no files."""

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.fitting.traces import Trace
from inference.strategies.gate_classifiers import STOPPING, Form, GateClassifier, new_gate

_BATCH = 512
_LR = 3e-3
_WEIGHT_DECAY = 1e-2


def fit_gate(trace: Trace, form: Form, *, epochs: int, hidden: int, seed: int) -> GateClassifier:
    """Fit a gate, the model frozen.

    Args:
        trace: The training data.
        form: Form of the classifier.
        epochs: Passes over the tokens.
        hidden: Units of mlp's hidden layer.
        seed: Of its weights and of the order of tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = trace.states.shape[-1]
    gate = new_gate(form, trace.exits, dim, hidden=hidden, generator=generator)
    weights = [tensor.requires_grad_() for tensor in gate.tensors.values()]
    optimizer = torch.optim.AdamW(weights, lr=_LR, weight_decay=_WEIGHT_DECAY)
    odds = balance(trace.agrees, shared=form == "lte")
    tokens = trace.agrees.shape[1]
    steps = epochs * -(-tokens // _BATCH)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for _ in range(epochs):
        for rows in torch.randperm(tokens, generator=generator).split(_BATCH):
            agrees = trace.agrees[:, rows]
            outputs = all_outputs(gate, trace.states[:, rows])
            if form in STOPPING:
                loss = stopping_loss(form, outputs, agrees)
            else:
                loss = balanced_loss(outputs[..., 0], agrees, odds)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
    for weight in weights:
        weight.requires_grad_(False)
    if form not in STOPPING:
        # Fitted as if half of the cases were true: their true odds turn sigma back into the
        # probability that the exit is right.
        gate.tensors["b"].add_(odds[: len(gate.tensors["b"])].log())
    return gate


def all_outputs(gate: GateClassifier, states: Tensor) -> Tensor:
    """Return a gate's outputs at all its exits: (exits or 1, tokens, 1 or exits + 1).

    Args:
        gate: The gate.
        states: (exits, tokens, dim).
    """
    if gate.form == "multinomial":
        return gate.outputs(0, states[0])[None]
    return torch.stack([gate.outputs(n, h) for n, h in enumerate(states)])


@torch.no_grad()
def all_scores(gate: GateClassifier, states: Tensor) -> Tensor:
    """Return a gate's scores, (exits, tokens), for states: (exits, tokens, dim)."""
    return torch.stack(
        [gate.score(E, h, states[0]) for E, h in zip(gate.exits, states, strict=True)]
    )


def balance(agrees: Tensor, *, shared: bool) -> Tensor:
    """Return the odds of agreement, true over false cases with one of each added: (exits,).

    Args:
        agrees: (exits, tokens) bool.
        shared: Count all exits together.
    """
    true, cases = agrees.sum(1).double(), torch.full((len(agrees),), float(agrees.shape[1]))
    if shared:
        true, cases = true.sum().expand(len(agrees)), cases.sum().expand(len(agrees))
    return ((true + 1) / (cases - true + 1)).float()


def balanced_loss(outputs: Tensor, agrees: Tensor, odds: Tensor) -> Tensor:
    """Return the cross entropy of "the exit is right", both classes of the same total weight.

    Args:
        outputs: (exits, tokens), logits.
        agrees: (exits, tokens) bool.
        odds: (exits,), true over false cases.
    """
    odds = odds[:, None]
    weights = torch.where(agrees, (1 + odds) / (2 * odds), (1 + odds) / 2)
    return F.binary_cross_entropy_with_logits(outputs, agrees.float(), weight=weights)


def stopping_loss(form: Form, outputs: Tensor, agrees: Tensor) -> Tensor:
    """Return -log P(stop at the first exit that is right, or at the last layer).

    Depth-Adaptive Transformer (arXiv 1910.10073), section 4, with the oracle by whether an exit is
    right. For h_n = sigma(outputs_n):
      P(n) = h_n (1 - h_{n-1}) ... (1 - h_1), and the last layer has the remaining probability.

    Args:
        form: One of STOPPING.
        outputs: (exits, tokens, 1), or (1, tokens, exits + 1) for multinomial.
        agrees: (exits, tokens) bool.
    """
    target = torch.cat((agrees, torch.ones_like(agrees[:1]))).int().argmax(0)  # (tokens,)
    if form == "multinomial":
        return F.cross_entropy(outputs[0], target)
    stop = outputs[..., 0]
    exits = torch.arange(len(stop))[:, None]
    reached, stops = exits <= target, exits == target
    each = F.binary_cross_entropy_with_logits(stop, stops.float(), reduction="none")
    return (each * reached).sum(0).mean()
