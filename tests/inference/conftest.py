"""A small trained-run folder, made as training makes one but with random weights."""

import json
import random
import warnings

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from data.dataset import open_dataset
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from inference.strategies.dynamic import Dynamic
from models.checkpoint_format import MANIFEST, TOKENIZER, Manifest, file_entry
from tests.models.test_llama import build, small

WORDS = ["the", "cat", "sat", "on", "a", "mat", "saw", "moon", "rise", "quiet", "hill", "caf\u00e9"]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run folder with one checkpoint of a 4-layer model, and its dataset beside it."""
    root = tmp_path_factory.mktemp("run")
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=60))}) for _ in range(60)]
    (root / "corpus.jsonl").write_text("\n".join(lines))
    config = PrepareConfig(
        input=(str(root / "corpus.jsonl"),), vocab_size=290, validation_fraction=0.3
    )
    dataset = prepare(config, root / "data", workers=1)
    return make_run(root / "run", dataset, dataset.vocab_size)


@pytest.fixture(scope="session")
def padded_run(run_folder, tmp_path_factory):
    """A run whose model has 30 ids that its tokenizer has not, and likes to predict them."""
    dataset = open_dataset(run_folder.parent / "data")
    return make_run(tmp_path_factory.mktemp("padded") / "run", dataset, dataset.vocab_size + 30)


def make_run(root, dataset, vocab_size, n_layers=4):
    folder = root / "checkpoints" / "step-00000007"
    model = build(small(n_layers=n_layers, n_kv_heads=2, vocab_size=vocab_size), seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # far from uniform, so that float rounding decides nothing
        model.lm_head.weight[dataset.vocab_size :].mul_(2)
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        save({"model": model.state_dict()}, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / TOKENIZER).write_bytes(dataset.tokenizer_path.read_bytes())
    write_manifest(folder, model.config, dataset)
    return root


@pytest.fixture(scope="session")
def biased_model():
    """A model whose first exit and last layer disagree a good deal."""
    model = build(small(n_layers=3, dim=16, n_heads=2, n_kv_heads=1, vocab_size=6), seed=5)
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith(("wo.weight", "w2.weight")):
            weight.mul_(4)
    return model.eval()


@pytest.fixture
def started(monkeypatch):
    """The decoders of dynamic that were started."""
    decoders, start = [], Dynamic.start

    def keep(self, state):
        decoders.append(start(self, state))
        return decoders[-1]

    monkeypatch.setattr(Dynamic, "start", keep)
    return decoders


def write_manifest(folder, config, dataset):
    Manifest(
        step=7,
        model=config,
        config={"name": "run", "data": {"path": str(dataset.path), "seq_len": 96}},
        tokenizer_fingerprint=dataset.tokenizer_fingerprint,
        data_fingerprint=dataset.fingerprint,
        world_size=1,
        versions={},
        files={p.name: file_entry(p) for p in folder.iterdir() if p.name != MANIFEST},
    ).write(folder)
