"""The settings of the training data: datasets, sequences and batches."""

from dataclasses import dataclass

from data.batch_ramp import BatchRamp
from data.mixture import shares
from data.windows import Packing


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Datasets, sequences and batch sizes."""

    path: str = ""
    """Folder of token shards, made by `python -m data.prepare`, or its URL, of which a copy is made
    in $SKIPSTONE_CACHE or ~/.cache/skipstone; nothing is ever prepared here.
    Empty: prepared from `input`, once, in outputs/data."""
    input: tuple[str, ...] = ()
    """Text for a run without a `path`: files or folders, or "embedded" for the sources of Python
    and torch on this machine."""
    vocab_multiple: int = 1
    """Where model.vocab_size is not given, it is the dataset's, rounded up to a multiple of this.
    The ids beyond the dataset's are never learnt."""
    also: tuple[str, ...] = ()
    """More folders of shards, or their URLs, of the same tokenizer, to mix in. Validation reads
    `path` alone."""
    weights: tuple[float, ...] = ()
    """Relative weights of `path` and each of `also`: its share of every 4096 rows. A source is
    shuffled and read to its end before any of it repeats. Empty: by the number of rows."""
    packing: Packing = "stream"
    """stream: documents one after the other, cut every seq_len tokens. documents: as many whole
    ones as fit, the rest of a row padding; one longer than seq_len is truncated. For pairs."""
    mask_documents: bool = False
    """Keep attention within documents: FlexAttention on GPUs, a mask on CPUs. Rotary positions are
    relative and need no reset."""
    seq_len: int = 2048
    """Tokens per sequence."""
    global_batch_size: int = 256
    """Sequences per optimizer step, over all ranks."""
    ramp_start: int = 0
    """Sequences of the first step, where the batch grows to global_batch_size; 0: it does not."""
    ramp_increment: int = 0
    """Sequences that each growth adds."""
    ramp_steps: int = 0
    """Steps until the batch has its full size; each size before that lasts equally long."""
    microbatch_size: int = 0
    """Sequences per rank and forward pass; gradients of global_batch_size / (ranks *
    microbatch_size) of them accumulate to one step. 0: no accumulation."""
    verify_shards: bool = True
    """Before step 1, read all shards, each rank a part, and compare them with the checksums of
    their preparation. False: compare their sizes alone."""

    @property
    def batch(self) -> BatchRamp:
        """Sequences of the global batch of each step t."""
        return BatchRamp(
            self.global_batch_size, self.ramp_start, self.ramp_increment, self.ramp_steps
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one global batch, after a ramp."""
        return self.global_batch_size * self.seq_len

    def tokens_of(self, steps: int) -> int:
        """Tokens in the batches of the first `steps`."""
        return self.batch.before(steps) * self.seq_len

    def rows_at_once(self, world_size: int) -> int:
        """Return the sequences of one microbatch on one of `world_size` ranks."""
        return self.microbatch_size or self.global_batch_size // world_size

    def problems(self, world_size: int) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = [
            f"data.{name}: {getattr(self, name)}, must be at least {least}"
            for name, least in (
                ("seq_len", 1),
                ("global_batch_size", 1),
                ("microbatch_size", 0),
                ("vocab_multiple", 1),
            )
            if getattr(self, name) < least
        ]
        found = found or self._batch_problems(world_size)
        if self.weights and len(self.weights) != 1 + len(self.also):
            found.append(
                f"data.weights: {self.weights}, give one for path and each of also, "
                f"{1 + len(self.also)} in all"
            )
        elif self.weights:
            try:
                shares(self.weights)
            except ValueError as error:
                found.append(f"data.{error}")
        return found

    def _batch_problems(self, world_size: int) -> list[str]:
        sizes = {"global_batch_size": self.global_batch_size}
        ramp = (self.ramp_start, self.ramp_increment, self.ramp_steps)
        if any(ramp):
            if min(ramp) < 1:
                return [
                    f"data.ramp_start, data.ramp_increment and data.ramp_steps: {ramp}, give all "
                    "three, at least 1 each, or none"
                ]
            rest = self.global_batch_size - self.ramp_start
            if rest < 1 or rest % self.ramp_increment:
                return [
                    f"data.ramp_increment: from data.ramp_start {self.ramp_start} no steps of "
                    f"{self.ramp_increment} lead to data.global_batch_size "
                    f"{self.global_batch_size}, change one of them"
                ]
            sizes |= {"ramp_start": self.ramp_start, "ramp_increment": self.ramp_increment}
        rows = f" * data.microbatch_size {self.microbatch_size}" if self.microbatch_size else ""
        return [
            f"data.{name}: {size} is not a multiple of {world_size} ranks{rows}, change one of them"
            for name, size in sizes.items()
            if size % (world_size * max(self.microbatch_size, 1))
        ]
