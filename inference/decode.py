"""The driver: prompts in, rounds of tokens out, for any strategy. Knows nothing of text."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from inference.counters import Counters
from inference.kv_cache import StaticKVCache
from inference.sampling import Sampling
from inference.state import DecodeState, Strategy
from models.config import LlamaConfig
from models.llama import Llama


@dataclass(frozen=True)
class Emission:
    """What one round gave one row."""

    row: int
    tokens: list[int]
    """At least one; none after a stop token or beyond the row's limit."""
    accepted: int
    """How many of them, from the first, were drafted and accepted."""
    drafted: int
    """Tokens drafted in this round. 0: the tokens are plain. Otherwise a token after the accepted
    ones corrects the draft, or follows a draft that was accepted whole."""


class Generation:
    """Continues a batch of prompts; iterate over it for the tokens of each round.

    Args:
        model: In eval mode, on its device.
        prompts: One list of token ids for each row; lengths may differ.
        strategy: How to decode.
        max_new_tokens: Most tokens to add to a row; a row also ends when it is as long as the
            model's context.
        stop_tokens: Ids that end a row; the id itself is the row's last token.
        sampling: Greedy by default.
        seed: Of every random draw.

    Raises:
        ValueError: a prompt, the strategy's settings or max_new_tokens do not fit the model.
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        strategy: Strategy,
        *,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        """Check everything and compute nothing yet; see the class."""
        config = model.config
        problems = strategy.problems(config.n_layers) + _problems(prompts, max_new_tokens, config)
        if problems:
            raise ValueError("; ".join(problems))
        self.prompts = [list(prompt) for prompt in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        """New tokens of each row so far."""
        self.counters = Counters()
        self._strategy = strategy
        self._n_layers = config.n_layers
        self._stop_tokens = frozenset(stop_tokens)
        self._ends = [min(len(p) + max_new_tokens, config.max_seq_len) for p in self.prompts]
        self._active = list(range(len(self.prompts)))
        self._state = open_state(
            model,
            self.prompts,
            slots=max(self._ends),
            sampling=sampling or Sampling(),
            seed=seed,
        )

    def __iter__(self) -> Iterator[list[Emission]]:
        """Return itself: a loop that was left goes on where it was."""
        return self

    def __next__(self) -> list[Emission]:
        """Run one round, after the prompts before the first; return what each row was given."""
        if not self._active:
            raise StopIteration
        if self.counters.rounds == 0:
            start = time.perf_counter()
            prefill(self._state, self.prompts, self._strategy.depth(self._n_layers))
            wait_for(self._state.pending.device)
            self.counters.prefill_seconds = time.perf_counter() - start
            self.counters.prompt_token_layers = self._state.work.token_layers
        return self._round()

    def finish(self) -> "Generation":
        """Run to the end and return itself."""
        for _ in self:
            pass
        return self

    @torch.inference_mode()
    def _round(self) -> list[Emission]:
        start = time.perf_counter()
        state, counters = self._state, self.counters
        room = min(max(map(self._left, self._active)), state.cache.slots - state.longest)
        result = self._strategy.round(state, room)
        state.advance(result)
        tokens, accepted = result.tokens.tolist(), result.accepted.tolist()
        emissions = []
        for row in self._active:
            new = self._cut(row, tokens[row][: accepted[row] + 1])
            self.tokens[row] += new
            emissions.append(Emission(row, new, min(accepted[row], len(new)), result.drafted))
            counters.tokens += len(new)
            counters.rounds += 1
            counters.drafted += result.drafted
            counters.accepted += accepted[row]
            counters.rejections += accepted[row] < result.drafted
        self._park_finished()
        counters.token_layers = state.work.token_layers - counters.prompt_token_layers
        counters.head_evaluations = state.work.head_evaluations
        counters.decode_seconds += time.perf_counter() - start
        return emissions

    def _left(self, row: int) -> int:
        """Return how many tokens a row may still get."""
        return self._ends[row] - len(self.prompts[row]) - len(self.tokens[row])

    def _cut(self, row: int, new: list[int]) -> list[int]:
        """Return `new` up to the row's limit and up to and with the first stop token."""
        new = new[: self._left(row)]
        stops = [i for i, token in enumerate(new) if token in self._stop_tokens]
        return new[: stops[0] + 1] if stops else new

    def _park_finished(self) -> None:
        """Take finished rows out of play and find the longest of the others."""
        state, before = self._state, len(self._active)
        self._active = [
            row
            for row in self._active
            if self._left(row) and self.tokens[row][-1] not in self._stop_tokens
        ]
        if len(self._active) < before:
            finished = torch.ones(len(self.prompts), dtype=torch.bool)
            finished[self._active] = False
            state.finished = finished.to(state.finished.device)
        state.positions = state.positions.masked_fill(state.finished, 0)
        state.longest = max(
            (len(self.prompts[row]) + len(self.tokens[row]) - 1 for row in self._active), default=0
        )


def open_state(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    slots: int,
    sampling: Sampling,
    seed: int,
) -> DecodeState:
    """Lay out a batch: an empty cache, and each prompt's last token pending.

    Args:
        model: On its device.
        prompts: One list of token ids for each row, none empty.
        slots: Longest row, continuation included, in tokens.
        sampling: How tokens are drawn.
        seed: Of every draw.
    """
    device, dtype = model.head_weight.device, model.head_weight.dtype
    positions = [len(prompt) - 1 for prompt in prompts]
    return DecodeState(
        model=model,
        cache=StaticKVCache(model.config, len(prompts), slots, device=device, dtype=dtype),
        sampling=sampling,
        generator=(
            torch.Generator(device=device).manual_seed(seed) if sampling.temperature else None
        ),
        pending=torch.tensor([prompt[-1] for prompt in prompts], device=device),
        positions=torch.tensor(positions, device=device),
        finished=torch.zeros(len(prompts), dtype=torch.bool, device=device),
        longest=max(positions),
    )


@torch.inference_mode()
def prefill(state: DecodeState, prompts: Sequence[Sequence[int]], depth: int) -> None:
    """Run all prompt tokens but each row's last, the pending one, through the first layers.

    Shorter rows are padded on the right. The padding leaves junk in slots from the pending
    token's on; each is overwritten by the token of that position before any query may see it.

    Args:
        state: Fresh from `open_state`.
        prompts: The same as there.
        depth: Number of layers to run.
    """
    if state.longest == 0:
        return
    padded = [([*p[:-1]] + [0] * state.longest)[: state.longest] for p in prompts]
    tokens = torch.tensor(padded, device=state.pending.device)
    positions, longest = state.positions, state.longest
    state.positions, state.longest = torch.zeros_like(positions), 0
    state.run(state.model.embed(tokens), 0, depth)
    state.positions, state.longest = positions, longest


def wait_for(device: torch.device) -> None:
    """Let the device finish, so that a clock read on the host means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _problems(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, config: LlamaConfig
) -> list[str]:
    found = [] if prompts else ["prompts: none, give at least one"]
    if max_new_tokens < 1:
        found.append(f"max_new_tokens: {max_new_tokens}, give at least 1")
    for row, prompt in enumerate(prompts):
        if not prompt:
            found.append(f"prompt {row}: empty, give at least one token, for example BOS")
            continue
        if len(prompt) >= config.max_seq_len:
            found.append(
                f"prompt {row}: {len(prompt)} tokens leave no room in the model's context of "
                f"{config.max_seq_len}, shorten it to at most {config.max_seq_len - 1}"
            )
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            found.append(
                f"prompt {row}: token {outside[0]} is outside the model's vocabulary of "
                f"{config.vocab_size}, encode it with the model's own tokenizer"
            )
    return found
