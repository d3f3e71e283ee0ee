"""Documents and files of a corpus that could not be used: counted by reason and located."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

EMPTY = "empty document"
UNKNOWN_KIND = "unknown file kind"


@dataclass
class Faults:
    """What was skipped, counted by reason, with the first few origins of each."""

    max_examples: int = 3
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lines_read: int = 0
    """Of the file of lines that was read last."""

    def add(self, reason: str, origin: str, count: int = 1) -> None:
        """Count a fault, which loses so many documents."""
        self.counts[reason] += count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < self.max_examples:
            examples.append(origin)

    def extend(self, counts: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> None:
        """Add what was counted elsewhere, behind what is here."""
        for reason, count in counts.items():
            self.counts[reason] += count
            kept = self.examples.setdefault(reason, [])
            kept += examples[reason][: self.max_examples - len(kept)]

    @property
    def damaged(self) -> int:
        """Number of faults that lost text, or may have: no empty document, no unknown file."""
        return self.counts.total() - self.counts[EMPTY] - self.counts[UNKNOWN_KIND]

    def lines(self) -> list[str]:
        """Return one line per reason: the count, the reason, the first origins."""
        return [
            f"skipped {count}: {reason} ({', '.join(self.examples[reason])}"
            f"{', ...' if count > len(self.examples[reason]) else ''})"
            for reason, count in sorted(self.counts.items())
        ]
