"""The same weights decoded by skipstone and by other engines, taking turns.

    PYTHONPATH=. python benchmarks/against_engines.py --run outputs/recipe --E 4 --d 2
    PYTHONPATH=. python benchmarks/against_engines.py --size 110m --E 3 --d 4

Greedy, float32, batch 1, the prompt's time left out on no side. Beside transformers' `generate` and
its `assistant_early_exit` (once as it drafts by default, up to 20 tokens while the draft is
confident, and once with the same number of drafted tokens): ctranslate2 where it is installed, and
the official LayerSkip generator where `--layerskip` names a clone of it. `--size` has random
weights: they cost what trained ones cost, but no draft is ever right.
"""

import statistics
import time
import warnings
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec

import torch
import transformers
import tyro

from benchmarks.other_engines import (
    Decode,
    by_ctranslate2,
    by_layerskip,
    by_transformers,
    transformers_twin,
)
from benchmarks.results import median_ratio, write_beside
from data.command_line import run_command
from data.dataset import VALIDATION
from data.suggestion import suggest
from inference.cli.arguments import Count, Folder, OutputFile
from inference.engine.compiled import compile_layers
from inference.engine.fused import fuse
from inference.engine.generation import Generation
from inference.engine.products import can_pack, pack
from inference.engine.strategy import Strategy
from inference.evaluation.prompts import held_out_prompts
from inference.loading.machine import machine
from inference.loading.run import load_run
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.registry import describe, parse_strategy
from models.llama import Llama
from models.sizes import SIZES

PLAIN = "skipstone autoregressive"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Decode the same weights with skipstone and with other engines, taking turns."""

    run: Folder | None = None
    """Run or checkpoint folder."""
    size: str | None = None
    """Instead: random weights of this size."""
    E: int
    """Layers that draft."""
    d: int
    """Tokens drafted in a round."""
    strategy: str | None = None
    """Our speculative strategy, if it is not E and d alone."""
    prompts: Count = 4
    """Number of prompts."""
    prompt_tokens: Count = 64
    """Tokens of each."""
    max_new_tokens: Count = 128
    """Tokens to add to each."""
    repeats: Count = 5
    """Times everything is measured."""
    threads: int = field(default_factory=torch.get_num_threads)
    """Threads of torch."""
    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile our layers."""
    batches: tuple[Count, ...] = (4, 8)
    """Sizes of batches that our plain decoding is measured with as well."""
    layerskip: Folder | None = None
    """A clone of facebookresearch/LayerSkip, the official generator."""
    json: OutputFile | None = None
    """Also write the results to this file, beside those of other models."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.size is None):
            raise ValueError("run, size: give one of them")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"size: {self.size}, {suggest(self.size, [*SIZES])}")


def load(options: Options) -> tuple[Llama, list[list[int]]]:
    """Return the model, not yet packed, and the prompts."""
    if options.run is not None:
        run = load_run(options.run, device="cpu", packed=False)
        stream = run.open_data(None).stream(VALIDATION)
        return run.model, held_out_prompts(stream, options.prompts, options.prompt_tokens)
    config = SIZES[options.size or ""]
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu")
    model.init_weights(seed=0)
    draw = torch.Generator().manual_seed(0)
    shape = (options.prompts, options.prompt_tokens)
    prompts = torch.randint(config.vocab_size, shape, generator=draw).tolist()
    return model.eval().requires_grad_(False), prompts


def ours(model: Llama, strategy: Strategy, max_new_tokens: int, rows: int = 1) -> Decode:
    """Return our way to decode with a strategy; with more rows, the tokens of the first."""

    def decode(prompt: list[int]) -> list[int]:
        generation = Generation(model, [prompt] * rows, strategy, max_new_tokens=max_new_tokens)
        return generation.finish().tokens[0]

    return decode


def make_arms(options: Options, model: Llama) -> dict[str, Decode]:
    """Return every way to decode; the model is fused and packed on the way."""
    n, twin = options.max_new_tokens, transformers_twin(model)
    fuse(model, compiled=options.compile)
    if can_pack(model):
        pack(model)
    if options.compile:
        compile_layers(model)
    text = options.strategy or f"self_speculative:E={options.E}:d={options.d}"
    speculative = parse_strategy(text)
    early = f"transformers assistant_early_exit={options.E}"
    arms: dict[str, Decode] = {
        PLAIN: ours(model, Autoregressive(), n),
        "transformers generate": by_transformers(twin, n),
        f"skipstone {describe(speculative)}": ours(model, speculative, n),
        early: by_transformers(twin, n, assistant_early_exit=options.E),
        f"{early}, {options.d} drafted": by_transformers(
            twin, n, assistant_early_exit=options.E, drafted=options.d
        ),
    }
    if find_spec("ctranslate2") is None:
        print("ctranslate2 is not installed and left out, pip install ctranslate2")
    else:
        arms["ctranslate2"] = by_ctranslate2(twin, n)
    if options.layerskip is not None:
        arms |= by_layerskip(options.layerskip, twin, n, E=options.E, d=options.d)
    for rows in options.batches:
        arms[f"{PLAIN}, batch {rows}"] = ours(model, Autoregressive(), n, rows)
    return arms


def compare(options: Options) -> None:
    """Measure and print."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model, prompts = load(options)
    arms = make_arms(options, model)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    tokens: dict[str, list[list[int]]] = {}
    for decode in arms.values():
        decode(prompts[0])  # warm-up
    for _ in range(options.repeats):
        for name, decode in arms.items():
            start = time.perf_counter()
            tokens[name] = [decode(prompt) for prompt in prompts]
            seconds[name].append(time.perf_counter() - start)
    count = len(prompts) * options.max_new_tokens
    rows = {}
    for name, times in seconds.items():
        batch = int(name.rpartition("batch ")[2]) if "batch" in name else 1
        rows[name] = {
            "tokens_per_second": batch * count / statistics.median(times),
            "seconds_over_plain_skipstone": median_ratio(times, seconds[PLAIN]),
            "seconds": times,
            "same_tokens": tokens[name] == tokens[PLAIN],
        }
        speed, same = rows[name]["tokens_per_second"], rows[name]["same_tokens"]
        print(f"{name:56} {speed:8.1f} tokens/s  same tokens: {same}")
    given = {key: str(value) for key, value in asdict(options).items() if key != "json"}
    if options.layerskip is not None:
        given["layerskip"] = options.layerskip.name
    content: dict[str, object] = {
        "options": given,
        "model": asdict(model.config),
        "machine": machine(),
        "transformers": transformers.__version__,
        "arms": rows,
    }
    name = options.size if options.run is None else options.run.name
    write_beside(options.json, name or "", content)


if __name__ == "__main__":
    run_command(Options, compare, prog="python benchmarks/against_engines.py")
