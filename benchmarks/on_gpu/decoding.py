"""Decoding speed as a share of the machine's bandwidth: eager, as graphs, compiled with graphs."""

from dataclasses import replace
from typing import Literal

import torch

from benchmarks.on_gpu.session import Session
from inference.engine.compiled import compile_layers
from inference.engine.cuda_graphs import round_graphs
from inference.engine.fused import fuse
from inference.engine.sampling import Sampling
from inference.engine.strategy import Strategy
from inference.evaluation.measurement import ArmResult, Workload, measure
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
    session: Session,
    size: str,
    how: Literal["eager", "graphs", "compiled"],
    *,
    dtype: torch.dtype = torch.bfloat16,
    prompt: int = 64,
) -> dict[str, object]:
    """Decode plainly and self-speculatively, greedy, batch 1; weights are random.

    56 new tokens after a prompt of 64 stay in one window of the KV cache: few graphs.
    """
    if how == "graphs" and not session.on_gpu:
        session.row(f"decode {size} graphs", "needs CUDA")
        return {"outcome": "needs CUDA"}
    config, E = SIZES[size], EXITS[size]
    if session.tiny:
        config, E, dtype = replace(SIZES["tiny"], n_layers=2), 1, torch.float32
    model = build(config, E, session.device, dtype)
    fuse(model, compiled=how == "compiled")
    if how == "compiled":
        compile_layers(model)
    prompt, new = (8, 12) if session.tiny else (prompt, 56)
    draw = torch.Generator().manual_seed(0)
    workload = Workload(
        prompts=torch.randint(config.vocab_size, (1, prompt), generator=draw).tolist(),
        max_new_tokens=new,
        batch_size=1,
        sampling=Sampling(),
        seed=0,
    )
    arms: list[Strategy] = [Autoregressive(), *(SelfSpeculative(E=E, d=d) for d in (2, 4))]
    results = measure(
        model,
        arms[:2] if session.tiny or prompt > 64 else arms,
        workload,
        repeats=1 if session.tiny else 3,
        report=lambda line: None,
        graphs=None if how == "eager" else round_graphs(session.device),
        timings=1 if session.tiny else 6,
    )
    copy = session.results.get("ceilings", {}).get("copy_bytes_per_second")
    kind = f"{size} {how} {str(dtype).removeprefix('torch.')} after {prompt}"
    return {
        result.settings: _report(session, f"decode {kind}", result, share)
        for result in results
        for share in [_share(config, result, prompt + new / 2, dtype.itemsize, copy)]
    }


def decode_long(session: Session, how: Literal["eager", "compiled"]) -> dict[str, object]:
    """Do `decode` after a prompt that fills 4,096 slots but for the new tokens."""
    return decode(session, "layerskip_1.5b", how, prompt=3968)


def _share(
    config: LlamaConfig, result: ArmResult, context: float, size: int, copy: float | None
) -> float | None:
    """Return the share of the bandwidth of copies, where that has been measured."""
    if copy is None:
        return None
    E, d, per_round = result.E or 0, result.d or 0, result.tokens_per_verify or 1.0
    return bytes_per_token(config, E, d, per_round, context, size) * result.tokens_per_second / copy


def _report(
    session: Session, name: str, result: ArmResult, share: float | None
) -> dict[str, object]:
    """Print one arm, and return what is kept of it."""
    text = f"{result.tokens_per_second:.1f} tokens/s"
    if share is not None:
        text += f", {share:.1%} of bandwidth"
    if result.draft_cost is not None:
        text += f", c {result.draft_cost:.2f}, verify {result.verify_cost:.2f}"
    if result.same_tokens is not None and result.same_tokens < 1:
        text += f", {result.same_tokens:.0%} OF THE TOKENS"
    session.row(f"{name} {result.settings}", text)
    kept = ("tokens_per_second", "speedup", "speedups", "acceptance_rate", "draft_cost",
            "verify_cost", "bound", "same_tokens", "peak_bytes")  # fmt: skip
    return {"share_of_copy_bandwidth": share} | {field: getattr(result, field) for field in kept}


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
    config: LlamaConfig, E: int, d: int, tokens_per_round: float, context: float, element_size: int
) -> float:
    """Return what must be read for one new token: weights once a pass, and keys and values.

    A round of d drafts reads d (E layers + head) + L layers + head.
    """
    keys_and_values = 2 * config.n_kv_heads * config.head_width * context
    layer, head = block_params(config) + keys_and_values, config.vocab_size * config.dim
    round_bytes = d * (E * layer + head) + config.n_layers * layer + head
    return element_size * round_bytes / max(tokens_per_round, 1.0)
