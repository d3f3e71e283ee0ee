"""Decoding speed on a GPU as a share of its memory bandwidth and of the bound.

    PYTHONPATH=. python benchmarks/decoding_on_gpu.py --size 110m --E 3 --d 2,4 --json 110m.json
    PYTHONPATH=. python benchmarks/decoding_on_gpu.py --size layerskip_1.5b --E 6 --d 2,4

Autoregressive and self-speculative decoding, greedy, layers compiled, rounds as graphs. Weights are
random: they cost what trained ones cost. So that drafts are right now and then, what the layers
from the first E on add is made small by --later.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from data.command_line import run_command
from data.suggestion import suggest
from inference.cli.arguments import Count, Counts, OutputFile
from inference.engine.compiled import compile_layers
from inference.engine.cuda_graphs import round_graphs
from inference.engine.generation import wait_for
from inference.engine.sampling import Sampling
from inference.evaluation.candidates import expand_arms
from inference.evaluation.measurement import ArmResult, Workload, measure
from inference.evaluation.report import LEGEND, table
from inference.loading.machine import machine
from inference.loading.run import DTYPES
from models.config import LlamaConfig
from models.flops import block_params
from models.llama import Llama
from models.sizes import SIZES


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure decoding speed as a share of memory bandwidth and of the bound."""

    size: str
    """Model size, see models/sizes.py."""
    E: Counts
    """Layers that draft, each in turn."""
    d: Counts
    """Tokens drafted, each in turn."""
    batch_size: Count = 1
    """Prompts decoded at once."""
    prompt_tokens: Count = 64
    """Tokens of each prompt."""
    max_new_tokens: Count = 512
    """Tokens to add to each."""
    repeats: Count = 5
    """Times everything is measured."""
    later: float = 0.1
    """Factor of what the layers from the first E on add; 1 leaves them as drawn."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of weights and KV cache."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: to see that this file works."""
    json: OutputFile | None = None
    """Also write the results here."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size: {self.size}, {suggest(self.size, [*SIZES])}")


def build(options: Options, first_exit: int) -> Llama:
    """Return the model."""
    with torch.device("meta"):
        model = Llama(SIZES[options.size])
    model.to_empty(device=options.device)
    model.init_weights(seed=0)
    for l in range(first_exit, model.config.n_layers):
        for linear in (model.block(l).attention.wo, model.block(l).feed_forward.w2):
            linear.weight.data.mul_(options.later)
    return model.to(DTYPES[options.dtype]).eval().requires_grad_(False)


def bandwidth(device: torch.device, size: int, repeats: int = 20) -> float:
    """Return the bytes per second that a copy of `size` bytes reads and writes, at the median."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(repeats + 3):
        wait_for(device)
        start = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds[3:])


def bytes_per_token(
    config: LlamaConfig, arm: ArmResult, *, context: float, element_size: int
) -> float:
    """Return what must be read for one new token: weights once a pass, and keys and values.

    A round of d drafts reads d (E layers + head) + L layers + head, for all rows of a batch.

    Args:
        config: The model.
        arm: What was measured.
        context: Mean length of a row.
        element_size: Bytes of a weight.
    """
    keys_and_values = 2 * config.n_kv_heads * config.head_width * context * arm.batch_size
    layer, head = block_params(config) + keys_and_values, config.vocab_size * config.dim
    drafts = (arm.d or 0) * ((arm.E or 0) * layer + head)
    tokens = (arm.tokens_per_verify or 1.0) * arm.batch_size
    return element_size * (drafts + config.n_layers * layer + head) / tokens


def decode(options: Options) -> None:
    """Measure and print."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, this machine has no CUDA device")
    device, config = torch.device(options.device), SIZES[options.size]
    arms = expand_arms(["self_speculative"], options.E, options.d, config.n_layers)
    model = build(options, min(options.E))
    on_gpu = device.type == "cuda"
    if on_gpu:
        compile_layers(model)
    draw = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.prompt_tokens)
    workload = Workload(
        prompts=torch.randint(config.vocab_size, shape, generator=draw).tolist(),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        sampling=Sampling(),
        seed=0,
    )
    speed = bandwidth(device, 2**30 if on_gpu else 2**24)
    results = measure(
        model, arms, workload, repeats=options.repeats, report=print, graphs=round_graphs(device)
    )
    print(f"{table(results)}\n{LEGEND}\na copy reads and writes {speed / 1e9:.0f} GB/s")
    rows, context = [], options.prompt_tokens + options.max_new_tokens / 2
    for arm in results:
        size = model.norm.weight.element_size()
        needed = bytes_per_token(config, arm, context=context, element_size=size)
        share = needed * arm.tokens_per_second / speed
        print(f"{arm.settings}: {arm.tokens_per_second:.0f} tokens/s, {share:.0%} of bandwidth")
        rows.append(asdict(arm) | {"bytes_per_token": needed, "share_of_bandwidth": share})
    if options.json is not None:
        given = {key: str(value) for key, value in asdict(options).items()}
        content: dict[str, object] = {
            "options": given,
            "model": asdict(config),
            "machine": machine(),
        }
        content |= {"bytes_per_second": speed, "arms": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_command(Options, decode, prog="python benchmarks/decoding_on_gpu.py")
