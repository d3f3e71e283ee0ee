"""Continuations by all layers, and what every exit predicts along them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.engine.candidates import acceptance_chances
from inference.engine.generation import Generation
from inference.engine.sampling import Sampling, draw_weights
from inference.strategies.autoregressive import Autoregressive
from models.llama import Llama


def decode_rows(
    model: Llama,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_tokens: Sequence[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Decode with all layers; return each prompt with its continuation. See `Generation`."""
    whole = Generation(
        model,
        prompts,
        Autoregressive(),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop_tokens=stop_tokens,
        sampling=sampling,
        seed=seed,
    ).finish()
    return [prompt + tokens for prompt, tokens in zip(whole.prompts, whole.tokens, strict=True)]


def record_continuations(
    model: Llama,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_tokens: Sequence[int] = (),
) -> list[Tensor]:
    """Decode greedily with all layers, and return the `record_exits` of every continuation."""
    rows = decode_rows(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop_tokens=stop_tokens,
    )
    pairs = zip(rows, prompts, strict=True)
    return [record_exits(model, row, len(prompt)) for row, prompt in pairs]


@torch.inference_mode()
def record_exits(model: Llama, row: list[int], first: int) -> Tensor:
    """Return the most probable token of every exit along a row: (L, tokens) int64.

    Args:
        model: In eval mode.
        row: A prompt and its greedy continuation.
        first: Length of the prompt.
    """
    states = _exit_states(model, row, first)
    found = [model.exit_logits(x, E).argmax(-1) for E, x in enumerate(states, start=1)]
    return torch.stack(found).cpu()


@torch.inference_mode()
def record_acceptance(
    model: Llama, row: list[int], first: int, sampling: Sampling, candidates: int = 1, seed: int = 0
) -> Tensor:
    """Return the chance that each candidate of each exit is accepted, if none before it is.

    See `acceptance_chances`; greedy, it is 1 where it is the last layer's token, else 0.

    Args:
        model: In eval mode.
        row: A prompt and its continuation, drawn likewise.
        first: Length of the prompt.
        sampling: How tokens are drawn.
        candidates: At most the size of the vocabulary.
        seed: Of draws, of sampled candidates.

    Returns:
        (L, tokens, candidates) fp32.
    """
    states = _exit_states(model, row, first)
    generator = None
    if sampling.temperature:
        generator = torch.Generator(states[0].device).manual_seed(seed)
    p = draw_weights(model.exit_logits(states[-1], len(states)), sampling)
    found = [
        acceptance_chances(
            draw_weights(model.exit_logits(x, E), sampling), p, candidates, generator
        )
        for E, x in enumerate(states, start=1)
    ]
    return torch.stack(found).float().cpu()


@dataclass(frozen=True)
class ExitPredictions:
    """What every exit predicts along a row; row E - 1 of each tensor is the exit after E."""

    choices: Tensor
    """(L, tokens) int64, the most probable token."""
    confidence: Tensor
    """(L, tokens) fp32, its probability."""
    entropy: Tensor
    """(L, tokens) fp32, of the distribution, in nats."""
    likelihood: Tensor
    """(L, tokens) fp32, the probability of the row's own token."""

    def settled(self) -> list[int]:
        """Return, for each token, the first E from which all exits choose what the last does."""
        same = (self.choices == self.choices[-1]).flip(0).int()
        return (len(same) + 1 - same.cumprod(0).sum(0)).tolist()


@torch.inference_mode()
def record_predictions(model: Llama, row: list[int], first: int) -> ExitPredictions:
    """Return what every exit predicts for the tokens of a row from `first` on.

    Args:
        model: In eval mode.
        row: Token ids; at most the model's context.
        first: At least 1.
    """
    found = []
    actual = torch.tensor(row[first:], device=model.norm.weight.device)[:, None]
    for E, x in enumerate(_exit_states(model, row, first), start=1):
        p = model.exit_logits(x, E).float().softmax(-1)
        confidence, choices = p.max(-1)
        likelihood = p.gather(-1, actual).squeeze(-1)
        found.append((choices, confidence, torch.special.entr(p).sum(-1), likelihood))
    return ExitPredictions(*(torch.stack(each).cpu() for each in zip(*found, strict=True)))


def _exit_states(model: Llama, row: list[int], first: int) -> list[Tensor]:
    """Return x_1, ..., x_L, (tokens, dim) each, that predict the tokens from `first` on."""
    L = model.config.n_layers
    h = model.embed(torch.tensor([row], device=model.norm.weight.device))
    _, exits = model.run_layers(h, 0, L, exit_layers=range(L))
    return [exits[l][0, first - 1 : -1] for l in range(L)]
