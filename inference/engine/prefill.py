"""Laying out a batch and putting prompts into its rows. Knows nothing of strategies."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inference.engine.compiled import window_step
from inference.engine.counters import Counters
from inference.engine.kv_cache import StaticKVCache
from inference.engine.sampling import Sampling
from inference.engine.state import DecodeState
from models.llama import Llama, SkippedParts


def allocate(model: Llama, rows: int, *, slots: int, sampling: Sampling, seed: int) -> DecodeState:
    """Lay out a batch of empty rows.

    Args:
        model: On its device.
        rows: Their number.
        slots: Longest row, continuation included, in tokens.
        sampling: How tokens are drawn.
        seed: Of every draw.
    """
    weight = model.norm.weight
    device = weight.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return DecodeState(
        model=model,
        cache=StaticKVCache(
            model.config,
            rows,
            slots,
            device=device,
            dtype=weight.dtype,
            window_step=window_step(model),
        ),
        sampling=sampling,
        generator=(
            torch.Generator(device=device).manual_seed(seed) if sampling.temperature else None
        ),
        history=zeros(rows, slots + 1),
        pending=zeros(rows),
        positions=zeros(rows),
        prompt_lengths=zeros(rows),
        finished=torch.zeros(rows, dtype=torch.bool, device=device),
        max_position=0,
    )


def reset(state: DecodeState, seed: int) -> None:
    """Make a batch as good as new, for prompts in all its rows."""
    state.counters = Counters()
    if state.generator is not None:
        state.generator.manual_seed(seed)


@torch.inference_mode()
def prefill(
    state: DecodeState, prompts: Sequence[Sequence[int]], parts: tuple[int, SkippedParts]
) -> None:
    """Put a prompt into every row: run all its tokens but the last, the pending one.

    Shorter rows are padded on the right. The padding leaves junk in slots from the pending
    token's on; each is overwritten by the token of that position before any query may see it.

    Args:
        state: The batch; whatever its rows held is forgotten.
        prompts: One list of token ids for each row, none empty.
        parts: The first so many layers, less those skipped.
    """
    device = state.pending.device
    longest = max(map(len, prompts))
    padded = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    state.history[:, :longest] = padded
    state.pending.copy_(padded.gather(1, lengths[:, None] - 1).squeeze(1))
    state.prompt_lengths.copy_(lengths)
    state.finished.fill_(False)
    if longest > 1:
        depth, skipped = parts
        state.positions.zero_()
        state.max_position = 0
        state.run(state.model.embed(padded[:, :-1]), 0, depth, skipped=skipped)
    state.positions.copy_(lengths - 1)
    state.max_position = longest - 1
    state.num_prefills += 1


def prefill_row(
    state: DecodeState, row: int, prompt: Sequence[int], parts: tuple[int, SkippedParts]
) -> None:
    """Put a prompt into one row of a batch, as `prefill` does; the other rows stay."""
    one = slice(row, row + 1)
    alone = replace(
        state,
        cache=state.cache.row(row),
        history=state.history[one],
        pending=state.pending[one],
        positions=state.positions[one],
        prompt_lengths=state.prompt_lengths[one],
        finished=state.finished[one],
    )
    prefill(alone, [prompt], parts)
    state.max_position, state.num_prefills = (
        max(state.max_position, alone.max_position),
        alone.num_prefills,
    )
