"""Training on a GPU, against the CPU; without one the same checks run on the CPU alone."""

import dataclasses
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data.boundaries import Boundaries
from data.loader import microbatch
from loss.softmax import IGNORE_INDEX
from models.config import LlamaConfig
from models.layer_dropout import draw_kept_rows
from models.llama import Llama
from models.token_depth import TokenDepthConfig
from tests.train import tiny
from tests.train.loop.test_step import EVERY_LOSS, make_config, plan_of
from train.checkpoints.content import training_tensors
from train.loop import step
from train.loop.step import accumulate_gradients, train_step
from train.optimizer.optim import build_optimizer
from train.parallel.parallelize import ParallelConfig, build_model
from train.parallel.runtime import RuntimeConfig, start_runtime

# Heads as narrow as FlexAttention's kernels allow.
MODEL = LlamaConfig(
    dim=64, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=53, max_seq_len=64
)
BOS, ROWS, SEQ = 1, 12, 40
SOME_LOSSES = {"early_exit": dataclasses.replace(EVERY_LOSS["early_exit"], distill_states="none")}
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ],
)


@pytest.fixture(scope="module", params=["cpu", GPU])
def runtime(request):
    with start_runtime(RuntimeConfig(), seed=0) as alone:
        assert alone.device.type == request.param
        yield alone


def batch(t, *, documents=False):
    """Return a microbatch of random rows, each of a few documents."""
    random = np.random.default_rng(t)
    tokens = random.integers(2, MODEL.vocab_size, (ROWS, SEQ))
    tokens[random.random(tokens.shape) < 0.1] = BOS
    tokens[:, 0] = BOS
    labels = random.integers(2, MODEL.vocab_size, tokens.shape)
    labels[random.random(tokens.shape) < 0.2] = IGNORE_INDEX
    return microbatch(tokens, labels, np.arange(ROWS), Boundaries(BOS) if documents else None)


def kept_rows(config, t, device="cpu"):
    return draw_kept_rows(
        plan_of(config).drop_prob,
        seed=config.seed, t=t, keys=np.arange(ROWS), scale_kept=True, device=torch.device(device),
    )  # fmt: skip


def on_cpu(config, batches):
    """Return gradients summed over steps, of a model that is not sharded, with torch's own loss."""
    model = Llama(config.model)
    model.init_weights(config.seed)
    plan = plan_of(config)
    for t, rows in enumerate(batches):
        hidden = model(
            rows.tokens,
            exit_layers=plan.hidden_layers,
            kept_rows=kept_rows(config, t),
            documents=rows.documents,
        )
        num_labels = (rows.labels != IGNORE_INDEX).sum()
        for l, weight in plan.exit_weights.items():
            logits, labels = model.head(hidden.exits[l]).flatten(0, 1), rows.labels.flatten()
            loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
            (weight * loss / num_labels).backward(retain_graph=True)
    return {name: p.grad for name, p in model.named_parameters()}


def trained(config, batches, runtime):
    """Return gradients summed over steps, as training takes them."""
    model = build_model(config.model, config.parallel, runtime, config.seed)
    for t, rows in enumerate(batches):
        accumulate_gradients(
            model, [rows], plan_of(config), t, config=config.step_config, runtime=runtime
        )
    return {name: p.grad.full_tensor().cpu() for name, p in model.named_parameters()}


def assert_near(ours, theirs, tolerance):
    """Compare each gradient by the norm of the difference, relative to its own."""
    assert list(ours) == list(theirs)
    for name, grad in theirs.items():
        error = ((ours[name] - grad).norm() / grad.norm()).item()
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_gradients_are_those_of_the_cpu(runtime, dtype, tolerance):
    config = make_config(model=MODEL, parallel=ParallelConfig(shard="blocks", param_dtype=dtype))
    batches = [batch(t) for t in range(2)]
    assert_near(trained(config, batches, runtime), on_cpu(config, batches), tolerance)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_any_number_of_kept_rows_has_the_gradients_of_the_cpu(
    runtime, compiled, documents, monkeypatch
):
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if runtime.device.type == "cpu" and compiled:
        compile_function = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, **options: compile_function(f, backend=note, **options)
        )
    parallel = ParallelConfig(shard="blocks", param_dtype="float32", compile=compiled)
    config = make_config(model=MODEL, parallel=parallel)
    batches = [batch(t, documents=documents) for t in range(8)]
    choices = [choice for t in range(8) for choice in kept_rows(config, t).choices]
    assert len({len(choice.rows) for choice in choices if choice.rows is not None}) >= 10
    torch._dynamo.reset()
    assert_near(trained(config, batches, runtime), on_cpu(config, batches), 1e-5)
    assert len(graphs) <= 8


def test_a_loss_that_is_not_finite_updates_nothing(runtime):
    config = make_config(model=MODEL)
    model = build_model(config.model, config.parallel, runtime, config.seed)
    optimizer = build_optimizer(model, config.optim)
    plan = plan_of(config)
    bad = dataclasses.replace(plan, exit_weights=dict.fromkeys(plan.exit_weights, float("nan")))
    fingerprints = []
    for t, each in enumerate((plan, bad, plan)):
        train_step(
            model, optimizer, [batch(t)], each, t, config=config.step_config, runtime=runtime
        )
        fingerprints.append(tiny.fingerprint(model, optimizer))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


class Reads(TorchDispatchMode):
    """Counts what would make the host wait, were the tensor on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function.overloadpacket).removeprefix("aten.")
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
        return function(*arguments, **(keywords or {}))


@contextmanager
def waiting_is_an_error(device, num_microbatches):
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Reads() if device.type == "cpu" else nullcontext() as reads:
            yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    # The labels of a microbatch are counted on the host.
    assert reads is None or reads.count == num_microbatches


@pytest.mark.parametrize("losses", [{}, SOME_LOSSES], ids=["plain", "every"])
def test_no_step_waits_for_the_device(runtime, losses):
    config = make_config(model=MODEL, **losses)
    model = build_model(config.model, config.parallel, runtime, config.seed)
    optimizer = build_optimizer(model, config.optim)
    for t in range(3):
        batches = [batch(t, documents=True), batch(t + 9, documents=True)]
        # The first step makes kernels and moments.
        with waiting_is_an_error(runtime.device, 2) if t else nullcontext():
            train_step(
                model, optimizer, batches, plan_of(config), t,
                config=config.step_config, runtime=runtime,
            )  # fmt: skip


CUDA = torch.device("cuda")


def copy_exit_tokens(config, rows):
    runtime, plan = SimpleNamespace(device=CUDA), SimpleNamespace(token_fraction=0.5)
    step._exit_tokens(plan, config.step_config, runtime, rows, 0)


def copy_drawn_exits(config, rows):
    on_gpu = SimpleNamespace(
        samples=rows.samples, labels=rows.labels, documents=None,
        tokens=SimpleNamespace(shape=rows.tokens.shape, device=CUDA),
    )  # fmt: skip
    step._token_layers(config.step_config, MODEL.n_layers, on_gpu, 0)


@pytest.mark.parametrize(
    "copy",
    [
        lambda config, rows: rows.to(CUDA),
        lambda config, rows: kept_rows(config, 0, CUDA),
        copy_exit_tokens,
        copy_drawn_exits,
    ],
)
def test_what_a_step_copies_to_a_gpu_is_page_locked_first(copy, monkeypatch):
    # Without a GPU: both calls are noted, and copy nothing.
    pinned, copied = [], []

    def pin_memory(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    def to(tensor, device, *, non_blocking):
        assert (device, non_blocking) == (CUDA, True)
        copied.append(tensor)
        return tensor

    config = make_config(model=MODEL, token_depth=TokenDepthConfig(kind="mixed"))
    rows = batch(0, documents=True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    copy(config, rows)
    assert copied
    assert {id(tensor) for tensor in copied} == {id(tensor) for tensor in pinned}


def test_two_checkpoints_in_the_background_are_of_their_steps(runtime, tmp_path):
    model, optimizer = tiny.build(runtime)
    saved = {}
    with tiny.writer(tmp_path, model, optimizer, runtime, asynchronous=True) as writer:
        for t in (2, 4):
            tiny.train(model, optimizer, t - 2, t)
            saved[t] = tiny.fingerprint(model, optimizer)
            writer.save(t, {})
            tensors = training_tensors(model, optimizer)
        tiny.train(model, optimizer, 4, 6)
    assert {v.device.type for v in tensors["model"].values()} == {runtime.device.type}
    end = tiny.fingerprint(model, optimizer)
    model, optimizer = tiny.build(runtime)
    assert tiny.load_newest(tmp_path, model, optimizer, runtime).t == 4
    assert tiny.fingerprint(model, optimizer) == saved[4]
    tiny.train(model, optimizer, 4, 6)
    assert tiny.fingerprint(model, optimizer) == end != saved[4] != saved[2]
