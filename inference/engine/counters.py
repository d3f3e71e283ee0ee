"""What a decoding run counts, and the speedup those counts allow at best."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

StopReason = Literal["rejected", "leaf", "not_sure", "end", "limit", "whole"]
"""Why no more drafts of a round were accepted: the next was rejected, or it was and a leaf taken in
its stead; the draft's stop rule had ended it; its row ended, at a stop token or at its limit; or it
was accepted whole."""

DraftedRound = tuple[int, int, StopReason]
"""Tokens drafted, tokens accepted, and why no more."""


@dataclass
class Counters:
    """Counts of one run; rates are properties.

    Layers and heads are counted as they are computed, padding and finished rows included; tokens
    and drafts as rows receive them.
    """

    tokens: int = 0
    """New tokens, stop tokens included."""
    rounds: int = 0
    """Rounds, each row counted while it is not finished; one LM head pass of the last layer in
    each, so for self-speculation the number of verifications."""
    drafted: int = 0
    """Drafted tokens; not those behind an accepted one that ended its row."""
    accepted: int = 0
    """Drafted tokens accepted; not those after a stop token or beyond a row's limit."""
    rejections: int = 0
    """Rounds in which a drafted token was rejected before the row's end."""
    leaves: int = 0
    """Accepted ones that are leaves, in place of a drafted token that was rejected."""
    drafted_past_end: int = 0
    """Tokens drafted behind a row's end; neither in `drafted` nor in `accepted`."""
    drafts: Counter[DraftedRound] = field(default_factory=Counter)
    """Rounds that drafted, each row's counted for itself."""
    depths: Counter[int] = field(default_factory=Counter)
    """New tokens by the number of layers behind them, where a strategy reports it."""
    thresholds: Counter[float] = field(default_factory=Counter)
    """Times a row's threshold was moved, by where to, by strategies that adapt it."""
    token_layers: float = 0.0
    """Tokens times layers run, after the prompt; a half for attention or feed-forward alone."""
    head_evaluations: float = 0.0
    """Tokens the final norm and LM head were applied to; a part of the head counts as that part."""
    projected: int = 0
    """Tokens times layers of which keys and values alone were computed."""
    draft_token_layers: float = 0.0
    """Tokens times layers run by a separate draft model; in no other count."""
    draft_head_evaluations: float = 0.0
    """Tokens that model's LM head was applied to; in no other count."""
    syncs: int = 0
    """Times the host waited for the device inside a round."""
    passes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    """Times layers start, ..., stop - 1 were run on n tokens of each row, by (start, stop, n); also
    where parts of them were skipped."""
    head_passes: Counter[int] = field(default_factory=Counter)
    """Times the head, or a part of it, was applied to n tokens of each row, by n."""
    prompt_token_layers: float = 0.0
    """Tokens times layers run on the prompts."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    """Everything after the prompt."""

    def __iadd__(self, other: "Counters") -> "Counters":
        for name in (each.name for each in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def content(self) -> dict[str, Any]:
        """Return the counts by name, as JSON can hold them; passes by shape are left out."""
        # Not by asdict: Python 3.11 rebuilds a Counter out of its pairs.
        counts = {each.name: getattr(self, each.name) for each in fields(self)}
        del counts["passes"], counts["head_passes"]
        depths, thresholds = sorted(self.depths.items()), sorted(self.thresholds.items())
        counts |= {"depths": dict(depths), "thresholds": dict(thresholds)}
        return counts | {"drafts": describe_drafts(self.drafts)}

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, the prompt's time left out."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafted tokens that the user got, as LayerSkip reports it; None without drafts.

        Accepted over drafted tokens, both up to a row's end. Not the `agreement`: a rejection costs
        all drafts after it as well.
        """
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float:
        """New tokens per round: per verification, for self-speculation."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def layers_per_token(self) -> float:
        """Layers run per new token, drafts and rejected tokens included."""
        return self.token_layers / self.tokens if self.tokens else 0.0

    @property
    def heads_per_token(self) -> float:
        """Tokens the LM head was applied to per new token."""
        return self.head_evaluations / self.tokens if self.tokens else 0.0

    @property
    def mean_depth(self) -> float | None:
        """Mean number of layers behind a new token; None where no strategy counted them."""
        tokens = self.depths.total()
        return sum(d * n for d, n in self.depths.items()) / tokens if tokens else None

    @property
    def agreement(self) -> float | None:
        """a, the probability that a drafted token is accepted given those before it were.

        What `speedup_bound` needs; not the acceptance rate, which counts tokens after a rejection
        as rejected too. The number accepted in a round is geometric, cut at d or at the row's end:
        P(n) = a^n (1 - a) if the next is rejected, else a^n. Its likelihood over rounds,
        a^accepted (1 - a)^rejections, peaks at accepted / (accepted + rejections). None without
        drafts. Of a draft with leaves, that of its own tokens.
        """
        own = self.accepted - self.leaves
        tried = own + self.rejections
        return own / tried if tried else None


def describe_drafts(rounds: Mapping[DraftedRound, int]) -> dict[str, Any]:
    """Return how drafts went, as JSON can hold it.

    Returns:
        drafted_at, accepted_at: tokens drafted and accepted at positions 1, 2, ... of a draft;
        accepted_lengths: rounds in which 0, 1, ... were accepted; stops: rounds by `StopReason`.
    """
    most = max((drafted for drafted, _, _ in rounds), default=0)
    drafted_at, accepted_at, lengths = [0] * most, [0] * most, [0] * (most + 1)
    stops: Counter[StopReason] = Counter()
    for (drafted, accepted, stop), times in rounds.items():
        for i in range(drafted):
            drafted_at[i] += times
            accepted_at[i] += times * (i < accepted)
        lengths[accepted] += times
        stops[stop] += times
    return {
        "drafted_at": drafted_at,
        "accepted_at": accepted_at,
        "accepted_lengths": lengths if rounds else [],
        "stops": dict(sorted(stops.items())),
    }


def speedup_bound(agreement: float, d: int, draft_cost: float) -> float:
    """Return the best speedup over autoregressive decoding: a verification as cheap as one step.

    Leviathan et al. (arXiv 2211.17192), theorem 3.8, with a = agreement and c = draft_cost:
      (1 - a^(d+1)) / ((1 - a) (1 + d c)), where (1 - a^(d+1)) / (1 - a) = 1 + a + ... + a^d.

    Args:
        agreement: a in [0, 1], see `Counters.agreement`.
        d: Tokens drafted per round.
        draft_cost: c, seconds of one draft step over seconds of one full step.
    """
    tokens_per_round = float(sum(agreement**i for i in range(d + 1)))
    return tokens_per_round / (1.0 + d * draft_cost)
