"""Fit a linear map from every exit to the last layer: `python -m inference.fit_jump --run DIR`."""

from dataclasses import asdict, dataclass
from typing import Annotated

from data.command_line import run_command
from data.dataset import TRAIN, VALIDATION
from data.option_values import read_as
from inference.cli.arguments import Count, FitOptions
from inference.cli.terminal import format_table, write_json
from inference.fitting.jump_fitting import fit_jump, measure_jump
from inference.fitting.traces import read_windows
from inference.loading.adapters import decode_folder
from inference.strategies.jump_maps import save_jump


def _rank(text: str) -> int | None:
    if text != "full" and not text.isdecimal():
        raise ValueError(f"{text}, give a whole number or full")
    return None if text == "full" else int(text)


@dataclass(frozen=True, kw_only=True)
class FitJumpOptions(FitOptions):
    """Fit, for every exit, the linear map to the last layer's state (Jump to Conclusions).

    It is for the strategy jump and for the setting jump of calm, patience and gate. Fitted to the
    training split, measured on the validation split, kept beside the checkpoint.

    Example:
      python -m inference.fit_jump --run outputs/demo --rank 32
    """

    rank: Annotated[int | None, read_as("R|full", _rank, lambda rank: str(rank or "full"))] = None
    """Rank of the map less the identity: a map costs 2 r dim, full dim^2 weights."""
    ridge: float = 1e-4
    """How much the maps are pulled to the identity, relative to the states' mean square."""
    train_tokens: Count = 65_536
    """Tokens to fit to."""
    test_tokens: Count = 8_192
    """Tokens to measure on."""


def run_fit_jump(options: FitJumpOptions) -> None:
    """Fit and measure the maps; print the quality of each, and write them."""
    if not 0.0 <= options.ridge < float("inf"):
        raise ValueError(f"ridge: {options.ridge}, give a number, at least 0")
    run = options.open_run()
    dim, L = run.model.config.dim, run.model.config.n_layers
    if options.rank is not None and not 1 <= options.rank <= dim:
        raise ValueError(f"rank: {options.rank}, give 1 to {dim} for this model, or full")
    if L == 1:
        raise ValueError("run: this model has 1 layer and no exit to map from, give a deeper one")
    dataset, seq_len = run.open_data(options.data), run.seq_len
    train = read_windows(dataset.stream(TRAIN), options.train_tokens, seq_len)
    test = read_windows(dataset.stream(VALIDATION), options.test_tokens, seq_len)
    jump = fit_jump(run.model, train, rank=options.rank, ridge=options.ridge)
    rank = "full" if options.rank is None else str(options.rank)
    path = options.output or decode_folder(run.checkpoint) / "jump.safetensors"
    save_jump(path, jump, run.model, {"rank": rank, "ridge": str(options.ridge)})
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
    content = {"rank": rank, "ridge": options.ridge, "path": str(path)}
    write_json(options.json, content | {"exits": [asdict(f) for f in found]})


def main() -> None:
    run_command(FitJumpOptions, run_fit_jump, prog="python -m inference.fit_jump")


if __name__ == "__main__":
    main()
