"""The options of `models.convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data.urls import Location
from models.tensor_reader import Weights

Format = Literal["hf", "skipstone"]
"""A Hugging Face folder, or a run folder or checkpoint of ours."""

DESCRIPTION = """\
Convert a model with its tokenizer. The output appears when it is proven: all tensors read back bit
for bit, the same logits (transformers' where it is installed) and the same token ids. Needs memory
for the weights and one copy of them in fp32.

examples:
  python -m models.convert --from hf --to skipstone Llama-3.2-1B outputs/llama3.2_1b \\
      --max_seq_len 8192
  python -m models.convert --from skipstone --to hf outputs/demo exports/demo --dtype bfloat16
  python -m models.convert --from skipstone --to hf outputs/demo exports/draft --first_layers 2
  python -m models.convert --from skipstone --to skipstone outputs/demo outputs/half \\
      --layers every_other
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    source: Annotated[Format, tyro.conf.arg(name="from")]
    """Format of INPUT."""
    target: Annotated[Format, tyro.conf.arg(name="to")]
    """Format of OUTPUT."""
    input: Annotated[tyro.conf.Positional[Location], tyro.conf.arg(metavar="INPUT")]
    """Hugging Face folder with safetensors, or run folder (its newest checkpoint is read) or
    checkpoint folder, or the URL of such a run or checkpoint."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
    """Folder to make; must not exist or be empty."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Round the weights to this; None leaves them as they are."""
    weights: Weights = "model"
    """model: the weights of the last step; ema: their moving average, see optim.ema_decay."""
    max_shard_bytes: int = 5_000_000_000
    """Most bytes of one safetensors file."""
    max_seq_len: int | None = None
    """Context in tokens to write; None keeps that of the input. A preset that goes on from the
    output must have the same."""
    tokenizer: Path | None = None
    """SentencePiece model or tokenizer.json (its tokenizer_config.json beside it); None takes that
    of the input."""
    other_tokenizer: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take a tokenizer that gives other ids than the input's own, as one whose text the weights
    were trained on."""
    first_layers: int | None = None
    """Keep the first so many layers alone: the exit of E layers, as a draft model."""
    layers: str | None = None
    """Keep every_other layer, or those of the given indices, such as 0,2,5; not beside
    first_layers."""
    drop_own_exits: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out what exits have of their own: a plain Llama, the last layer as it is."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = []
        if self.max_shard_bytes < 1:
            found.append(f"max_shard_bytes: {self.max_shard_bytes}, give at least 1")
        if self.weights != "model" and self.source == "hf":
            found.append(f"weights: {self.weights}, but a Hugging Face folder has one kind alone")
        if self.layers is not None and self.first_layers is not None:
            found.append(
                f"layers: {self.layers}, but first_layers is given too, leave one of them out"
            )
        return found
