"""The least depth that any exit rule can reach: `python -m inference.oracle --run DIR`.

Along each greedy continuation every exit's most probable token is recorded. A rule that exits only
where the exit predicts the last layer's token cannot exit before the oracle does.
"""

from dataclasses import asdict, dataclass

from data.command_line import run_command
from inference.cli.arguments import Count, RunOptions
from inference.cli.terminal import format_table, write_json
from inference.evaluation.exit_traces import record_continuations
from inference.evaluation.oracle import find_oracle, speed_model
from inference.evaluation.prompts import PromptOptions, prompts_from


@dataclass(frozen=True, kw_only=True)
class OracleOptions(PromptOptions, RunOptions):
    """Find the least number of layers, by token and by sequence, that predict what all of them do.

    It is measured along greedy continuations, and is the ceiling of every exit rule.

    Columns:
      E            layers run before the exit
      agrees       tokens where the exit predicts the last layer's token
      least        tokens by the least E that agrees
      settled      tokens by the least E from which on all exits agree
      sequences    continuations by the least E that agrees at every token
      in_flight    tokens kept, flushed: bursts flushed, by a model of SPEED

    Example:
      python -m inference.oracle --run outputs/demo --prompts 16
    """

    lanes: Count = 4
    """Tokens in flight, for SPEED's model."""


def oracle(options: OracleOptions) -> None:
    """Record what the exits predict; print and write what that allows."""
    run = options.open_run()
    prompts = prompts_from(run, options)
    traces = record_continuations(
        run.model,
        prompts,
        max_new_tokens=options.max_new_tokens,
        batch_size=8,
        stop_tokens=options.stop_tokens(run),
    )
    found, L = find_oracle(traces), run.model.config.n_layers
    rows = []
    for E in range(1, L + 1):
        kept, flushed = speed_model(traces, E, options.lanes)
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
    print(f"in_flight, flushed: a model of SPEED with {options.lanes} lanes, not its decoding")
    write_json(options.json, asdict(found))


def main() -> None:
    run_command(OracleOptions, oracle, prog="python -m inference.oracle")


if __name__ == "__main__":
    main()
