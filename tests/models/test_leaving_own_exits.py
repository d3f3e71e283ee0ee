"""Without the exits' own parts a model is the plain Llama it was; in silence it never is."""

import pytest
import torch
from safetensors.torch import load_file

from data.command_line import read_options
from models.checkpoint_format import load_model
from models.conversion.hugging_face import hugging_face_name
from models.conversion.options import Options
from models.conversion.plain_checkpoint import read_checkpoint, write_checkpoint
from models.convert import convert
from tests.models.test_exit_parts import EXITS, with_own_exits


@pytest.fixture(scope="module")
def model():
    return with_own_exits(mlp=True, vocab_size=320)


@pytest.fixture(scope="module")
def run_folder(model, tokenizer_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    folder.mkdir()
    write_checkpoint(
        folder, model.config, dict(model.state_dict()), step=5,
        tokenizer=tokenizer_path.read_bytes(), config={"name": "own"}, data_fingerprint="",
    )  # fmt: skip
    return folder


def run(target, *words):
    words = ["--from", "skipstone", "--to", target, *map(str, words)]
    convert(read_options(Options, words, prog="convert", description=""))


def test_a_copy_keeps_them(model, run_folder, tmp_path):
    run("skipstone", run_folder, tmp_path / "copy")
    copy = load_model(tmp_path / "copy", device=torch.device("cpu"), dtype=torch.float32)
    assert copy.config == model.config
    h = torch.randn(3, 32)
    for E in (*EXITS, 2, 4):
        assert torch.equal(copy.exit_logits(h, E), model.exit_logits(h, E))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("hf",), r"own_exits: \(1, 3\) have parts that a Hugging Face Llama cannot hold"),
        (("skipstone", "--first_layers", "3"), "layers: exits after 1, 3 of all layers have parts"),
        (("skipstone", "--layers", "0,2"), "layers: exits after 1, 3 of all layers have parts"),
    ],
)
def test_they_are_not_left_out_in_silence(run_folder, tmp_path, words, message):
    target, *options = words
    with pytest.raises(ValueError, match=f"{message}.*--drop_own_exits") as caught:
        run(target, run_folder, tmp_path / "out", *options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_is_the_rest_bit_for_bit(model, run_folder, tmp_path):
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("own_exits.")}
    run("skipstone", run_folder, tmp_path / "ours", "--drop_own_exits")
    manifest, state = read_checkpoint(tmp_path / "ours")
    assert (manifest.model.own_exits, manifest.model.own_exit_mlp) == ((), False)
    assert state.keys() == rest.keys()
    assert all(torch.equal(state[name], rest[name]) for name in rest)
    run("skipstone", run_folder, tmp_path / "half", "--drop_own_exits", "--first_layers", "2")
    assert read_checkpoint(tmp_path / "half")[0].model.n_layers == 2
    with pytest.raises(ValueError, match="drop_own_exits: no exit of this model has parts"):
        run("skipstone", tmp_path / "ours", tmp_path / "again", "--drop_own_exits")


def test_a_hugging_face_folder_is_the_rest_and_its_card_states_it(model, run_folder, tmp_path):
    pytest.importorskip("transformers")
    run("hf", run_folder, tmp_path / "hf", "--drop_own_exits")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, value in model.state_dict().items():
        if not name.startswith("own_exits."):
            assert torch.equal(found.pop(hugging_face_name(name, model.config)), value), name
    assert not found
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Its exits after 1, 3 layers had parts of their own, which are left out here." in card
