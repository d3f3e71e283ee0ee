"""Fit a gate to a frozen model: `python -m inference.train_gate --run DIR --form linear`.

The gate is fitted to the training split, and measured on the validation split beside the softmax
gap, which needs no training, and static exit, which needs no confidence.
"""

from dataclasses import asdict, dataclass

from torch import Tensor

from data.command_line import run_command
from data.dataset import TRAIN, VALIDATION
from inference.cli.arguments import Count, FitOptions, Seed
from inference.cli.terminal import format_table, write_json
from inference.evaluation.calibration import bin_scores, calibration_error
from inference.evaluation.rule_quality import (
    agreement_at_depth,
    area_under_roc,
    best_agreement,
    curve,
)
from inference.fitting.gate_training import all_scores, fit_gate
from inference.fitting.traces import Trace, read_windows, record
from inference.loading.adapters import decode_folder
from inference.strategies.gate_classifiers import Form, save_gate
from inference.strategies.row_exits import exit_problems, exits_from

LEGEND = """
Agreement with the last layer at equal mean depth E; keys and values are those of all layers.
static   exit after E layers
gap      exit where the softmax gap reaches a threshold; costs a head at every exit
gate     exit where the gate's score reaches a threshold
oracle   the most that any choice of exits reaches
AUROC and ECE are those of a score as the probability that an exit is right; a score of halting and
geometric is the chance to stop at an exit if not before."""


@dataclass(frozen=True, kw_only=True)
class AtDepth:
    """Agreement with the last layer at one mean depth."""

    E: int
    """Mean depth, and static exit's layers."""
    static: float
    gap: float
    gate: float
    oracle: float


def compare(trace: Trace, scores: Tensor, n_layers: int) -> list[AtDepth]:
    """Compare a gate's scores, (exits, tokens), with the rules that need none."""
    exits, agrees = trace.exits, trace.agrees
    by_gap = curve(trace.gap, agrees, exits, n_layers)
    by_gate = curve(scores, agrees, exits, n_layers)
    return [
        AtDepth(
            E=E,
            static=agrees[n].double().mean().item(),
            gap=agreement_at_depth(by_gap, E),
            gate=agreement_at_depth(by_gate, E),
            oracle=best_agreement(agrees, exits, n_layers, E),
        )
        for n, E in enumerate(exits)
    ]


@dataclass(frozen=True, kw_only=True)
class TrainGateOptions(FitOptions):
    """Fit a classifier of hidden states that decides whether a token may exit.

    It is for the strategies gate and calm:confidence=gate, and is kept beside the checkpoint.

    Example:
      python -m inference.train_gate --run outputs/demo --form linear
    """

    form: Form
    """Kind of gate."""
    first: int = 1
    """Layers before the first exit."""
    interval: int = 1
    """Layers from one exit to the next."""
    train_tokens: Count = 16_384
    """Tokens of the training split to learn from; each takes dim numbers an exit in memory."""
    test_tokens: Count = 8_192
    """Tokens of the validation split to measure on."""
    epochs: Count = 20
    """Passes over the tokens."""
    hidden: Count = 64
    """Units of mlp's hidden layer."""
    seed: Seed = 0
    """Seed of weights and order."""


def train_gate(options: TrainGateOptions) -> None:
    """Fit and measure a gate; print its quality, and write it."""
    run = options.open_run()
    model, L = run.model, run.model.config.n_layers
    problems = exit_problems(options.first, options.interval, L)
    if not problems and options.first == L:
        problems = [
            f"first: {options.first}, a gate needs an exit before the last of {L} layers, "
            + ("give a deeper run" if L == 1 else f"give at most {L - 1}")
        ]
    if problems:
        raise ValueError("; ".join(problems))
    exits = exits_from(options.first, options.interval, L)
    dataset, seq_len = run.open_data(options.data), run.seq_len
    train = read_windows(dataset.stream(TRAIN), options.train_tokens, seq_len)
    test = read_windows(dataset.stream(VALIDATION), options.test_tokens, seq_len)
    gate = fit_gate(
        record(model, train, exits, "training tokens"),
        options.form,
        epochs=options.epochs,
        hidden=options.hidden,
        seed=options.seed,
    )
    path = options.output or decode_folder(run.checkpoint) / f"gate_{options.form}.safetensors"
    save_gate(path, gate, model)
    trace = record(model, test, exits, "validation tokens")
    scores = all_scores(gate, trace.states)
    found = compare(trace, scores, L)
    quality = {
        name: {
            "auroc": area_under_roc(s, trace.agrees),
            "ece": calibration_error(bin_scores(s, trace.agrees)),
        }
        for name, s in (("gap", trace.gap), ("gate", scores))
    }
    print(
        f"{run.checkpoint}: {options.form}, {train.numel()} tokens fitted, {test.numel()} measured"
    )
    rows = [
        [str(f.E), *(f"{share:.1%}" for share in (f.static, f.gap, f.gate, f.oracle))]
        for f in found
    ]
    print(format_table(["E", "static", "gap", "gate", "oracle"], rows))
    print(LEGEND)
    for name, measures in quality.items():
        print(f"{name}: AUROC {measures['auroc']:.3f}, ECE {measures['ece']:.3f}")
    print(f"wrote {path}: use gate:path={path}")
    content = {"form": options.form, "path": str(path), "quality": quality}
    write_json(options.json, content | {"depths": [asdict(f) for f in found]})


def main() -> None:
    run_command(TrainGateOptions, train_gate, prog="python -m inference.train_gate")


if __name__ == "__main__":
    main()
