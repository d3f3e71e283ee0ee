"""Training: gradients against a CPU, host syncs, checkpoints, the loss alone, MFU, a profile.

Imports of `train` are inside the blocks, so that the others run where its wheels are missing.
"""

import statistics
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.on_gpu.session import Session
from data.loader import Microbatch
from loss.early_exit import EarlyExitConfig, early_exit_loss
from models.config import LlamaConfig
from models.flops import train_flops_per_token
from models.layer_dropout import draw_kept_rows
from models.llama import Llama
from models.sizes import SIZES

ROWS = {"110m": 32, "350m": 16, "layerskip_1.5b": 4}
"""Sequences of a microbatch, as in the presets."""
WARM, TIMED = 3, 5


def correctness(session: Session) -> dict[str, object]:
    """Compare gradients on the device, fp32 and bf16, with those in float64 on the CPU."""
    base = replace(SIZES["tiny"], n_layers=3, n_heads=2, n_kv_heads=1)  # FlexAttention: 16 wide
    plain = EarlyExitConfig(e_scale=0.5, chunk_rows=37)
    cases: dict[str, tuple[LlamaConfig, EarlyExitConfig, dict[str, Any]]] = {
        "exits": (base, plain, {}),
        "dropout": (base, plain, {"p": 0.5}),
        "distillation": (base, replace(plain, distill=0.5), {}),
        "z-loss": (base, replace(plain, z_loss=1e-3), {}),
        "token_fraction": (base, replace(plain, token_fraction=0.5), {"fraction": 0.5}),
        "capacity": (replace(base, router="linear"), plain, {"capacity": 0.5}),
    }
    found: dict[str, object] = {}
    for name, (model, loss, how) in cases.items():
        found[name] = _compare(session, name, model, loss, how)
    # Every step keeps other numbers of rows: more of them than graphs that dynamo allows.
    worst = [
        _compare(session, "", base, plain, {"p": 0.5, "documents": True, "t": t})
        for t in range(2 if session.tiny else 12)
    ]
    found["documents"] = max(worst)
    session.row("correctness documents, many kept rows", f"{max(worst):.1e}")
    bf16 = _compare(session, "dropout in bfloat16", base, plain, {"p": 0.5}, torch.bfloat16)
    found["bfloat16"] = bf16
    found["nan_step_updates_nothing"] = kept = _nan_step(session)
    session.row("a step with a NaN", "updates nothing" if kept else "UPDATES WEIGHTS")
    if max(worst) > 1e-3 or not kept or max(found[n] for n in cases) > 1e-3:  # type: ignore[type-var]
        raise AssertionError(f"gradients or the NaN step are wrong: {found}")
    return found


def _compare(
    session: Session,
    name: str,
    config: LlamaConfig,
    loss: EarlyExitConfig,
    how: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> float:
    """Return the largest difference of a gradient, over the largest entry of that gradient."""
    expected = _gradients(config, loss, how, torch.device("cpu"), torch.float64)
    found = _gradients(config, loss, how, session.device, dtype)
    worst = max(
        float((found[key] - grad).abs().max() / grad.abs().max().clamp(min=1e-8))
        for key, grad in expected.items()
    )
    if name:
        session.row(f"correctness {name}", f"{worst:.1e}")
    return worst


def _gradients(
    config: LlamaConfig,
    loss: EarlyExitConfig,
    how: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    model = Llama(config)
    model.init_weights(seed=0)
    model.to(device, dtype)
    rows, seq, L = 10, 32, config.n_layers
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (rows, seq + 1), generator=draw)
    kept = None
    if p := how.get("p"):
        kept = draw_kept_rows(
            (0.0, *(p,) * (L - 1)), seed=0, t=how.get("t", 0), keys=np.arange(rows),
            scale_kept=True, device=device,
        )  # fmt: skip
    documents = None
    if how.get("documents"):
        documents = torch.arange(seq).div(7, rounding_mode="floor").expand(rows, seq).to(device)
    hidden = model(
        tokens[:, :-1].to(device), exit_layers=range(L), kept_rows=kept,
        documents=None if documents is None else documents.contiguous(),
        capacity=how.get("capacity", 1.0),
    )  # fmt: skip
    few = None
    if "fraction" in how:
        few = torch.arange(0, rows * seq, 2, device=device)
    total = early_exit_loss(
        hidden.exits, model.head_weight, tokens[:, 1:].contiguous().to(device),
        {l: 1 / L for l in range(L)}, config=loss, tokens=few,
    ).total  # fmt: skip
    total.backward()
    return {
        name: p.grad.detach().cpu().double()
        for name, p in model.named_parameters()
        if p.grad is not None and float(p.grad.abs().max()) > 0
    }


class Trainer:
    """A model, its optimizer and random batches, stepped as `train/main.py` steps them."""

    def __init__(self, session: Session, size: str, mode: str, *, compiles: bool = False) -> None:
        from train.optimizer.optim import build_optimizer
        from train.parallel.parallelize import ParallelConfig, build_model

        self.session, self.config, self.t = session, train_config(session, size, mode), 0
        parallel = ParallelConfig(compile=compiles)
        runtime = session.runtime
        self.model = build_model(self.config.model, parallel, runtime, 0)
        self.optimizer = build_optimizer(self.model, self.config.optim)

    def batch(self) -> list[Microbatch]:
        """Return random microbatches of one step, in page-locked memory on a GPU."""
        data, draw = self.config.data, torch.Generator().manual_seed(self.t)
        found = []
        for m in range(2):
            shape = (data.microbatch_size, data.seq_len + 1)
            tokens = torch.randint(self.config.model.vocab_size, shape, generator=draw)
            samples = torch.arange(shape[0]) + m * shape[0]
            one = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), samples)
            found.append(one.pin_memory() if self.session.on_gpu else one)
        return found

    def step(self) -> Any:
        """Take one step."""
        from train.loop.step import train_step

        plan = self.config.layerskip.at(self.t)
        self.t += 1
        return train_step(
            self.model, self.optimizer, self.batch(), plan, self.t - 1,
            config=self.config.step_config, runtime=self.session.runtime,
        )  # fmt: skip

    def flops(self, steps: range) -> float:
        """Return the FLOPs of one of these steps, on average."""
        plans, data = [self.config.layerskip.at(t) for t in steps], self.config.data
        per_token = train_flops_per_token(
            self.config.model,
            data.seq_len,
            mean_layers=statistics.fmean(plan.mean_layers for plan in plans),
            mean_exits=statistics.fmean(plan.mean_exits for plan in plans),
        )
        return per_token * data.tokens_per_step


def train_config(session: Session, size: str, mode: str) -> Any:
    """Return the configuration of an arm: dense, exits, or exits and dropout."""
    from loss.curriculum import CurriculumConfig
    from models.layer_dropout import LayerDropoutConfig
    from train.config.config import TrainConfig
    from train.loop.data_config import DataConfig
    from train.optimizer.optim import OptimConfig

    model = SIZES["tiny" if session.tiny else size]
    rows = 4 if session.tiny else ROWS[size]
    recipe: dict[str, Any] = {}
    if mode != "dense":
        recipe["curriculum"] = CurriculumConfig(C="rot", R=max(model.n_layers - 1, 1))
    if mode == "exits and dropout":
        recipe["layer_dropout"] = LayerDropoutConfig(p_max=0.1, S="constant")
    return TrainConfig(
        name="gpu",
        steps=1000,
        model=model,
        data=DataConfig(
            path="none", seq_len=model.max_seq_len, global_batch_size=2 * rows, microbatch_size=rows
        ),
        optim=OptimConfig(lr=1e-4),
        **recipe,
    )


def _nan_step(session: Session) -> bool:
    """Whether weights stay as they are where the loss is NaN."""
    trainer = Trainer(session, "110m" if not session.tiny else "tiny", "dense")
    name, weight = next(iter(trainer.model.named_parameters()))
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if n.endswith("ffn_norm.weight")).fill_(
            float("nan")
        )
    before = weight.full_tensor().clone()
    trainer.step()
    return bool(torch.equal(before, weight.full_tensor()))


def syncs(session: Session) -> dict[str, object]:
    """Count the lines of a step at which the host waits for the device."""
    trainer = Trainer(session, "110m", "exits and dropout")
    trainer.step()
    if not session.on_gpu:
        session.row("host syncs in a step", "needs CUDA")
        return {"outcome": "needs CUDA"}
    session.wait()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.step()
    torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    session.row("host syncs in a step", f"{sum(lines.values())}: {dict(lines)}"[:200])
    return {"syncs": dict(lines)}


def saves(session: Session) -> dict[str, object]:
    """Save twice in the background, resume into another model, and compare bit by bit."""
    from train.checkpoints.checkpoint_config import CheckpointConfig
    from train.checkpoints.checkpointer import CheckpointWriter
    from train.checkpoints.content import RunIdentity, training_tensors
    from train.checkpoints.resume import resume

    trainer, other = (Trainer(session, "110m", "exits") for _ in range(2))
    tokenizer = session.folder / "tokenizer.model"
    tokenizer.write_bytes(b"none")
    config = CheckpointConfig(asynchronous=True)
    fields = {"name": "gpu", "steps": 1000, "optim": {"lr": 1e-4}}
    identity = RunIdentity(trainer.config.model, fields, tokenizer, "none", "none")
    how = {"config": config, "identity": identity, "runtime": session.runtime}
    folder = session.folder / "checkpoints"
    with CheckpointWriter(folder, trainer.model, trainer.optimizer, **how) as writer:
        for _ in range(2):
            trainer.step()
            writer.save(trainer.t, {})
        writer.wait()
    resumed = resume(folder, other.model, other.optimizer, **how)
    assert resumed.t == 2, f"resumed at step {resumed.t} and not 2"
    pairs = [training_tensors(x.model, x.optimizer) for x in (trainer, other)]
    same = all(
        torch.equal(_local(value), _local(pairs[1][part][name]))
        for part, values in pairs[0].items()
        for name, value in values.items()
    )
    session.row("two asynchronous saves, then a resume", "the same bits" if same else "OTHER BITS")
    assert same, "what was loaded is not what was saved"
    return {"same_bits": same}


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def loss_alone(session: Session) -> dict[str, object]:
    """Time the loss of 1 and 2 exits beside its three products, and count its bytes per logit."""
    copy = session.results.get("ceilings", {}).get("copy_bytes_per_second")
    found: dict[str, object] = {}
    shapes = [(64, 32, 64)] if session.tiny else [(32768, 768, 32000), (16384, 2048, 32000)]
    for tokens, dim, vocab in shapes:
        dtype = torch.bfloat16 if session.on_gpu else torch.float32
        head = torch.randn(vocab, dim, device=session.device, dtype=dtype) * dim**-0.5
        head.requires_grad_()
        labels = torch.randint(vocab, (1, tokens), device=session.device)
        for exits in (1, 2):
            products = exits * _three_products(session, tokens, dim, head)
            for chunk in (16,) if session.tiny else (1024, 4096, 16384):
                seconds = _loss_seconds(session, exits, (tokens, dim), head, labels, chunk)
                name = f"loss ({tokens}, {dim}, {vocab}), {exits} exits, chunk {chunk}"
                extra = max(0.0, seconds - products)
                moved = extra * copy / (exits * tokens * vocab) if copy else None
                found[name] = {
                    "ms": seconds * 1e3,
                    "over_products": seconds / products,
                    "bytes_per_logit": moved,
                }
                text = f"{seconds * 1e3:.2f} ms, {seconds / products:.2f}x its products"
                session.row(name, text + (f", {moved:.0f} bytes/logit" if moved else ""))
    found["addmm_out_dtype"] = _fp32_accumulation(session)
    session.row("addmm of bf16 into fp32 (out_dtype)", str(found["addmm_out_dtype"])[:90])
    return found


def _three_products(session: Session, tokens: int, dim: int, head: torch.Tensor) -> float:
    x = torch.randn(tokens, dim, device=session.device, dtype=head.dtype)
    rows = min(tokens, 4096)
    weight = head.detach()

    def run() -> None:
        for begin in range(0, tokens, rows):
            part = x[begin : begin + rows]
            logits = part @ weight.T
            logits @ weight
            logits.T @ part

    return session.seconds(run, times=3)


def _loss_seconds(
    session: Session,
    exits: int,
    shape: tuple[int, int],
    head: torch.Tensor,
    labels: torch.Tensor,
    chunk: int,
) -> float:
    hidden = {
        l: torch.randn(1, *shape, device=session.device, dtype=head.dtype).requires_grad_()
        for l in range(exits)
    }
    config = EarlyExitConfig(chunk_rows=chunk)
    weights = dict.fromkeys(hidden, 1 / exits)

    def run() -> None:
        early_exit_loss(hidden, head, labels, weights, config=config).total.backward()

    return session.seconds(run, times=3)


def _fp32_accumulation(session: Session) -> str:
    """Whether a bfloat16 product is added to an fp32 sum in place, exactly enough."""
    a, b = (torch.randn(64, 64, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    total = torch.ones(64, 64, device=session.device)
    expected = 1 + a.double() @ b.double()
    try:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return f"not on this device: {error}".splitlines()[0]
    return f"error {float((total - expected).abs().max()):.1e}"


def mfu(session: Session, size: str) -> dict[str, object]:
    """Time the step of a size: dense, exits, exits and dropout, the last compiled too."""
    from train.parallel.titan import get_peak_flops

    peak = get_peak_flops(torch.cuda.get_device_name()) if session.on_gpu else None
    found: dict[str, object] = {}
    for mode, compiles in (
        ("dense", False),
        ("exits", False),
        ("exits and dropout", False),
        ("exits and dropout", True),
    ):
        name = f"{size} {mode}{', compiled' * compiles}"
        if session.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(session, size, mode, compiles=compiles)
        warm, timed = (1, 2) if session.tiny else (WARM, TIMED)
        flops = trainer.flops(range(warm, warm + timed))
        seconds = session.seconds(trainer.step, warm=warm, times=timed)
        tokens = trainer.config.data.tokens_per_step / seconds
        share = flops / seconds / peak if peak else None
        gib = session.runtime.peak_memory_bytes() / 2**30
        planned = _planned_gib(session, size, mode)
        found[name] = {
            "tokens_per_second": tokens,
            "mfu": share,
            "peak_gib": gib,
            "planned_gib": planned,
        }
        speed = f"MFU {share:.1%}" if share else f"{flops / seconds / 1e9:.2f} GFLOP/s"
        memory = f"{gib:.2f} GiB" + (f" (--dry_run: {planned:.2f})" if planned else "")
        session.row(name, f"{tokens:,.0f} tokens/s, {speed}, {memory}")
        del trainer
        if session.on_gpu:
            torch.cuda.empty_cache()
    return found


def _planned_gib(session: Session, size: str, mode: str) -> float | None:
    """Return what --dry_run expects, from a process of its own: its process group is a fake one."""
    from benchmarks.on_gpu.plan import planned_gib

    return planned_gib(train_config(session, size, mode))


def profile_step(session: Session) -> dict[str, object]:
    """Profile one eager step of 110M and list the 25 operations that take most."""
    from torch.profiler import ProfilerActivity, profile

    trainer = Trainer(session, "110m", "exits and dropout")
    trainer.step()
    session.wait()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * session.on_gpu
    with profile(activities=kinds) as found:
        trainer.step()
        session.wait()
    key = "self_device_time_total" if session.on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))[:25]
    top = [{"name": e.key, "ms": getattr(e, key) / 1e3, "calls": e.count} for e in events]
    for row in top:
        print(f"  {row['ms']:10.3f} ms {row['calls']:6d} x {row['name'][:80]}", flush=True)
    session.row("most of a 110M step", str(top[0]["name"])[:60])
    return {"top": top}
