"""A run opens with the model and the tokenizer it was trained with, or not at all."""

import shutil

import pytest
import torch

from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.tokenizer import train_tokenizer
from inference.engine import products as packed
from inference.engine.products import PackedLinear
from inference.loading import run as loading
from inference.loading.run import choose_device, load_run
from models.checkpoint_format import TOKENIZER, load_model
from models.fingerprint import compute_fingerprint, weights_fingerprint


@pytest.fixture
def other_tokenizer(tmp_path):
    path = tmp_path / "other.model"
    train_tokenizer(["another text, another tokenizer " * 20], 275, path)
    return path


def test_a_run_and_its_checkpoint_folder_open_alike(run_folder):
    one = load_run(run_folder, device="cpu")
    other = load_run(run_folder / "checkpoints" / "step-00000007", device="cpu")
    assert one.checkpoint == other.checkpoint
    assert one.manifest.step == 7
    assert one.model.head_weight.dtype == torch.float32
    assert torch.equal(one.model.head_weight, other.model.head_weight)


def test_a_checkpoint_that_training_deletes_while_it_is_read_gives_way_to_the_next(
    run_folder, tmp_path, monkeypatch
):
    shutil.copytree(run_folder, tmp_path / "run")
    old = tmp_path / "run" / "checkpoints" / "step-00000007"

    def load_late(checkpoint, **options):
        if checkpoint == old:
            old.rename(old.with_name("step-00000009"))
        return load_model(checkpoint, **options)

    monkeypatch.setattr(loading, "load_model", load_late)
    assert load_run(tmp_path / "run", device="cpu").checkpoint.name == "step-00000009"


def test_weights_take_the_type_asked_for(run_folder):
    run = load_run(run_folder, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_how_a_run_is_held_does_not_change_its_fingerprint(
    run_folder, monkeypatch, dtype, quantize
):
    if quantize is not None:
        pytest.importorskip("torchao")
    plain = compute_fingerprint(load_run(run_folder, device="cpu", packed=False).model)
    monkeypatch.setattr(packed, "PACKED_ELEMENTS", 0)
    run = load_run(run_folder, device="cpu", dtype=dtype, quantize=quantize)
    assert isinstance(run.model.lm_head, PackedLinear) == (dtype == "bfloat16")
    assert weights_fingerprint(run.model) == plain


def test_another_tokenizer_is_refused(run_folder, other_tokenizer, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    shutil.copy(other_tokenizer, copy / "checkpoints" / "step-00000007" / TOKENIZER)
    with pytest.raises(ValueError, match=r"tokenizer: .* but the checkpoint was trained with"):
        load_run(copy)


def test_data_of_another_tokenizer_is_refused(run_folder, other_tokenizer, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "one text"}\n{"text": "two texts"}\n')
    prepare(
        PrepareConfig(input=(str(corpus),), tokenizer=other_tokenizer), tmp_path / "data", workers=1
    )
    run = load_run(run_folder, device="cpu")
    with pytest.raises(ValueError, match=r"data: .* was made with tokenizer"):
        run.open_data(tmp_path / "data")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        load_run(tmp_path)


def test_of_a_hugging_face_folder_a_checkpoint_is_to_be_made(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "config.json").touch()
    remedy = f"models.convert --from hf --to skipstone {tmp_path} OUTPUT$"
    with pytest.raises(ValueError, match=rf"^run: {tmp_path} is a Hugging Face folder.*{remedy}"):
        load_run(tmp_path)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device: cuda:99 is not available"):
        choose_device("cuda:99")
    with pytest.raises(ValueError, match="device: warp is not available"):
        choose_device("warp")
