"""What was measured of one strategy."""

from dataclasses import dataclass
from typing import Any

from inference.evaluation.same_tokens import Difference


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One strategy's measurements; medians over repeats where time is involved."""

    strategy: str
    settings: str
    """The strategy as a user writes it."""
    E: int | None
    """Layers run before the exit."""
    d: int | None
    """Tokens drafted per round."""
    batch_size: int
    """Prompts decoded at once."""
    tokens: int
    """New tokens, of all prompts together."""
    tokens_per_second: float
    """New tokens per second of decoding, prompts not counted, all rows of a batch together."""
    speedup: float
    """Median over repeats of this arm's tokens/s over autoregressive's in the same repeat."""
    speeds: list[float]
    """New tokens per second of each repeat."""
    speedups: list[float]
    """Of each repeat."""
    acceptance_rate: float | None
    """Share of drafted tokens that the user got."""
    tokens_per_verify: float | None
    """New tokens per round, where anything is drafted."""
    layers_per_token: float
    heads_per_token: float
    syncs_per_token: float
    """Times the host waited inside a round."""
    mean_depth: float | None
    """Layers behind a new token, where a strategy may take fewer than all."""
    prefill_seconds: float
    """Of all prompts together."""
    agreement: float | None
    """a: see `Counters.agreement`."""
    draft_cost: float | None
    """c: seconds of one draft step over seconds of one full step."""
    verify_cost: float | None
    """Seconds of one verification over seconds of one full step; the bound takes it as 1."""
    bound: float | None
    """The best speedup for this a, d and c: see `speedup_bound`."""
    share_of_bound: float | None
    """speedup / bound."""
    same_tokens: float | None
    """Share of tokens equal to autoregressive's at the same position; None when sampling."""
    first_difference: Difference | None
    """Of a lossless strategy's greedy tokens, where they are not autoregressive's."""
    full_choice: float
    """Share of tokens that the full model finds most probable after those before them."""
    log_likelihood: float
    """Of the continuations under the full model, in nats per token."""
    scores: dict[str, float]
    """Of a task; empty for plain prompts."""
    drafts: dict[str, Any]
    """Of all prompts together, see `describe_drafts`; and tokens drafted behind a row's end."""
    requests: list[dict[str, Any]]
    """Of each prompt: its new tokens, and its drafts likewise."""
    passes: list[tuple[int, int, int, int]]
    """Of layers, in all rounds: start, stop, tokens of each row, and times, see `Counters`."""
    head_passes: list[tuple[int, int]]
    """Of the head, in all rounds: tokens of each row, and times."""
    peak_bytes: int | None
    """CUDA: most memory allocated while decoding, weights included. CPU: growth of the process's
    peak resident set, without the memory of earlier arms; None where the kernel keeps no count.
    Graphs share their memory: it counts for every arm what the arm that needs most needs."""
