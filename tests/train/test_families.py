"""A folder of each family is trained, killed, resumed and exported; each starts from scratch."""

import shutil

import pytest
import torch

from data.command_line import read_options
from inference.loading.run import load_run
from inference.strategies.registry import parse_strategy
from models.conversion.options import Options
from models.convert import convert
from tests.inference.every_strategy import PROMPTS, decode
from tests.models.families import SHAPES, shape
from tests.models.test_convert import FAMILIES, make_folder
from tests.train.test_main import fingerprint

transformers = pytest.importorskip("transformers")

SIZE = {"n_layers": 4, "ffn_dim": 32, "vocab_size": 400, "max_seq_len": 32}
IN_SECONDS = "qwen3"
"""With a window, a head width and QK-norm; the others take a minute."""


def run(source, target, *words):
    words = ["--from", source, "--to", target, *map(str, words)]
    convert(read_options(Options, words, prog="convert", description=""))


def options(name):
    """Return what the command line gives of a model of this family."""
    fields = {"n_heads": 4, "n_kv_heads": 2, "dim": 32} | SIZE | SHAPES[name]
    return {f"model__{field}": value for field, value in fields.items()}


@pytest.mark.parametrize(
    "name",
    [name if name == IN_SECONDS else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES],
)
def test_a_folder_is_trained_resumed_decoded_and_exported(name, launch, corpus, tmp_path):
    fields = {"num_hidden_layers": 4, "intermediate_size": 32, "max_position_embeddings": 32}
    fields |= {"vocab_size": 400, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    given = SHAPES[name]
    fields |= FAMILIES[name] | {"sliding_window": given.get("sliding_window")}
    fields |= {"attention_bias": given.get("attention_bias") == "qkvo"}
    kind = {"model_type": name, "dtype": torch.float32, "shard_size": "1GB"}
    folder = make_folder(tmp_path / "hf", **kind, **fields)
    shutil.copy(corpus / "tokenizer.model", folder)
    run("hf", "skipstone", folder, tmp_path / "ours")
    often = {"metrics__interval_steps": 1, "checkpoint__asynchronous": False}
    often |= options(name) | {"model__norm_eps": 1e-6}
    start = {"checkpoint__init_from": tmp_path / "ours"}
    straight = launch(name="straight", **often, **start)
    killed = launch(name="killed", **often, **start)
    killed.wait_for_line("step 4/8")
    killed.kill()
    assert straight.wait() == [0, 0], straight.output
    again = launch(name="killed", **often, **start)
    assert again.wait() == [0, 0], again.output
    assert "resuming from" in again.output
    assert fingerprint(again.run) == fingerprint(straight.run)
    run("skipstone", "hf", straight.run, tmp_path / "export")
    ours = load_run(straight.run).model
    plain, drafted = (
        decode(ours, PROMPTS, parse_strategy(each).with_defaults(4), max_new_tokens=16).tokens
        for each in ("autoregressive", "self_speculative:E=2:d=3")
    )
    assert drafted == plain
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    ids = torch.tensor([PROMPTS[0]])
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    for E in (None, 2):
        out = theirs.generate(
            ids, attention_mask=ids > 0, pad_token_id=0, assistant_early_exit=E, **settings
        )
        assert out[0].tolist() == PROMPTS[0] + plain[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_family_starts_from_scratch(name, launch, tmp_path):
    job = launch(name="scratch", **options(name), steps=3, optim__name="muon")
    assert job.wait() == [0, 0], job.output
    run("skipstone", "hf", job.run, tmp_path / "export")
    assert load_run(job.run).model.config == shape(**SIZE, **SHAPES[name])
