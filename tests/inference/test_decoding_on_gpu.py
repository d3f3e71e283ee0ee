"""The script that measures decoding on a GPU runs through, and counts bytes as worked by hand."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.decoding_on_gpu import bandwidth, bytes_per_token
from models.sizes import SIZES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decoding_on_gpu.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--E", "1", "--d", "2", *arguments]
    root = SCRIPT.parents[1]
    return subprocess.run(
        command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )


def test_it_runs_through_on_a_cpu(tmp_path):
    path = tmp_path / "found.json"
    options = [
        "--device",
        "cpu",
        "--max_new_tokens",
        "20",
        "--prompt_tokens",
        "8",
        "--repeats",
        "1",
    ]
    done = run(*options, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "of bandwidth" in done.stdout
    found = json.loads(path.read_text())
    plain, speculative = found["arms"]
    assert speculative["settings"] == "self_speculative:E=1:d=2"
    for arm in (plain, speculative):
        rate = arm["bytes_per_token"] * arm["tokens_per_second"]
        assert arm["share_of_bandwidth"] == pytest.approx(rate / found["bytes_per_second"])
    assert {"gpu", "torch", "date"} <= found["machine"].keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_error_is_one_line():
    done = run()
    assert done.returncode == 2
    assert done.stderr == "error: device: cuda, this machine has no CUDA device\n"


def test_bytes_worked_by_hand():
    config = SIZES["tiny"]  # 32 wide, 4 layers, 4 heads of 8, 2 for keys, 64 inside, 64 tokens
    layer = 32 * 8 * (4 + 2 * 2 + 4) + 3 * 32 * 64 + 2 * 32
    read = 2 * 2 * 8 * 10 * 3  # keys and values of 10 tokens in 3 rows
    plain = SimpleNamespace(E=None, d=None, batch_size=3, tokens_per_verify=None)
    found = bytes_per_token(config, plain, context=10, element_size=2)
    assert found == pytest.approx(2 * (4 * (layer + read) + 64 * 32) / 3)
    drafted = SimpleNamespace(E=1, d=2, batch_size=3, tokens_per_verify=2.5)
    found = bytes_per_token(config, drafted, context=10, element_size=2)
    assert found == pytest.approx(2 * (6 * (layer + read) + 3 * 64 * 32) / (3 * 2.5))


def test_a_copy_takes_time():
    assert 1e7 < bandwidth(torch.device("cpu"), 2**22, repeats=3) < 1e13
