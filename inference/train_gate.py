"""Fit a gate to a frozen model: `python -m inference.train_gate --run DIR --form linear`.

The gate learns from the training split, and is judged on the validation split beside the softmax
gap, which needs no training, and static exit, which needs no confidence.
"""

import argparse
from dataclasses import asdict, dataclass

from torch import Tensor

from data.dataset import TRAIN, VALIDATION
from inference.cli.arguments import Parser, add_fit_arguments, run_command, run_from, seed_number
from inference.cli.terminal import format_table, write_json
from inference.evaluation.rule_quality import (
    agreement_at_depth,
    area_under_roc,
    best_agreement,
    bin_scores,
    calibration_error,
    curve,
)
from inference.fitting.gate_training import all_scores, fit_gate
from inference.fitting.traces import Trace, read_windows, record
from inference.loading.adapters import decode_folder
from inference.strategies.gate_classifiers import FORMS, save_gate
from inference.strategies.row_exits import exit_problems, exits_from

LEGEND = """
Agreement with the last layer at equal mean depth: of static exit after E layers, of the softmax gap
(which pays for a head at every exit), of the gate, and the most any choice could have. Every token
was read with all layers behind the keys it saw. AUROC and ECE: of a score as the probability that
an exit is right; what halting and geometric give is the chance to stop if not stopped before."""


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


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "inference.train_gate",
        description="Fit a classifier that says from a hidden state whether a token may leave, for"
        " the strategies gate and calm:confidence=gate, and keep it beside the checkpoint.",
        example="--run outputs/demo --form linear",
    )
    parser.add_argument("--form", choices=FORMS, required=True, help="kind of gate")
    parser.add_argument("--first", type=int, default=1, help="layers before the first exit")
    parser.add_argument("--interval", type=int, default=1, help="layers from one exit to the next")
    parser.add_argument(
        "--train_tokens",
        type=int,
        default=16_384,
        help="tokens of the training split to learn from; each takes dim numbers an exit in memory",
    )
    parser.add_argument(
        "--test_tokens", type=int, default=8_192, help="tokens of the validation split to judge by"
    )
    parser.add_argument("--epochs", type=int, default=20, help="times each token is looked at")
    parser.add_argument("--hidden", type=int, default=64, help="units of mlp's hidden layer")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of weights and order")
    add_fit_arguments(parser)
    return parser


def train_gate(args: argparse.Namespace) -> None:
    """Run the command."""
    for name in ("epochs", "hidden", "train_tokens", "test_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: {getattr(args, name)}, give at least 1")
    run = run_from(args)
    model, L = run.model, run.model.config.n_layers
    problems = exit_problems(args.first, args.interval, L)
    if not problems and args.first == L:
        problems = [f"first: {args.first}, a gate needs an exit before the last layer"]
    if problems:
        raise ValueError("; ".join(problems))
    exits = exits_from(args.first, args.interval, L)
    dataset, seq_len = run.open_data(args.data), run.manifest.config["data"]["seq_len"]
    train = read_windows(dataset.stream(TRAIN), args.train_tokens, seq_len)
    test = read_windows(dataset.stream(VALIDATION), args.test_tokens, seq_len)
    gate = fit_gate(
        record(model, train, exits, "reading what to learn from"),
        args.form,
        epochs=args.epochs,
        hidden=args.hidden,
        seed=args.seed,
    )
    path = args.output or decode_folder(run.checkpoint) / f"gate_{args.form}.safetensors"
    save_gate(path, gate, model)
    trace = record(model, test, exits, "reading what to judge by")
    scores = all_scores(gate, trace.states)
    found = compare(trace, scores, L)
    quality = {
        name: {
            "auroc": area_under_roc(s, trace.agrees),
            "ece": calibration_error(bin_scores(s, trace.agrees)),
        }
        for name, s in (("gap", trace.gap), ("gate", scores))
    }
    print(f"{run.checkpoint}: {args.form}, {train.numel()} tokens learnt, {test.numel()} judged")
    rows = [
        [str(f.E), *(f"{share:.1%}" for share in (f.static, f.gap, f.gate, f.oracle))]
        for f in found
    ]
    print(format_table(["E", "static", "gap", "gate", "oracle"], rows))
    print(LEGEND)
    for name, measures in quality.items():
        print(f"{name}: AUROC {measures['auroc']:.3f}, ECE {measures['ece']:.3f}")
    print(f"wrote {path}: use gate:path={path}")
    content = {"form": args.form, "path": str(path), "quality": quality}
    write_json(args.json, content | {"depths": [asdict(f) for f in found]})


def main() -> None:
    """Enter from the command line."""
    run_command(build_parser(), train_gate)


if __name__ == "__main__":
    main()
