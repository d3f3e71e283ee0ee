"""How often held-out prompts are continued while a model trains, and which."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """What is decoded while training: agreement of the exits, acceptance of drafts, samples.

    Weights, losses and random draws are the same with and without.
    """

    interval_steps: int = 500
    """Steps between measurements; the last step always measures. 0: never."""
    prompts: int = 16
    """Held-out prompts, over all ranks, each continued greedily by all layers."""
    prompt_tokens: int = 32
    """Tokens of each; prompts of pairs and of `task` are as long as they are."""
    new_tokens: int = 32
    """Tokens of each continuation, at most half of the model's context. Longer answers are left
    out."""
    draft_layers: tuple[int, ...] = ()
    """E of the drafts and samples; empty: the exits that are trained, if they are named and at most
    four, else a quarter, half and three quarters of the layers."""
    draft_tokens: tuple[int, ...] = (2, 4)
    """d of the drafts, tokens drafted in a round."""
    samples: int = 2
    """How many of the prompts each of `draft_layers` continues too, to read; 0: no samples."""
    task: str = ""
    """JSON lines with "prompt" and "answer", in place of held-out text: their share answered
    exactly is reported. Of held-out pairs it is without a file."""

    def exits_of(self, n_layers: int, trained: Collection[int] = ()) -> tuple[int, ...]:
        """Return E of the drafts for a model of such depth; none if it has one layer.

        Args:
            n_layers: L.
            trained: E of the exits that the run names.
        """
        if self.draft_layers or 0 < len(trained) <= 4:
            return self.draft_layers or tuple(sorted(trained))
        quarters = {round(n_layers * part / 4) for part in (1, 2, 3)}
        return tuple(sorted(E for E in quarters if 1 <= E < n_layers))

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the fields for such a model, one line each."""
        found = [
            f"speculation.{name}: {getattr(self, name)}, must be at least {least}"
            for name, least in (
                ("interval_steps", 0),
                ("prompts", 1),
                ("prompt_tokens", 1),
                ("new_tokens", 1),
                ("samples", 0),
            )
            if getattr(self, name) < least
        ]
        if not all(1 <= E < n_layers for E in self.draft_layers):
            found.append(
                f"speculation.draft_layers: {self.draft_layers}, give 1 to {n_layers - 1} layers"
            )
        if not all(d >= 1 for d in self.draft_tokens):
            found.append(f"speculation.draft_tokens: {self.draft_tokens}, must be at least 1")
        return found
