"""The least depth any exit rule could do with: `python -m inference.oracle --run DIR`.

Along each greedy continuation every exit's most probable token is recorded. A rule that leaves a
token only where its exit says what the last layer says cannot leave before the oracle does.
"""

import argparse
from dataclasses import asdict

from inference.cli.arguments import Parser, run_command, run_from
from inference.cli.terminal import format_table, write_json
from inference.evaluation.greedy_traces import find_oracle, record_continuations, speed_model
from inference.evaluation.prompts import add_prompt_arguments, prompts_from


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "inference.oracle",
        description="The least number of layers, by token and by sequence, that gives what all of"
        " them give, along greedy continuations: the ceiling of every exit rule.",
        example="--run outputs/demo --prompts 16",
    )
    parser.add_argument("--lanes", type=int, default=4, help="tokens in flight, for SPEED's model")
    add_prompt_arguments(parser)
    return parser


def oracle(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.lanes < 1:
        raise ValueError(f"lanes: {args.lanes}, give at least 1")
    run = run_from(args)
    prompts = prompts_from(run, args)
    _, traces = record_continuations(
        run.model, prompts, max_new_tokens=args.max_new_tokens, batch_size=8
    )
    found, L = find_oracle(traces), run.model.config.n_layers
    rows = []
    for E in range(1, L + 1):
        kept, flushed = speed_model(traces, E, args.lanes)
        rows.append(
            [str(E), f"{found.agreement[E - 1]:.1%}"]
            + [f"{found.least_depth.get(E, 0) / found.tokens:.1%}"]
            + [f"{found.settled_depth.get(E, 0) / found.tokens:.1%}"]
            + [str(found.sequences.count(E)), f"{kept:.2f}", f"{flushed:.1%}"]
        )
    print(f"{run.checkpoint}: {found.tokens} tokens of {len(traces)} greedy continuations")
    print(
        format_table(["E", "agrees", "least", "settled", "sequences", "in_flight", "flushed"], rows)
    )
    print(f"mean layers: {found.mean_least:.2f} least, {found.mean_settled:.2f} settled, of {L}")
    print(f"in_flight, flushed: a model of SPEED with {args.lanes} lanes, not its decoding")
    write_json(args.json, asdict(found))


def main() -> None:
    """Enter from the command line."""
    run_command(build_parser(), oracle)


if __name__ == "__main__":
    main()
