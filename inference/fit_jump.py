"""Fit a linear map from every exit to the last layer: `python -m inference.fit_jump --run DIR`."""

import argparse
from dataclasses import asdict

from data.dataset import TRAIN, VALIDATION
from inference.cli.arguments import Parser, add_fit_arguments, run_command, run_from
from inference.cli.terminal import format_table, write_json
from inference.fitting.jump_fitting import fit_jump, measure_jump
from inference.fitting.traces import read_windows
from inference.loading.adapters import decode_folder
from inference.strategies.jump_maps import save_jump


def rank_of(text: str) -> int | None:
    """Read --rank.

    Raises:
        ArgumentTypeError: it is neither a whole number nor full.
    """
    if text != "full" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, give a whole number or full")
    return None if text == "full" else int(text)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "inference.fit_jump",
        description="Fit, for every exit, the linear map to the last layer's state (Jump to"
        " Conclusions), for the strategy jump and for the setting jump of calm, patience and gate,"
        " and keep it beside the checkpoint. Fitted to the training split, measured on the"
        " validation split.",
        example="--run outputs/demo --rank 32",
    )
    parser.add_argument(
        "--rank",
        type=rank_of,
        default="full",
        metavar="r|full",
        help="rank of the map less the identity: a map costs 2 r dim, full dim^2 weights",
    )
    parser.add_argument(
        "--ridge",
        type=float,
        default=1e-4,
        help="how much the maps are pulled to the identity, relative to the states' mean square",
    )
    parser.add_argument("--train_tokens", type=int, default=65_536, help="tokens to fit to")
    parser.add_argument("--test_tokens", type=int, default=8_192, help="tokens to measure on")
    add_fit_arguments(parser)
    return parser


def run_fit_jump(args: argparse.Namespace) -> None:
    """Run the command."""
    if not 0.0 <= args.ridge < float("inf"):
        raise ValueError(f"ridge: {args.ridge}, give a number, at least 0")
    run = run_from(args)
    dim, L = run.model.config.dim, run.model.config.n_layers
    if args.rank is not None and not 1 <= args.rank <= dim:
        raise ValueError(f"rank: {args.rank}, give 1 to {dim} for this model, or full")
    if L == 1:
        raise ValueError("run: this model has 1 layer, there is no exit to map from")
    dataset, seq_len = run.open_data(args.data), run.manifest.config["data"]["seq_len"]
    train = read_windows(dataset.stream(TRAIN), args.train_tokens, seq_len)
    test = read_windows(dataset.stream(VALIDATION), args.test_tokens, seq_len)
    jump = fit_jump(run.model, train, rank=args.rank, ridge=args.ridge)
    rank = "full" if args.rank is None else str(args.rank)
    path = args.output or decode_folder(run.checkpoint) / "jump.safetensors"
    save_jump(path, jump, run.model, {"rank": rank, "ridge": str(args.ridge)})
    found = measure_jump(run.model, jump, test)
    print(f"{run.checkpoint}: rank {rank}, {train.numel()} tokens fitted, {test.numel()} measured")
    header = "E r2_identity r2 agrees_identity agrees surprisal_identity surprisal"
    rows = [
        [str(f.E), f"{f.r2_identity:.3f}", f"{f.r2:.3f}"]
        + [f"{f.agreement_identity:.1%}", f"{f.agreement:.1%}"]
        + [f"{f.surprisal_identity:.3f}", f"{f.surprisal:.3f}"]
        for f in found
    ]
    print(format_table(header.split(), rows))
    print(
        "identity: the exit as it is. surprisal: nats, of what the last layer finds most probable"
    )
    print(f"wrote {path}: use jump:path={path}")
    content = {"rank": rank, "ridge": args.ridge, "path": str(path)}
    write_json(args.json, content | {"exits": [asdict(f) for f in found]})


def main() -> None:
    """Enter from the command line."""
    run_command(build_parser(), run_fit_jump)


if __name__ == "__main__":
    main()
