"""Quality of every exit on held-out text: `python -m inference.evaluate --run DIR`.

The exit after layer l runs E = l + 1 layers; l counts from 0.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from data.dataset import VALIDATION
from data.shards import TokenStream
from data.windows import Windows, open_windows
from inference.cli.arguments import Parser, picture_file, run_command, run_from
from inference.cli.terminal import format_table, write_json
from inference.evaluation.exit_quality import evaluate_exits
from inference.evaluation.plot import write_exit_plot
from inference.evaluation.rule_quality import BINS
from inference.loading.run import Run


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
