"""A dense training step of skipstone beside transformers' and torchtitan's Llama, in turn.

    PYTHONPATH=. python benchmarks/training_step.py --size demo --json benchmarks/training_step.json

The same weights, tokens and optimizer; one process, no FSDP. Each model with its own loss: ours in
chunks, the others' `F.cross_entropy` of fp32 logits, all with AdamW, fused, and clipped gradients.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import MagicMock

import torch
import transformers
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from benchmarks.results import median_ratio, write_beside
from data.command_line import run_command
from data.suggestion import suggest
from inference.cli.arguments import Count, OutputFile
from inference.loading.machine import machine
from loss.early_exit import EarlyExitConfig, early_exit_loss
from models.config import LlamaConfig
from models.conversion.hugging_face import hugging_face_config, hugging_face_state
from models.llama import Llama
from models.sizes import SIZES

LossSum = Callable[[Tensor, Tensor], Tensor]
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a dense training step beside that of two other libraries."""

    size: str = "demo"
    """Of the model; of Llama's own shape."""
    rows: Count = 8
    """Sequences of a step."""
    seq_len: Count = 256
    """Tokens of each."""
    steps: Count = 3
    """Steps of a measurement; one more is run before."""
    repeats: Count = 7
    """Measurements of each, in turn."""
    threads: int = field(default_factory=torch.get_num_threads)
    """Threads of torch."""
    json: OutputFile | None = None
    """Also write the numbers to this file, beside those of other sizes."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size: {self.size}, {suggest(self.size, [*SIZES])}")


class Arm:
    """A model with its loss and its optimizer.

    Args:
        model: its weights are updated.
        loss_sum: from tokens and labels, each (batch, seq), the sum of the tokens' losses.
    """

    def __init__(self, model: Module, loss_sum: LossSum) -> None:
        self.model, self.loss_sum = model, loss_sum
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(self, tokens: Tensor, labels: Tensor) -> float:
        """Take one step; return the mean loss before it."""
        loss = self.loss_sum(tokens, labels) / labels.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def skipstone(model: Llama) -> Arm:
    """Return our step, with one exit."""
    last, config = model.config.n_layers - 1, EarlyExitConfig()

    def loss_sum(tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = model(tokens, exit_layers=(last,))
        weights = {last: 1.0}
        found = early_exit_loss(hidden.exits, model.head_weight, labels, weights, config=config)
        return found.total

    return Arm(model, loss_sum)


def of_transformers(config: LlamaConfig, state: dict[str, Tensor]) -> Arm:
    """Return transformers' step."""
    theirs = transformers.AutoConfig.for_model(**hugging_face_config(config))
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    model.load_state_dict(state)
    return Arm(model.train(), _plain_loss(lambda tokens: model(tokens, use_cache=False).logits))


def of_torchtitan(config: LlamaConfig, state: dict[str, Tensor]) -> Arm:
    """Return torchtitan's step; its attention is causal alone, as is everyone's here."""
    if find_spec("triton") is None:
        # Its experts import triton, which torch for CPUs comes without; no dense model calls them.
        import_module("torch._inductor.compile_fx")  # Asks whether there is triton, so before.
        sys.modules |= dict.fromkeys(("triton", "triton.language"), MagicMock())
    import torchtitan.models.llama3 as titan
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

    rope = titan.ComplexRoPE.Config(
        dim=config.head_width, max_seq_len=config.max_seq_len, theta=config.rope_theta
    )
    layers = titan._build_llama3_layers(
        n_layers=config.n_layers,
        dim=config.dim,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        hidden_dim=config.ffn_dim,
        rope=rope,
        fuse_qkv=False,
        attn_backend="flex",
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        layer.attention_norm.eps = layer.ffn_norm.eps = config.norm_eps
    theirs = titan.Llama3Model.Config(
        dim=config.dim,
        vocab_size=config.vocab_size,
        tok_embeddings=titan.Embedding.Config(
            num_embeddings=config.vocab_size, embedding_dim=config.dim
        ),
        norm=titan.RMSNorm.Config(normalized_shape=config.dim, eps=config.norm_eps),
        lm_head=titan.Linear.Config(in_features=config.dim, out_features=config.vocab_size),
        layers=layers,
    )
    model = theirs.build()
    renamed = Llama3StateDictAdapter(theirs, None).from_hf(dict(state))
    model.load_state_dict({**model.state_dict(), **renamed})
    return Arm(model, _plain_loss(model))


def _plain_loss(logits: Callable[[Tensor], Tensor]) -> LossSum:
    def loss_sum(tokens: Tensor, labels: Tensor) -> Tensor:
        flat = logits(tokens).flatten(0, 1).float()
        return F.cross_entropy(flat, labels.flatten(), reduction="sum")

    return loss_sum


def compare(options: Options) -> None:
    """Measure, print, and write the numbers down."""
    torch.set_num_threads(options.threads)
    config = SIZES[options.size]
    model = Llama(config)
    model.init_weights(seed=0)
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = hugging_face_state(copies, config)
    arms = {
        "skipstone": skipstone(model),
        "transformers": of_transformers(config, state),
        "torchtitan": of_torchtitan(config, state),
    }
    draw = torch.Generator().manual_seed(0)
    shape = (options.rows, options.seq_len + 1)
    rows = torch.randint(config.vocab_size, shape, generator=draw)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    first = {name: arm.step(tokens, labels) for name, arm in arms.items()}
    assert max(first.values()) - min(first.values()) < TOLERANCE, f"losses differ: {first}"
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.repeats):
        for name, arm in arms.items():
            begin = time.perf_counter()
            for _ in range(options.steps):
                arm.step(tokens, labels)
            seconds[name].append((time.perf_counter() - begin) / options.steps)
    report(options, seconds)


def report(options: Options, seconds: dict[str, list[float]]) -> None:
    """Print a table of medians, and write the numbers as JSON."""
    print(f"{'':14}{'ms a step':>10}{'tokens/s':>10}{'ours is':>9}")
    ratios = {}
    for name, found in seconds.items():
        ratios[name] = median_ratio(found, seconds["skipstone"])
        each = statistics.median(found)
        speed = options.rows * options.seq_len / each
        print(f"{name:14}{1000 * each:10.1f}{speed:10.0f}{ratios[name]:8.2f}x")
    numbers = {
        "rows": options.rows,
        "seq_len": options.seq_len,
        "machine": machine(),
        "transformers": transformers.__version__,
        "load_average": os.getloadavg()[0],
        "speed_beside": ratios,
        "seconds": seconds,
    }
    write_beside(options.json, options.size, numbers)


if __name__ == "__main__":
    run_command(Options, compare, prog="benchmarks/training_step.py")
