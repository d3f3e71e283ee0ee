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
from data.shards import TokenStream
from inference.calibration import bin_confidence, mean_confidence
from inference.cli import Parser, format_table, run_command, run_from, with_progress, write_json
from inference.plot import write_exit_plot
from inference.rule_quality import BINS, calibration_error
from inference.run import Run
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
    model: Llama, stream: TokenStream, *, bytes_per_token: float, max_tokens: int, seq_len: int
) -> tuple[list[ExitQuality], int]:
    """Measure every exit on windows spread evenly over a stream.

    Each token but a window's first is predicted from those before it in the window.

    Args:
        model: In eval mode.
        stream: Held-out tokens.
        bytes_per_token: Of the text behind the stream, for bits per byte.
        max_tokens: Tokens to predict, rounded down to whole windows, at least one.
        seq_len: Tokens per window; fewer if the stream is shorter.

    Returns:
        The exits, in ascending l, and the number of tokens predicted.

    Raises:
        ValueError: the stream has fewer than two tokens, or max_tokens is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}, give at least 1")
    if len(stream) < 2:
        raise ValueError(f"data: {len(stream)} held-out tokens, prepare a larger dataset")
    seq = min(seq_len, len(stream) - 1)
    starts = stream.spread(max(1, max_tokens // seq), seq)
    sums = torch.zeros(model.config.n_layers, 3, dtype=torch.float64, device="cpu")
    bins = torch.zeros(model.config.n_layers, BINS, 3, dtype=torch.float64, device="cpu")
    for first in with_progress(range(0, len(starts), _BATCH), "evaluating"):
        read = np.stack([stream.read(start, seq + 1) for start in starts[first : first + _BATCH]])
        tokens = torch.from_numpy(read).to(model.head_weight.device)
        more_sums, more_bins = _sums(model, tokens)
        sums += more_sums.cpu()
        bins += more_bins.cpu()
    means = (sums / (len(starts) * seq)).tolist()
    exits = [
        _quality(l, loss, accuracy, agreement, bins[l], bytes_per_token=bytes_per_token)
        for l, (loss, accuracy, agreement) in enumerate(means)
    ]
    return exits, len(starts) * seq


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


def _sums(model: Llama, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Add up loss, hits, agreements and confidence of every exit, in chunks of the logits.

    Args:
        model: In eval mode.
        tokens: (batch, seq + 1) int64.

    Returns:
        (n_layers, 3) fp64, and (n_layers, BINS, 3) fp64 of `bin_confidence`.
    """
    n_layers = model.config.n_layers
    _, exits = model.run_layers(
        model.embed(tokens[:, :-1]), 0, n_layers, exit_layers=range(n_layers)
    )
    sums = torch.zeros(n_layers, 3, dtype=torch.float64, device=tokens.device)
    bins = torch.zeros(n_layers, BINS, 3, dtype=torch.float64, device=tokens.device)
    chunks = [exits[l].flatten(0, 1).split(_LOGITS_ROWS) for l in range(n_layers)]
    for i, labels in enumerate(tokens[:, 1:].flatten().split(_LOGITS_ROWS)):
        last_choice = labels
        for l in reversed(range(n_layers)):
            logits = model.exit_logits(chunks[l][i]).float()
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
        help="tokens to predict, in windows spread over the split; rounded down to whole windows",
    )
    parser.add_argument(
        "--seq_len",
        type=int,
        help="tokens per window; as in training if not given, or 2048 where that is not known",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="draw the loss at every exit here (PNG)"
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
    exits, tokens = evaluate_exits(
        run.model,
        dataset.stream(VALIDATION),
        bytes_per_token=split.text_bytes / split.tokens,
        max_tokens=args.max_tokens,
        seq_len=_window(args.seq_len, run),
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


def _window(asked: int | None, run: Run) -> int:
    longest = run.model.config.max_seq_len
    trained: int = run.manifest.config.get("data", {}).get("seq_len", min(longest, 2048))
    seq_len = trained if asked is None else asked
    if not 1 <= seq_len <= longest:
        raise ValueError(f"seq_len: {seq_len}, give 1 to {longest}, the model's context")
    return seq_len


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
