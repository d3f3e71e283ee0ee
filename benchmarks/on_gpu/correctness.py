"""Gradients on the device against a CPU's, and a step whose loss is NaN."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.on_gpu.session import Session
from benchmarks.on_gpu.training import Trainer
from loss.early_exit import EarlyExitConfig, early_exit_loss
from models.config import LlamaConfig
from models.layer_dropout import draw_kept_rows
from models.llama import Llama
from models.sizes import SIZES
from train.parallel.local_part import local_part


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


def _nan_step(session: Session) -> bool:
    """Whether weights stay as they are where the loss is NaN."""
    trainer = Trainer(session, "110m" if not session.tiny else "tiny", "dense")
    name, weight = next(iter(trainer.model.named_parameters()))
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if n.endswith("ffn_norm.weight")).fill_(
            float("nan")
        )
    before = local_part(weight).detach().clone()
    trainer.step()
    return bool(torch.equal(before, local_part(weight)))
