"""Quality of every exit on held-out text: `python -m inference.evaluate --run DIR`.

The exit after layer l runs E = l + 1 layers; l counts from 0.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.dataset import VALIDATION
from data.loader import Microbatch, microbatch
from data.shards import NO_LOSS, TokenStream
from data.windows import Windows, open_windows, spread
from inference.cli.arguments import (
    Parser,
    format_table,
    picture_file,
    run_command,
    run_from,
    with_progress,
    write_json,
)
from inference.evaluation.calibration import bin_confidence, mean_confidence
from inference.evaluation.plot import write_exit_plot
from inference.evaluation.rule_quality import BINS, calibration_error
from inference.loading.run import Run
from models.document_mask import document_mask
from models.llama import Llama

_BATCH = 8
_LOGITS_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class ExitQuality:
    """How well one exit predicts."""

    l: int
    """Layer index; the exit reads x_{l+1}."""
    E: int
    """Layers run, l + 1."""
    loss: float
    """Nats per token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """loss * tokens / bytes / ln 2, comparable between tokenizers."""
    accuracy: float
    """Share of tokens that are the exit's most probable one."""
    agreement: float
    """Share of positions where that one is also the last layer's."""
    confidence: float
    """Mean probability of that one."""
    calibration_error: float
    """ECE, over 15 bins: how far confidence and accuracy are apart."""


@torch.inference_mode()
def evaluate_exits(
    model: Llama,
    windows: Windows,
    *,
    bytes_per_token: float,
    max_tokens: int,
    bos_id: int | None = None,
) -> tuple[list[ExitQuality], int]:
    """Measure every exit on windows spread evenly over all.

    Each token that has a loss is predicted from those before it in its window, or document.

    Args:
        model: In eval mode.
        windows: Held-out sequences.
        bytes_per_token: Of the text behind them, for bits per byte.
        max_tokens: Tokens to read, rounded down to whole windows, at least one.
        bos_id: Keep attention within the documents that begin with this token; None does not.

    Returns:
        The exits, in ascending l, and the number of tokens predicted.

    Raises:
        ValueError: max_tokens is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}, give at least 1")
    rows = spread(windows, max(1, max_tokens // len(windows.read(0)[0])))
    sums = torch.zeros(model.config.n_layers, 3, dtype=torch.float64, device="cpu")
    bins = torch.zeros(model.config.n_layers, BINS, 3, dtype=torch.float64, device="cpu")
    predicted = 0
    for first in with_progress(range(0, len(rows), _BATCH), "evaluating"):
        read = [windows.read(i) for i in rows[first : first + _BATCH]]
        tokens, labels = map(np.stack, zip(*read, strict=True))
        batch = microbatch(tokens, labels, np.arange(len(read)), bos_id)
        predicted += batch.num_labels
        more_sums, more_bins = _sums(model, batch.to(model.head_weight.device))
        sums += more_sums.cpu()
        bins += more_bins.cpu()
    means = (sums / predicted).tolist()
    exits = [
        _quality(l, loss, accuracy, agreement, bins[l], bytes_per_token=bytes_per_token)
        for l, (loss, accuracy, agreement) in enumerate(means)
    ]
    return exits, predicted


def _quality(
    l: int,
    loss: float,
    accuracy: float,
    agreement: float,
    bins: Tensor,
    *,
    bytes_per_token: float,
) -> ExitQuality:
    return ExitQuality(
        l=l,
        E=l + 1,
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
    documents = None if batch.documents is None else document_mask(batch.documents)
    _, exits = model.run_layers(
        model.embed(batch.tokens), 0, n_layers, documents=documents, exit_layers=range(n_layers)
    )
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


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "inference.evaluate",
        description="Measure every exit on the validation split: loss (nats per token), perplexity,"
        " bits per byte, accuracy, agreement of its most probable token with the last layer's, the"
        " mean probability of that token (confidence), and how far confidence and accuracy are"
        f" apart (ece: expected calibration error over {BINS} bins).",
        example="--run outputs/demo --max_tokens 50000",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="dataset; the one trained on if not given"
    )
    parser.add_argument(
        "--max_tokens",
        type=int,
        default=50_000,
        help="tokens to read, in windows spread over the split; rounded down to whole windows",
    )
    parser.add_argument(
        "--seq_len",
        type=int,
        help="tokens per window; as in training if not given, or 2048 where that is not known",
    )
    parser.add_argument(
        "--plot",
        type=picture_file,
        metavar="PATH",
        help="draw the loss at every exit here (.png, .svg, .pdf, .jpg)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="*",
        default=(),
        metavar="JSON",
        help="files that --json wrote for other runs, to draw in the same picture",
    )
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Run the command."""
    run = run_from(args)
    dataset = run.open_data(args.data)
    split = dataset.splits[VALIDATION]
    masks = run.manifest.config.get("data", {}).get("mask_documents", False)
    exits, tokens = evaluate_exits(
        run.model,
        _windows(run, dataset.stream(VALIDATION), args.seq_len),
        bytes_per_token=split.text_bytes / split.tokens,
        max_tokens=args.max_tokens,
        bos_id=run.tokenizer.bos_id if masks else None,
    )
    rows = [
        [
            str(quality.l),
            str(quality.E),
            f"{quality.loss:.4f}",
            f"{quality.perplexity:.2f}",
            f"{quality.bits_per_byte:.4f}",
            f"{quality.accuracy:.1%}",
            f"{quality.agreement:.1%}",
            f"{quality.confidence:.1%}",
            f"{quality.calibration_error:.3f}",
        ]
        for quality in exits
    ]
    header = ["l", "E", "loss", "perplexity", "bits/byte", "accuracy", "agreement"]
    header += ["confidence", "ece"]
    print(f"{run.checkpoint}, step {run.manifest.step}, {tokens} tokens of {dataset.path}")
    print(format_table(header, rows))
    if args.plot is not None:
        curves = dict(_read_losses(path) for path in args.compare)
        curves[run.manifest.config["name"]] = [quality.loss for quality in exits]
        write_exit_plot(args.plot, curves)
    write_json(
        args.json,
        {
            "name": run.manifest.config["name"],
            "checkpoint": str(run.checkpoint),
            "step": run.manifest.step,
            "data": str(dataset.path),
            "tokens": tokens,
            "exits": [asdict(quality) for quality in exits],
        },
    )


def _windows(run: Run, stream: TokenStream, asked: int | None) -> Windows:
    """Cut a stream as in training, into windows of the asked length, or what there is of it."""
    longest = run.model.config.max_seq_len
    trained = run.manifest.config.get("data", {})
    seq_len = trained.get("seq_len", min(longest, 2048)) if asked is None else asked
    if not 1 <= seq_len <= longest:
        raise ValueError(f"seq_len: {seq_len}, give 1 to {longest}, the model's context")
    return open_windows(
        stream,
        trained.get("packing", "stream"),
        seq_len=min(seq_len, len(stream) - 1),
        bos_id=run.tokenizer.bos_id,
    )


def _read_losses(path: Path) -> tuple[str, list[float]]:
    """Return a run's name and its loss at every exit, out of what --json wrote."""
    try:
        content = json.loads(path.read_text())
        return content["name"], [quality["loss"] for quality in content["exits"]]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"compare: {path} is not what --json writes, evaluate again") from None


def main() -> None:
    """Enter from the command line."""
    run_command(build_parser(), evaluate)


if __name__ == "__main__":
    main()
