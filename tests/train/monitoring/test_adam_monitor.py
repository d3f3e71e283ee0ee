"""The monitor gives the calibrated figures on synthetic gradients, and alarms where it should."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from data.dataset import open_dataset
from loss.curriculum import CurriculumConfig
from loss.early_exit import EarlyExitConfig, early_exit_loss
from models.config import LlamaConfig
from models.layer_dropout import LayerDropoutConfig, draw_kept_rows
from tests.distributed import like, run_distributed
from train.loop.layerskip import LayerSkipSchedule
from train.monitoring.adam_monitor import AdamMonitor, AdamMonitorConfig, alarms
from train.optimizer.optim import OptimConfig, build_optimizer, lr, set_lr
from train.parallel.parallelize import ParallelConfig, build_model
from train.parallel.titan import clip_grad_norm_

CONFIG = AdamMonitorConfig(interval_steps=1)
# facts: RMS(u), share of |u| > 0.8 (None where none is given), Sarle's coefficient; 200 steps of
# AR(1) gradients, beta1 = 0.9.
TABLE = {
    (0.95, 0.0): (0.226, 0.000, 0.37),
    (0.95, 0.6): (0.393, 0.021, 0.44),
    (0.95, 0.9): (0.618, 0.245, 0.58),
    (0.95, 0.99): (0.840, 0.610, 0.77),
    (0.95, 1.0): (1.000, 1.000, 1.00),
    (0.999, 0.0): (0.229, None, 0.34),
    (0.999, 0.6): (0.415, None, 0.35),
    (0.999, 0.9): (0.694, None, 0.38),
    (0.999, 0.99): (0.972, None, 0.46),
    (0.999, 1.0): (1.000, None, 1.00),
}


class Synthetic:
    """One parameter whose gradients we make up, under torch's own fused AdamW."""

    def __init__(self, runtime, *, beta2=0.95, eps=1e-8, numel=100_000):
        self.parameter = nn.Parameter(torch.zeros(numel))
        self.optimizer = torch.optim.AdamW(
            [("norm.weight", self.parameter)], betas=(0.9, beta2), eps=eps, fused=True
        )
        self.monitor = AdamMonitor(CONFIG, [self.optimizer], runtime, period=11)

    def step(self, grad):
        self.parameter.grad = grad.clone()
        self.monitor.observe()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def read(self):
        return self.monitor.read().groups["norm"]


def correlated(rho, steps, numel=100_000, scale=1.0):
    """Yield stationary AR(1) gradients with variance scale^2 and correlation rho."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(numel, generator=generator)
    for _ in range(steps):
        yield x * scale
        x = rho * x + math.sqrt(1 - rho**2) * torch.randn(numel, generator=generator)


def check_table(runtime):
    for (beta2, rho), (rms, share, bimodality) in TABLE.items():
        synthetic = Synthetic(runtime, beta2=beta2)
        for grad in correlated(rho, 200):
            synthetic.step(grad)
        found = synthetic.read()
        # The table was itself drawn at random, and rounded: to 0.0005 (RMS, share) and 0.005
        # (coefficient). Our own standard errors at 100,000 coordinates are below 0.0015.
        assert found.update_rms == pytest.approx(rms, abs=0.003), (beta2, rho)
        assert found.bimodality == pytest.approx(bimodality, abs=0.01), (beta2, rho)
        if share is not None:
            assert found.share_large == pytest.approx(share, abs=0.004), (beta2, rho)
        # 4,096 coordinates and 43 - k pairs of steps: standard error below 0.01.
        expected = {lag: rho**lag for lag in (*range(1, 9), 11)}
        assert found.lags == pytest.approx(expected, abs=0.02), (beta2, rho)
        assert found.grad_rms_over_eps == pytest.approx(1e8, rel=0.05)
        assert found.adam_steps == 200
        assert sum(found.histogram) == 100_000
        lines = alarms(synthetic.monitor.read(), CONFIG, warmup_steps=150)
        assert bool(lines) == ((beta2, rho) in ((0.95, 0.99), (0.95, 1.0), (0.999, 1.0))), lines
        assert not alarms(synthetic.monitor.read(), CONFIG, warmup_steps=201)
    # rho = 1: u is +1 or -1, 2^-16 or so to either side of the edge of a bin.
    histogram = torch.tensor(found.histogram)
    assert histogram[[15, 16, 47, 48]].sum() == 100_000


def check_starved(runtime):
    # RMS of the gradient over eps, RMS(u), whether sqrt(v_hat) < 10 eps nearly everywhere.
    for ratio, rms, starved in ((10.0, 0.205, 0.5), (1.0, 0.113, 1.0), (0.1, 0.021, 1.0)):
        synthetic = Synthetic(runtime, eps=1e-8)
        for grad in correlated(0.0, 200, scale=ratio * 1e-8):
            synthetic.step(grad)
        found = synthetic.read()
        assert found.update_rms == pytest.approx(rms, abs=0.002)
        assert found.share_starved == pytest.approx(starved, abs=0.1)
        assert found.grad_rms_over_eps == pytest.approx(ratio, rel=0.02)
        lines = alarms(synthetic.monitor.read(), CONFIG, warmup_steps=0)
        assert any("norm is starved" in line and "lower optim.eps" in line for line in lines) == (
            found.grad_rms_over_eps < 10
        )


def check_waking(runtime):
    """Zero gradients, then a constant one: |u| overshoots 1, as v forgets faster than it learns.

    Moments of 0 late in training, so that bias correction is 1; at the first steps of all it
    would make |u| = 1 throughout.
    """
    synthetic = Synthetic(runtime, numel=1000)
    for _ in range(400):
        synthetic.step(torch.zeros(1000))
    assert synthetic.read().update_rms == 0
    expected = {1: 0.45, 2: 0.61, 5: 0.86, 10: 1.03}
    for k in range(1, 11):
        synthetic.step(torch.ones(1000))
        if k in expected:
            assert synthetic.read().update_rms == pytest.approx(expected[k], abs=0.006)


def check_skipped(runtime):
    """A step with a bad gradient, which the update skips, leaves no trace."""
    synthetic = Synthetic(runtime, numel=5000)
    for t, grad in enumerate(correlated(0.9, 60, numel=5000)):
        synthetic.optimizer.found_inf = torch.tensor(float(t in (0, 40)))
        synthetic.step(grad * math.nan if t in (0, 40) else grad)
        if t == 0:
            assert synthetic.read().update_rms == 0
    found = synthetic.read()
    assert found.adam_steps == 58
    assert found.lags[1] == pytest.approx(0.9, abs=0.02)
    assert found.grad_rms_over_eps == pytest.approx(1e8, rel=0.1)


def check_synthetic(runtime):
    check_table(runtime)
    check_starved(runtime)
    check_waking(runtime)
    check_skipped(runtime)


def test_synthetic_gradients_give_the_calibrated_figures():
    run_distributed(check_synthetic, 1)


MODEL = LlamaConfig(
    dim=16, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=32, vocab_size=400, max_seq_len=32
)


def write_statistics(runtime, configs, folder):
    """Write the statistics after 12 steps on the same made-up gradients, however sharded."""
    for name, config in configs.items():
        model = build_model(MODEL, config, runtime, seed=0)
        optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
        monitor = AdamMonitor(CONFIG, optimizer, runtime)
        generator = torch.Generator().manual_seed(1)
        for t in range(12):
            for p in model.parameters():
                p.grad = like(p, torch.randn(p.shape, generator=generator) + 0.3)
                if t % 3 == 0 and p.ndim == 1:
                    p.grad = None
            monitor.observe()
            optimizer.step()
            optimizer.zero_grad()
        statistics = monitor.read()
        if runtime.is_main:
            values = {"metrics": statistics.metrics(), "histograms": statistics.histograms()}
            (folder / name).write_text(json.dumps(values))


def test_statistics_do_not_depend_on_the_ranks(tmp_path):
    run_distributed(write_statistics, 1, {"one": ParallelConfig(shard="blocks")}, tmp_path)
    two = {
        "sharded": ParallelConfig(shard="blocks"),
        "replicated": ParallelConfig(shard="blocks", dp_replicate=2),
        "whole": ParallelConfig(shard="none"),
    }
    run_distributed(write_statistics, 2, two, tmp_path)
    one, *others = (json.loads((tmp_path / name).read_text()) for name in ("one", *two))
    groups = {"tok_embeddings", "layers_00", "layers_01", "layers_02", "layers_03", "norm"}
    assert set(one["histograms"]) == groups | {"lm_head"}
    assert sum(one["histograms"]["tok_embeddings"]) == 400 * 16
    for other in others:
        assert other["histograms"] == one["histograms"]
        for name, value in one["metrics"].items():
            # A reading of a group larger than the sample takes other coordinates on two ranks.
            sampled = "lag" in name or "grad_rms" in name
            large = "tok_embeddings" in name or "lm_head" in name
            tolerance = 0.02 if sampled and large else 1e-6
            assert other["metrics"][name] == pytest.approx(value, rel=tolerance, abs=tolerance)


def check_beside_muon(runtime):
    model = build_model(MODEL, ParallelConfig(shard="blocks"), runtime, seed=0)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, name="muon"))
    monitor = AdamMonitor(CONFIG, optimizer, runtime)
    for t in range(3):
        for p in model.parameters():
            p.grad = torch.full_like(p, float(t + 1))
        monitor.observe()
        optimizer.step()
        optimizer.zero_grad()
    found = monitor.read().groups
    counts = {name: sum(group.histogram) for name, group in found.items()}
    layers = {f"layers_{l:02d}": 2 * 16 for l in range(4)}  # the weights of their norms
    assert counts == layers | {"tok_embeddings": 400 * 16, "norm": 16, "lm_head": 400 * 16}
    # Gradients of one sign, as in the table above for a correlation of 1 but growing.
    assert all(group.update_rms > 0.9 for group in found.values())


def test_beside_muon_the_monitor_watches_what_adamw_updates():
    run_distributed(check_beside_muon, 1)


def train(runtime, corpus, steps, *, frozen=0, interval_steps):
    """Train a tiny LayerSkip model; layer 1 has its gradients shrunk for the first `frozen` steps.

    Returns:
        (step, alarm) of every alarm.
    """
    L, optim = MODEL.n_layers, OptimConfig(lr=4e-3, warmup_steps=50)
    model = build_model(MODEL, ParallelConfig(shard="blocks"), runtime, seed=0)
    optimizer = build_optimizer(model, optim)
    config = AdamMonitorConfig(interval_steps=interval_steps)
    monitor = AdamMonitor(config, optimizer, runtime, period=3)
    dropout = LayerDropoutConfig(p_max=0.1)
    layerskip = LayerSkipSchedule(
        layer_dropout=dropout, curriculum=CurriculumConfig(C="rot", R=3),
        early_exit=EarlyExitConfig(e_scale=0.2), L=L, T=steps,
    )  # fmt: skip
    stream = open_dataset(corpus).stream("train")
    generator, found = torch.Generator().manual_seed(2), []
    for t in range(steps):
        starts = torch.randint(len(stream) - 33, (8,), generator=generator).tolist()
        rows = torch.stack([torch.from_numpy(stream.read(s, 33)).long() for s in starts])
        plan = layerskip.at(t)
        kept = draw_kept_rows(
            plan.drop_prob, seed=0, t=t, keys=torch.arange(8).numpy(),
            scale_kept=False, device=runtime.device,
        )  # fmt: skip
        hidden = model(rows[:, :-1], exit_layers=plan.exit_layers, kept_rows=kept).exits
        early_exit_loss(
            hidden, model.head_weight, rows[:, 1:], plan.exit_weights,
            config=EarlyExitConfig(chunk_rows=512),
        ).total.backward()  # fmt: skip
        if t < frozen:
            for p in model.layers["1"].parameters():
                p.grad *= 1e-9
        clip_grad_norm_(model.parameters(), 1.0)
        set_lr(optimizer, lr(optim, t, steps))
        monitor.observe()
        optimizer.step()
        optimizer.zero_grad()
        if (t + 1) % interval_steps == 0:
            lines = alarms(monitor.read(), config, warmup_steps=optim.warmup_steps)
            found += [(t + 1, line) for line in lines]
    return found


def check_training(runtime, corpus):
    healthy = train(runtime, corpus, 250, interval_steps=5)
    assert healthy == [], healthy
    found = train(runtime, corpus, 120, frozen=110, interval_steps=5)
    # The 99 first steps are passed over; the layer is frozen to the end of step 110.
    names = [(step, line.split()[1], "has a spike" in line) for step, line in found]
    assert names[:3] == [(step, "layers_01", False) for step in (100, 105, 110)], found
    assert "is starved" in found[0][1]
    assert (115, "layers_01", True) in names, found


def test_a_healthy_run_is_silent_and_a_released_layer_raises_the_alarm(corpus):
    run_distributed(check_training, 1, Path(corpus))


def test_problems_name_the_field():
    assert AdamMonitorConfig(interval_steps=0).problems() == []
    assert "adam_monitor.max_rise" in AdamMonitorConfig(max_rise=1.0).problems()[0]
