"""The same weights decoded by skipstone and by transformers' `generate`, taking turns.

    PYTHONPATH=. python benchmarks/against_transformers.py --run outputs/recipe --E 4 --d 2
    PYTHONPATH=. python benchmarks/against_transformers.py --size 110m --E 3 --d 4

Greedy, batch 1, the prompt's time left out on neither side. Plain decoding is paired with plain
`generate`; self-speculation with `assistant_early_exit`, once as transformers drafts by default
(up to 20 tokens while the draft is confident) and once with the same number of drafted tokens.
`--size` has random weights: they cost what trained ones cost, but no draft is ever right.
"""

import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import transformers
import tyro

from data.command_line import run_command
from data.dataset import VALIDATION
from data.suggestion import suggest
from inference.cli.arguments import Count, Folder, OutputFile
from inference.engine.compiled import compile_layers
from inference.engine.generation import Generation
from inference.engine.products import can_pack, pack
from inference.engine.strategy import Strategy
from inference.evaluation.prompts import held_out_prompts
from inference.loading.machine import machine
from inference.loading.run import load_run
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.registry import describe, parse_strategy
from models.conversion.hugging_face import hugging_face_config, hugging_face_state
from models.llama import Llama
from models.sizes import SIZES

Decode = Callable[[list[int]], list[int]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Decode the same weights with skipstone and with transformers' `generate`, taking turns."""

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
    json: OutputFile | None = None
    """Also write the results here."""

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


def theirs(model: Llama, max_new_tokens: int) -> Callable[..., Decode]:
    """Return a function from further options of `generate` to a way to decode with it."""
    config = transformers.AutoConfig.for_model(**hugging_face_config(model.config))
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(config)
    state = hugging_face_state({n: t.clone() for n, t in model.state_dict().items()}, model.config)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    twin.load_state_dict(state, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config)
    twin.eval()

    def with_options(**options: object) -> Decode:
        def decode(prompt: list[int]) -> list[int]:
            tokens = torch.tensor([prompt])
            out = twin.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
                **options,
            )
            found: list[int] = out[0, len(prompt) :].tolist()
            return found

        return decode

    return with_options


def ours(model: Llama, strategy: Strategy, max_new_tokens: int) -> Decode:
    """Return our way to decode with a strategy."""

    def decode(prompt: list[int]) -> list[int]:
        generation = Generation(model, [prompt], strategy, max_new_tokens=max_new_tokens)
        return generation.finish().tokens[0]

    return decode


def compare(options: Options) -> None:
    """Measure and print."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model, prompts = load(options)
    generate = theirs(model, options.max_new_tokens)
    if can_pack(model):
        pack(model)
    if options.compile:
        compile_layers(model)
    text = options.strategy or f"self_speculative:E={options.E}:d={options.d}"
    speculative = parse_strategy(text)
    same_d = {
        "num_assistant_tokens": options.d,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    arms: dict[str, Decode] = {
        "skipstone autoregressive": ours(model, Autoregressive(), options.max_new_tokens),
        "transformers generate": generate(),
        f"skipstone {describe(speculative)}": ours(model, speculative, options.max_new_tokens),
        f"transformers assistant_early_exit={options.E}": generate(assistant_early_exit=options.E),
        f"transformers assistant_early_exit={options.E}, {options.d} drafted": generate(
            assistant_early_exit=options.E, **same_d
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    tokens: dict[str, list[list[int]]] = {}
    for decode in arms.values():
        decode(prompts[0])  # warm-up
    for _ in range(options.repeats):
        for name, decode in arms.items():
            start = time.perf_counter()
            tokens[name] = [decode(prompt) for prompt in prompts]
            seconds[name].append(time.perf_counter() - start)
    plain, count = tokens["transformers generate"], len(prompts) * options.max_new_tokens
    rows = [
        {
            "arm": name,
            "tokens_per_second": count / statistics.median(times),
            "over_transformers_generate": statistics.median(
                b / a for a, b in zip(times, seconds["transformers generate"], strict=True)
            ),
            "all_seconds": times,
            "same_tokens": tokens[name] == plain,
        }
        for name, times in seconds.items()
    ]
    for row in rows:
        print(
            f"{row['arm']:52} {row['tokens_per_second']:8.1f} tokens/s "
            f"{row['over_transformers_generate']:6.2f}x  same tokens: {row['same_tokens']}"
        )
    if options.json is not None:
        given = {key: str(value) for key, value in asdict(options).items()}
        content: dict[str, object] = {
            "options": given,
            "model": asdict(model.config),
            "machine": machine(),
        }
        content |= {"transformers": transformers.__version__, "arms": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_command(Options, compare, prog="python benchmarks/against_transformers.py")
