"""The script for a GPU runs through at size tiny on a CPU, and counts bytes as worked by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.on_gpu.decoding import bytes_per_token
from benchmarks.on_gpu.session import Block, Session, run_blocks
from models.sizes import SIZES

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "benchmarks/gpu.py", "--size", "tiny", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "blocks",
    [
        ["ceilings", "attention", "saves", "decode 110m eager", "decode 110m graphs"],
        pytest.param([], marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_it_runs_through_on_a_cpu(tmp_path, blocks):
    path = tmp_path / "found.json"
    only = ["--only", *blocks] if blocks else []
    done = run("--device", "cpu", "--json", str(path), *only)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    names = blocks or [block.name for block in gpu.blocks()]
    assert [*found] == ["machine", *names]
    assert {found[name]["outcome"] for name in names} <= {"done", "needs CUDA"}
    assert f"{len(names)} blocks, 0 failed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_error_is_one_line(capsys):
    assert gpu.main(["--size", "tiny"]) == 2
    assert capsys.readouterr().err == "error: device: cuda, this machine has no CUDA device\n"


def test_a_block_that_fails_or_has_no_time_costs_no_other(tmp_path, capsys):
    def broken(session):
        raise RuntimeError("no kernel")

    def lacking(session):
        raise ModuleNotFoundError(name="torchtitan")

    blocks = [
        Block("broken", 0, broken),
        Block("lacking", 0, lacking),
        Block("long", 1e9, broken),
        Block("last", 0, lambda session: {"found": 1}),
    ]
    path = tmp_path / "found.json"
    session = Session(torch.device("cpu"), False, float("1e8"), path)
    assert run_blocks(session, blocks) == 1
    found = json.loads(path.read_text())
    outcomes = [found[block.name]["outcome"].split(",")[0] for block in blocks]
    assert outcomes == ["failed", "failed", "left out", "done"]
    assert "torchtitan is missing, bring the wheels" in capsys.readouterr().out


def test_bytes_worked_by_hand():
    config = SIZES["tiny"]  # 32 wide, 4 layers, 4 heads of 8, 2 for keys, 64 inside, 64 tokens
    layer = 32 * 8 * (4 + 2 * 2 + 4) + 3 * 32 * 64 + 2 * 32 + 2 * 2 * 8 * 10
    found = bytes_per_token(config, 0, 0, 1.0, 10, 2)
    assert found == pytest.approx(2 * (4 * layer + 64 * 32))
    found = bytes_per_token(config, 1, 2, 2.5, 10, 2)
    assert found == pytest.approx(2 * (6 * layer + 3 * 64 * 32) / 2.5)
