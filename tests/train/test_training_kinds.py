"""Continual training and finetuning on a task, from a plain model, by the documented commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def train(preset, outputs, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "train/main.py"]
    run(*launcher, preset, "--output_dir", outputs, "--data.path", outputs / "data", *words)


def losses(run_dir):
    """Return the held-out loss of every exit, by E - 1, that a run measured last."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    [*_, last] = [line for line in lines if "validation/loss" in line]
    return [last[name] for name in sorted(last) if name.startswith("validation/loss_exit_")]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Return a folder with a plainly trained model, `dense_demo`, and its data."""
    folder = tmp_path_factory.mktemp("outputs")
    run("data.prepare", "--input", "embedded", "--output", folder / "data", "--vocab_size", 2048)
    train("dense_demo", folder, steps=300)
    return folder


def test_continual_training_with_the_recipe_improves_the_middle_exits(outputs):
    start = {"checkpoint.init_from": outputs / "dense_demo"}
    train("continual_demo", outputs, steps=150, **start)
    before, after = losses(outputs / "dense_demo"), losses(outputs / "continual_demo")
    assert all(after[E - 1] < before[E - 1] - 0.1 for E in (3, 4, 5))
    assert after[-1] < before[-1] + 0.05, "at no cost to the last layer"
    # More of the same does not do it: what the exits gain is the recipe's.
    train("dense_demo", outputs, steps=150, name="more", **start, **{"optim.lr": 1e-3})
    more = losses(outputs / "more")
    assert all(after[E - 1] < more[E - 1] - 0.05 for E in (3, 4, 5))


def test_finetuning_on_a_task_gets_it_right_and_lets_exits_agree_early(outputs):
    task, data = outputs / "task", outputs / "pairs"
    run("data.semantic_parsing", "--output", task)
    template = ["--prompt", r"Utterance: {utterance}\nParse:", "--response", " {semantic_parse}"]
    run(
        "data.prepare", "--input", task / "train.jsonl", "--output", data,
        "--tokenizer", outputs / "data" / "tokenizer.model", *template,
    )  # fmt: skip
    start = {"checkpoint.init_from": outputs / "dense_demo", "data.path": data}
    train("parsing_demo", outputs, **start)
    report = outputs / "report.json"
    run(
        "inference.benchmark", "--run", outputs / "parsing_demo", "--strategies", "early_exit",
        "--E", "4,6", "--task", "topv2", "--task_file", task / "test.jsonl", "--shots", 0,
        "--prompts", 200, "--batch_size", 50, "--max_new_tokens", 120, "--repeats", 1,
        "--json", report,
    )  # fmt: skip
    arms = {arm["settings"]: arm for arm in json.loads(report.read_text())["arms"]}
    exact = {name: arm["scores"]["exact"] for name, arm in arms.items()}
    assert exact["autoregressive"] > 0.9
    assert exact["early_exit:E=4"] > 0.8 * exact["autoregressive"]
    run("inference.evaluate", "--run", outputs / "parsing_demo", "--json", report)
    agreement = [one["agreement"] for one in json.loads(report.read_text())["exits"]]
    assert agreement[3] > 0.97
