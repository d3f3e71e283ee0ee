"""Where documents begin in a row of tokens. Independent of streams and batches."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Marks = Literal["both", "first", "last"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Boundaries:
    """The tokens that mark where documents begin and end."""

    bos_id: int
    eos_id: int | None = None
    """May be the same as bos_id; None: another."""
    marks: Marks = "both"
    """both: BOS is the first token of every document and EOS its last, as `data.prepare` encodes
    text. first: BOS alone. last: EOS alone, as in the token files of nanoGPT, Megatron and OLMo."""

    def starts(self, tokens: Ids) -> npt.NDArray[np.bool_]:
        """Return where documents start in rows: (..., seq) int64, the same shape."""
        if self.marks == "last":
            found = np.zeros(tokens.shape, dtype=np.bool_)
            found[..., 1:] = tokens[..., :-1] == self.eos_id
            return found
        found = tokens == self.bos_id
        if self.marks == "both" and self.bos_id == self.eos_id:  # BOS is the one after EOS.
            found[..., 1:] &= found[..., :-1].copy()
        return found

    def document_numbers(self, tokens: Ids) -> Ids:
        """Number the documents of each row, from 0; from 1 where the row begins with a start.

        Args:
            tokens: (..., seq) int64.

        Returns:
            (..., seq) int64, not decreasing.
        """
        return np.cumsum(self.starts(tokens), axis=-1, dtype=np.int64)
