"""A tokenizer.json of Llama 3's kind is a tokenizer of ours."""

import json
import pickle

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import data.tokenizer
from data.hugging_face import prove_same_ids, write_tokenizer
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.tokenizer import Tokenizer
from tests.documents import make_documents

# Llama 3's own pattern.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def write_llama3_tokenizer(folder, vocab_size=400):
    """Write a byte-level tokenizer.json and its tokenizer_config.json, special ids last."""
    rust = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(make_documents(100), trainer)
    rust.add_special_tokens([BOS, EOS])
    bos_id = rust.token_to_id(BOS)
    rust.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos_id)]
    )
    rust.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": BOS}, "eos_token": EOS, "model_max_length": 99}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.fixture
def path(tmp_path):
    return write_llama3_tokenizer(tmp_path)


def test_round_trip_is_exact_and_special_tokens_in_text_are_text(path):
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (398, 399, 400)
    for text in ["", " a  b\n\n\tc ", "caf\u00e9 \U0001f389 \u2581", f"{BOS}x{EOS}", "I'm 12345"]:
        ids = tokenizer.encode(text)
        assert max(ids, default=0) < 398
        assert tokenizer.decode([398, *ids, 399]) == text


def test_pieces_give_the_ids_of_the_whole_text(path, monkeypatch):
    monkeypatch.setattr(data.tokenizer, "_PIECE_CHARS", 3)
    tokenizer = Tokenizer(path)
    rust = tokenizers.Tokenizer.from_file(str(path))
    text = "".join(make_documents(20)) + "  a b\n \n c d  e.  F g\n\n"
    assert len(list(tokenizer.encode_pieces(text))) > 100
    assert tokenizer.encode(text) == rust.encode(text, add_special_tokens=False).ids


def test_a_dataset_keeps_it_in_one_file_with_the_same_fingerprint(path, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in make_documents(20))
    )
    config = PrepareConfig(
        input=(str(tmp_path / "text.jsonl"),), tokenizer=path, validation_fraction=0.2
    )
    dataset = prepare(config, tmp_path / "data", workers=1)
    kept = pickle.loads(pickle.dumps(Tokenizer(dataset.tokenizer_path)))
    assert kept.fingerprint == dataset.tokenizer_fingerprint == Tokenizer(path).fingerprint
    assert kept.encode("self return") == Tokenizer(path).encode("self return")
    assert prepare(config, tmp_path / "data", workers=1).fingerprint == dataset.fingerprint


def test_it_goes_out_as_it_came_in(path, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "out").mkdir()
    write_tokenizer(Tokenizer(path), tmp_path / "out", max_seq_len=50)
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert written == json.loads(path.read_text())
    assert "equal transformers'" in prove_same_ids(Tokenizer(path), tmp_path / "out")


def test_without_its_config_nobody_knows_its_bos(path):
    (path.parent / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"put its tokenizer_config\.json beside it"):
        Tokenizer(path)


@pytest.mark.parametrize("names", [{"bos_token": None, "eos_token": EOS}, {"eos_token": EOS}])
def test_without_bos_the_end_token_begins_a_text_too(path, tmp_path, names):
    pytest.importorskip("transformers")
    content = json.loads(path.read_text())
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    (path.parent / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (399, 399)
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out", max_seq_len=50)
    assert "but for BOS, 399," in prove_same_ids(tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bos_token": BOS}, r"tokenizer_config\.json: eos_token is none, name the token"),
        ({"bos_token": BOS, "eos_token": None}, "eos_token is none, name the token"),
        ({"bos_token": BOS, "eos_token": 7}, r"tokenizer_config\.json: eos_token: 7, give text"),
        ({"bos_token": [], "eos_token": EOS}, "bos_token: .*, give text"),
        ({"bos_token": {}, "eos_token": EOS}, "content is missing, mend"),
        ({"bos_token": "<s>", "eos_token": EOS}, "has no token '<s>', which its tokenizer_config"),
        ([], "is no JSON object"),
        ("{", "mend or download it again"),
    ],
)
def test_a_config_that_names_no_end_says_what_it_lacks(path, content, message):
    text = content if isinstance(content, str) else json.dumps(content)
    (path.parent / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert "beside it" not in str(error.value)


def test_a_json_file_that_is_no_tokenizer_is_refused(path):
    path.write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer(path)


class Stop(BaseException):
    """A stop that a signal requests, as of `train.monitoring.interruption`."""


class PanicException(BaseException):
    """As of a library in Rust."""


@pytest.mark.parametrize(("raised", "expected"), [(Stop, Stop), (PanicException, ValueError)])
def test_a_stop_while_a_tokenizer_is_read_is_no_damaged_file(
    tmp_path, monkeypatch, raised, expected
):
    path = write_llama3_tokenizer(tmp_path)

    class Broken:
        @staticmethod
        def from_str(text):
            raise raised

    monkeypatch.setattr(tokenizers, "Tokenizer", Broken)
    with pytest.raises(expected):
        Tokenizer(path)
