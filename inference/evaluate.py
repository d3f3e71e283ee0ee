"""Quality of every exit on held-out text: `python -m inference.evaluate --run DIR`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.command_line import run_command
from data.foreign_json import read_object, take
from inference.cli.arguments import Folder, PictureFile, RunOptions
from inference.cli.terminal import format_table, write_json
from inference.evaluation.exit_quality import evaluate_run
from inference.evaluation.plot import write_exit_plot
from inference.loading.machine import machine


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """Measure every exit on the validation split.

    Columns:
      E            layers run before the exit
      loss         nats per token
      agreement    positions where the exit's most probable token is the last layer's
      confidence   mean probability of that token
      ece          expected calibration error over 15 bins: confidence against accuracy

    Example:
      python -m inference.evaluate --run outputs/demo --max_tokens 50000
    """

    data: Folder | None = None
    """Dataset; the one trained on if not given."""
    max_tokens: int = 50_000
    """Tokens to read, in windows spread over the split; rounded down to whole windows."""
    seq_len: int | None = None
    """Tokens per window; as in training if not given, or 2048 where that is not known."""
    plot: PictureFile | None = None
    """Draw the loss at every exit here (.png, .svg, .pdf, .jpg)."""
    compare: tuple[Path, ...] = ()
    """Files that --json wrote for other runs, to draw in the same picture."""


def evaluate(options: EvaluateOptions) -> None:
    """Measure the exits; print, write and draw what was measured."""
    if options.compare and options.plot is None:
        raise ValueError("compare: it is drawn beside this run, give --plot too")
    curves = dict(_read_losses(path) for path in options.compare)
    run = options.open_run()
    dataset = run.open_data(options.data)
    exits, tokens = evaluate_run(
        run, dataset, max_tokens=options.max_tokens, seq_len=options.seq_len
    )
    header = "E loss perplexity bits/byte accuracy agreement confidence ece"
    rows = [
        [str(q.E), f"{q.loss:.4f}", f"{q.perplexity:.2f}", f"{q.bits_per_byte:.4f}"]
        + [f"{q.accuracy:.1%}", f"{q.agreement:.1%}", f"{q.confidence:.1%}"]
        + [f"{q.calibration_error:.3f}"]
        for q in exits
    ]
    print(f"{run.checkpoint}, step {run.manifest.step}, {tokens} tokens of {dataset.path}")
    print(format_table(header.split(), rows))
    name = run.manifest.setting("name", str, run.checkpoint.name)
    if options.plot is not None:
        curves[name] = [quality.loss for quality in exits]
        write_exit_plot(options.plot, curves)
    write_json(
        options.json,
        {
            "name": name,
            "checkpoint": str(run.checkpoint),
            "step": run.manifest.step,
            "data": str(dataset.path),
            "tokens": tokens,
            "machine": machine(),
            "exits": [asdict(quality) for quality in exits],
        },
    )


def _read_losses(path: Path) -> tuple[str, list[float]]:
    """Return a run's name and its loss at every exit, out of what --json wrote."""
    try:
        content = read_object(path)
        exits = take(content, "exits", list[dict[str, Any]])
        return take(content, "name", str), [take(quality, "loss", float) for quality in exits]
    except OSError as error:
        raise ValueError(
            f"compare: {path} cannot be read ({error.strerror}), give another path"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"compare: {path} is not what --json writes ({error}), evaluate again"
        ) from None


def main() -> None:
    run_command(EvaluateOptions, evaluate, prog="python -m inference.evaluate")


if __name__ == "__main__":
    main()
