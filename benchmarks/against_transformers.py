"""The same weights decoded by skipstone and by transformers' `generate`, taking turns.

    PYTHONPATH=. python benchmarks/against_transformers.py --run outputs/recipe --E 4 --d 2
    PYTHONPATH=. python benchmarks/against_transformers.py --size 110m --E 3 --d 4

Greedy, batch 1, the prompt's time left out on neither side. Plain decoding is paired with plain
`generate`; self-speculation with `assistant_early_exit`, once as transformers drafts by default
(up to 20 tokens while the draft is confident) and once with the same number of drafted tokens.
`--size` has random weights: they cost what trained ones cost, but no draft is ever right.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from data.dataset import VALIDATION
from inference.engine.compiled import compile_layers
from inference.engine.generation import Generation
from inference.engine.strategy import Strategy
from inference.evaluation.prompts import held_out_prompts
from inference.evaluation.report import machine
from inference.loading.packed import can_pack, pack
from inference.loading.run import load_run
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.registry import describe, parse_strategy
from models.conversion.hugging_face import hugging_face_config, hugging_face_state
from models.llama import Llama
from models.sizes import SIZES

Decode = Callable[[list[int]], list[int]]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="run or checkpoint folder")
    parser.add_argument("--size", choices=[*SIZES], help="instead: random weights of this size")
    parser.add_argument("--E", type=int, required=True, help="layers that draft")
    parser.add_argument("--d", type=int, required=True, help="tokens drafted in a round")
    parser.add_argument("--strategy", help="our speculative strategy, if it is not E and d alone")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="compile our layers")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Llama, list[list[int]]]:
    """Return the model, not yet packed, and the prompts."""
    if args.run is not None:
        run = load_run(args.run, device="cpu", packed=False)
        stream = run.open_data(None).stream(VALIDATION)
        return run.model, held_out_prompts(stream, args.prompts, args.prompt_tokens)
    config = SIZES[args.size]
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu")
    model.init_weights(seed=0)
    draw = torch.Generator().manual_seed(0)
    shape = (args.prompts, args.prompt_tokens)
    prompts = torch.randint(config.vocab_size, shape, generator=draw).tolist()
    return model.eval().requires_grad_(False), prompts


def theirs(model: Llama, max_new_tokens: int) -> Callable[..., Decode]:
    """Return a function from further options of `generate` to a way to decode with it."""
    config = transformers.LlamaConfig(**hugging_face_config(model.config))
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(config)
    state = hugging_face_state({n: t.clone() for n, t in model.state_dict().items()})
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


def main() -> None:
    """Measure and print."""
    args = parse()
    if (args.run is None) == (args.size is None):
        raise SystemExit("error: give one of --run and --size")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model, prompts = load(args)
    generate = theirs(model, args.max_new_tokens)
    if can_pack(model):
        pack(model)
    if args.compile:
        compile_layers(model)
    text = args.strategy or f"self_speculative:E={args.E}:d={args.d}"
    speculative = parse_strategy(text)
    same_d = {
        "num_assistant_tokens": args.d,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    arms: dict[str, Decode] = {
        "skipstone autoregressive": ours(model, Autoregressive(), args.max_new_tokens),
        "transformers generate": generate(),
        f"skipstone {describe(speculative)}": ours(model, speculative, args.max_new_tokens),
        f"transformers assistant_early_exit={args.E}": generate(assistant_early_exit=args.E),
        f"transformers assistant_early_exit={args.E}, {args.d} drafted": generate(
            assistant_early_exit=args.E, **same_d
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    tokens: dict[str, list[list[int]]] = {}
    for decode in arms.values():
        decode(prompts[0])  # warm-up
    for _ in range(args.repeats):
        for name, decode in arms.items():
            start = time.perf_counter()
            tokens[name] = [decode(prompt) for prompt in prompts]
            seconds[name].append(time.perf_counter() - start)
    plain, count = tokens["transformers generate"], len(prompts) * args.max_new_tokens
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
    if args.json is not None:
        told = {key: str(value) for key, value in vars(args).items()}
        content = {"options": told, "model": asdict(model.config), "machine": machine()}
        content |= {"transformers": transformers.__version__, "arms": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
