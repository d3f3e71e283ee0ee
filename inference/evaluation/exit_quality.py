"""Quality of every exit on held-out text: loss, accuracy, agreement, calibration."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.boundaries import Boundaries
from data.dataset import VALIDATION, Dataset
from data.loader import Microbatch, microbatch
from data.shards import NO_LOSS, TokenStream
from data.windows import Ids, Packing, Windows, open_windows, spread
from inference.cli.terminal import with_progress
from inference.evaluation.calibration import (
    BINS,
    bin_confidence,
    calibration_error,
    mean_confidence,
)
from inference.loading.run import Run
from models.attention_mask import document_mask
from models.layer_masks import LayerMasks
from models.llama import Llama

_BATCH = 8
_LOGITS_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class ExitQuality:
    """How well one exit predicts."""

    E: int
    """Layers run before the exit."""
    loss: float
    """Nats per token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """loss * tokens / bytes / ln 2, of tokens with a loss; comparable between tokenizers."""
    accuracy: float
    """Share of tokens that are the exit's most probable one."""
    agreement: float
    """Share of positions where that one is also the last layer's."""
    confidence: float
    """Mean probability of that one."""
    calibration_error: float
    """ECE, over 15 bins: how far confidence and accuracy are apart."""


def evaluate_run(
    run: Run, dataset: Dataset, *, max_tokens: int, seq_len: int | None = None
) -> tuple[list[ExitQuality], int]:
    """Measure every exit of a run on a dataset's validation split; see `evaluate_exits`.

    Args:
        run: The checkpoint.
        dataset: With the run's tokenizer, see `Run.open_data`.
        max_tokens: Tokens to read, rounded down to whole windows, at least one.
        seq_len: Tokens of a window; as in training if None.

    Raises:
        ValueError: An option does not fit the model or the split.
    """
    split = dataset.splits[VALIDATION]
    boundaries = Boundaries(run.tokenizer.bos_id, run.tokenizer.eos_id, dataset.marks)
    masks = run.manifest.setting("data.mask_documents", bool, False)
    return evaluate_exits(
        run.model,
        _windows(run, dataset.stream(VALIDATION), boundaries, seq_len),
        bytes_per_token=split.text_bytes / split.tokens,
        max_tokens=max_tokens,
        boundaries=boundaries if masks else None,
        decode=run.tokenizer.decode,
    )


def _windows(run: Run, stream: TokenStream, boundaries: Boundaries, seq_len: int | None) -> Windows:
    """Cut a stream as in training, into windows of `seq_len` tokens, or what there is of it."""
    context = run.model.config.max_seq_len
    if seq_len is None:
        seq_len = run.seq_len
    if not 1 <= seq_len <= context:
        raise ValueError(f"seq_len: {seq_len}, give 1 to {context}, the model's context")
    return open_windows(
        stream,
        run.manifest.setting("data.packing", Packing, "stream"),
        seq_len=min(seq_len, len(stream) - 1),
        boundaries=boundaries,
    )


@torch.inference_mode()
def evaluate_exits(
    model: Llama,
    windows: Windows,
    *,
    bytes_per_token: float,
    max_tokens: int,
    boundaries: Boundaries | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> tuple[list[ExitQuality], int]:
    """Measure every exit on windows spread evenly over all.

    Each token that has a loss is predicted from those before it in its window, or document.

    Args:
        model: In eval mode.
        windows: Held-out sequences.
        bytes_per_token: Of the text behind them, for bits per byte.
        max_tokens: Tokens to read, rounded down to whole windows, at least one.
        boundaries: Keep attention within these documents; None does not.
        decode: Returns the text of tokens. Where some have no loss, as in the prompts of pairs, the
            bytes are those of the others, and not by `bytes_per_token`.

    Returns:
        The exits, in ascending E, and the number of tokens predicted.

    Raises:
        ValueError: max_tokens is below 1, or none of the tokens has a loss.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}, give at least 1")
    rows = spread(windows, max(1, max_tokens // len(windows.read(0)[0])))
    sums = torch.zeros(model.config.n_layers, 3, dtype=torch.float64, device="cpu")
    bins = torch.zeros(model.config.n_layers, BINS, 3, dtype=torch.float64, device="cpu")
    predicted, ratio = count_learnt(windows, rows, decode)
    for first in with_progress(range(0, len(rows), _BATCH), "evaluating"):
        read = [windows.read(i) for i in rows[first : first + _BATCH]]
        tokens, labels = map(np.stack, zip(*read, strict=True))
        batch = microbatch(tokens, labels, np.arange(len(read)), boundaries)
        more_sums, more_bins = _sums(model, batch.to(model.head_weight.device))
        sums += more_sums.cpu()
        bins += more_bins.cpu()
    means = (sums / predicted).tolist()
    size = ratio or bytes_per_token
    exits = [
        _quality(E, loss, accuracy, agreement, bins[E - 1], bytes_per_token=size)
        for E, (loss, accuracy, agreement) in enumerate(means, start=1)
    ]
    return exits, predicted


def count_learnt(
    windows: Windows, rows: Sequence[int], decode: Callable[[list[int]], str] | None
) -> tuple[int, float]:
    """Return the tokens that have a loss in some windows, and their bytes for each.

    The bytes are 0 where every token has a loss, or nothing decodes them.

    Raises:
        ValueError: None has a loss.
    """
    labels = [windows.read(i)[1] for i in rows]
    count = sum(int((row != NO_LOSS).sum()) for row in labels)
    if not count:
        raise ValueError(
            f"data: none of the tokens in {len(rows)} windows of seq_len {len(labels[0])} has a "
            "loss, give a longer seq_len or more max_tokens"
        )
    if decode is None or count == sum(map(len, labels)):
        return count, 0.0
    return count, sum(learnt_bytes(row, decode) for row in labels) / count


def learnt_bytes(labels: Ids, decode: Callable[[list[int]], str]) -> int:
    """Return the UTF-8 bytes of the tokens with a loss in labels: (seq,) int64."""
    runs = np.split(labels, np.flatnonzero(np.diff(labels == NO_LOSS)) + 1)
    return sum(len(decode(run.tolist()).encode()) for run in runs if run[0] != NO_LOSS)


def _quality(
    E: int,
    loss: float,
    accuracy: float,
    agreement: float,
    bins: Tensor,
    *,
    bytes_per_token: float,
) -> ExitQuality:
    return ExitQuality(
        E=E,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp(710) is beyond a float
        bits_per_byte=loss / bytes_per_token / math.log(2),
        accuracy=accuracy,
        agreement=agreement,
        confidence=mean_confidence(bins),
        calibration_error=calibration_error(bins),
    )


def _sums(model: Llama, batch: Microbatch) -> tuple[Tensor, Tensor]:
    """Add up loss, hits, agreements and confidence of every exit, in chunks of the logits.

    Args:
        model: In eval mode.
        batch: On its device.

    Returns:
        (n_layers, 3) fp64, and (n_layers, BINS, 3) fp64 of `bin_confidence`.
    """
    n_layers, device = model.config.n_layers, batch.labels.device
    window = model.config.sliding_window
    documents = None if batch.documents is None else document_mask(batch.documents, window)
    masks, h = LayerMasks(documents=documents), model.embed(batch.tokens)
    _, exits = model.run_layers(h, 0, n_layers, masks=masks, exit_layers=range(n_layers))
    sums = torch.zeros(n_layers, 3, dtype=torch.float64, device=device)
    bins = torch.zeros(n_layers, BINS, 3, dtype=torch.float64, device=device)
    learnt = batch.labels != NO_LOSS
    chunks = [exits[l][learnt].split(_LOGITS_ROWS) for l in range(n_layers)]
    for i, labels in enumerate(batch.labels[learnt].split(_LOGITS_ROWS)):
        last_choice = labels
        for l in reversed(range(n_layers)):
            logits = model.exit_logits(chunks[l][i], l + 1).float()
            choice = logits.argmax(-1)
            last_choice = choice if l == n_layers - 1 else last_choice
            sums[l, 0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[l, 1] += (choice == labels).sum()
            sums[l, 2] += (choice == last_choice).sum()
            bins[l] += bin_confidence(logits, labels)
    return sums, bins
