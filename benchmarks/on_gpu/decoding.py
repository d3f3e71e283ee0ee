"""Decoding speed as a share of the machine's bandwidth: eager, as graphs, compiled with graphs."""

import statistics
from dataclasses import replace
from typing import Literal

import torch

from benchmarks.on_gpu.session import Session
from inference.engine.compiled import compile_layers
from inference.engine.cuda_graphs import round_graphs
from inference.engine.generation import Generation
from inference.engine.strategy import Strategy
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.self_speculative import SelfSpeculative
from models.config import LlamaConfig
from models.flops import block_params
from models.llama import Llama
from models.sizes import SIZES

LATER = 0.1
"""Factor of what the layers from E on add, so that drafts are right now and then."""
EXITS = {"110m": 3, "layerskip_1.5b": 6}


def decode(
    session: Session, size: str, how: Literal["eager", "graphs", "compiled"]
) -> dict[str, object]:
    """Decode plainly and self-speculatively, greedy, batch 1; weights are random.

    56 new tokens after a prompt of 64 stay in one window of the KV cache: few graphs.
    """
    if how == "graphs" and not session.on_gpu:
        session.row(f"decode {size} graphs", "needs CUDA")
        return {"outcome": "needs CUDA"}
    config, E = SIZES[size], EXITS[size]
    if session.tiny:
        config, E = replace(SIZES["tiny"], n_layers=2), 1
    dtype = torch.float32 if session.tiny else torch.bfloat16
    model = build(config, E, session.device, dtype)
    if how == "compiled":
        compile_layers(model)
    prompt, new = (8, 12) if session.tiny else (64, 56)
    prompts = torch.randint(
        config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)
    ).tolist()
    graphs = None if how == "eager" else round_graphs(session.device)
    arms: list[Strategy] = [Autoregressive(), *(SelfSpeculative(E=E, d=d) for d in (2, 4))]
    arms = arms[:2] if session.tiny else arms
    found: dict[str, object] = {}
    plain: list[list[int]] = []
    for arm in arms:
        speeds, done = [], None
        for i in range(2 + (1 if session.tiny else 3)):  # two to compile and capture
            done = Generation(model, prompts, arm, max_new_tokens=new, graphs=graphs).finish()
            if i >= 2:
                speeds.append(done.counters.tokens_per_second)
        assert done is not None
        plain = plain or done.tokens
        speed, counters = statistics.median(speeds), done.counters
        needed = bytes_per_token(
            config, arm, counters.tokens_per_round, prompt + new / 2, dtype.itemsize
        )
        copy = session.results.get("ceilings", {}).get("copy_bytes_per_second")
        name = f"decode {size} {how} {arm.name}" + (f" d={arm.d}" if hasattr(arm, "d") else "")
        share = needed * speed / copy if copy else None
        found[name] = {
            "tokens_per_second": speed,
            "share_of_copy_bandwidth": share,
            "acceptance_rate": counters.acceptance_rate,
            "same_tokens": done.tokens == plain,
        }
        text = f"{speed:.1f} tokens/s" + (f", {share:.1%} of bandwidth" if share else "")
        session.row(name, text + ("" if done.tokens == plain else ", OTHER TOKENS"))
    return found


def build(config: LlamaConfig, E: int, device: torch.device, dtype: torch.dtype) -> Llama:
    """Return a model for decoding with random weights, its first E layers close to all."""
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device=device)
    model.init_weights(seed=0)
    for l in range(E, config.n_layers):
        for linear in (model.block(l).attention.wo, model.block(l).feed_forward.w2):
            linear.weight.data.mul_(LATER)
    return model.to(dtype).eval().requires_grad_(False)


def bytes_per_token(
    config: LlamaConfig, arm: Strategy, tokens_per_round: float, context: float, element_size: int
) -> float:
    """Return what must be read for one new token: weights once a pass, and keys and values.

    A round of d drafts reads d (E layers + head) + L layers + head.
    """
    keys_and_values = 2 * config.n_kv_heads * config.head_width * context
    layer, head = block_params(config) + keys_and_values, config.vocab_size * config.dim
    E, d = getattr(arm, "E", 0), getattr(arm, "d", 0)
    round_bytes = d * (E * layer + head) + config.n_layers * layer + head
    return element_size * round_bytes / max(tokens_per_round, 1.0)
