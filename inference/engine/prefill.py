"""Allocate a batch and put prompts into its rows. Imports no strategy."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from inference.engine.batch import Batch
from inference.engine.compiled import is_compiled, window_step
from inference.engine.counters import Counters
from inference.engine.kv_cache import StaticKVCache
from inference.engine.sampling import Sampling
from inference.engine.state import DecodeState
from models.llama import Llama, SkippedParts


@torch.inference_mode(False)
def allocate(
    model: Llama, rows: int, *, slots: int, sampling: Sampling, seed: int, spare: int = 0
) -> DecodeState:
    """Allocate a batch of empty rows, with its KV cache.

    A compiled pass is compiled for the kind of its tensors: that of a generation and of what is
    timed beside it is the same.

    Args:
        model: On its device.
        rows: Number of rows.
        slots: Most tokens of a row, continuation included.
        sampling: How tokens are drawn.
        seed: Of every draw.
        spare: Slots beyond these, see `Strategy.spare_slots`.
    """
    weight = model.norm.weight
    device = weight.device
    generator = torch.Generator(device=device).manual_seed(seed) if sampling.temperature else None
    cache = StaticKVCache(
        model.config,
        rows,
        slots,
        device=device,
        dtype=weight.dtype,
        window_step=window_step(model),
        compiled=is_compiled(model),
        spare=spare,
    )
    return DecodeState(
        model=model,
        batch=Batch.empty(rows, slots, device),
        cache=cache,
        sampling=sampling,
        generator=generator,
    )


def reset(state: DecodeState, seed: int) -> None:
    """Reset counters and draws, for a new generation that fills every row."""
    state.counters = Counters()
    if state.generator is not None:
        state.generator.manual_seed(seed)


@torch.inference_mode()
def prefill(
    state: DecodeState, prompts: Sequence[Sequence[int]], parts: tuple[int, SkippedParts]
) -> None:
    """Put a prompt into every row: run all its tokens but the last, the pending one.

    Shorter rows are padded on the right. The padding leaves junk in slots from the pending token's
    on; each is overwritten by the token of that position before any query attends to it.

    Args:
        state: The batch; earlier contents of its rows are lost.
        prompts: One list of token ids for each row, none empty.
        parts: Number of layers to run from the first on, and the parts of them to skip.
    """
    batch = state.batch
    longest = max(map(len, prompts))
    padded = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=batch.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=batch.device)
    batch.history[:, :longest] = padded
    batch.pending.copy_(padded.gather(1, lengths[:, None] - 1).squeeze(1))
    batch.prompt_lengths.copy_(lengths)
    batch.finished.fill_(False)
    if longest > 1:
        depth, skipped = parts
        batch.positions.zero_()
        batch.max_position = 0
        state.run(state.model.embed(padded[:, :-1]), 0, depth, skipped=skipped)
    batch.positions.copy_(lengths - 1)
    batch.max_position = longest - 1
    batch.num_prefills += 1


def prefill_row(
    state: DecodeState, row: int, prompt: Sequence[int], parts: tuple[int, SkippedParts]
) -> None:
    """Put a prompt into one row, as `prefill` does, and leave the other rows as they are."""
    batch, alone = state.batch, state.batch.row(row)
    prefill(replace(state, batch=alone, cache=state.cache.row(row)), [prompt], parts)
    batch.max_position = max(batch.max_position, alone.max_position)
    batch.num_prefills += 1
