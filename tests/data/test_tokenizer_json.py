"""A SentencePiece model written as tokenizer.json gives the same ids, or is refused."""

import argparse
import inspect
import io
import json
import random

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from data.hugging_face import PROOF_TEXTS, find_tokenizer, prove_same_ids, write_tokenizer
from data.tokenizer import Tokenizer
from data.tokenizer_json import tokenizer_json

PLAIN = inspect.getsource(argparse)  # without some characters of "<0x0A>" and "</s>"
TEXT = PLAIN + "caf\u00e9 \u65e5\u672c <p> </p> 0x0F 0xA9\n" * 40
SYMBOLS = ["[U]", "user\u2581symbol", "<|x|>"]
PARTS = (
    *(" ", "  ", " " * 5, " " * 16, " " * 33, "\n", "\r\n", "\t\t", "\0", "\x01", "\x7f", "\x85"),
    *("\u2028", "\u00a0", "\u3000", "\u2581", "\ufeff", "\ufffd", "\u0301", "e\u0301", "\u00e9"),
    *("\u65e5\u672c", "\U0001f389", "\U0001f469\u200d\U0001f467", "\ufb01", "\U0010ffff", "\u202e"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "<0xFF>", "<", "--", "----", "aba", "ab", "12", "3.14"),
    *("the", " the", "self", "return", "document", "[U]", "[U", "user symbol", "<|x|>"),
)


def random_texts(count, seed=0):
    """Return other texts than the export itself is proven with: these name special tokens too."""
    draw = random.Random(seed)
    texts = [""]
    while len(texts) < count:
        text = "".join(draw.choices(PARTS, k=draw.choice((1, 2, 4, 8, 20))))
        text += chr(draw.randrange(1, 0xD800))
        if draw.random() < 0.3:
            start = draw.randrange(len(TEXT))
            text += TEXT[start : start + 60]
        texts.append(text)
    return texts


def train(text=TEXT, **settings):
    model = io.BytesIO()
    fixed = {"model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "split_digits": True}
    fixed |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    fixed |= {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        minloglevel=2,
        **(fixed | settings),
    )
    return model.getvalue()


def load(model):
    rust = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(model)))
    rust.encode_special_tokens = True
    return sentencepiece.SentencePieceProcessor(model_proto=model), rust


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": True},
        {"user_defined_symbols": SYMBOLS},
        {"split_by_whitespace": False, "max_sentencepiece_length": 32},
    ],
    ids=["ours", "llama 2", "symbols", "across words"],
)
def test_ids_and_texts_of_bpe_are_equal(settings):
    ours, rust = load(train(**settings))
    for text in random_texts(2000):
        ids = ours.encode(text)
        assert rust.encode(text, add_special_tokens=False).ids == ids
        assert rust.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("settings", [{}, {"text": PLAIN}, {"user_defined_symbols": SYMBOLS}])
def test_ids_of_unigram_are_equal_but_for_ties(settings):
    ours, rust = load(train(model_type="unigram", **settings))
    ties = 0
    for text in random_texts(2000):
        ids, theirs = ours.encode(text), rust.encode(text, add_special_tokens=False).ids
        ties += ids != theirs
        assert sorted(ids) == sorted(theirs), text
        assert rust.decode(ids) == ours.decode(ids)
    assert ties < 60


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"remove_extra_whitespaces": True}, "removes extra white space"),
        ({"treat_whitespace_as_suffix": True}, "puts white space behind words"),
        ({"byte_fallback": False, "vocab_size": 300}, "has no byte fallback"),
        ({"model_type": "char", "vocab_size": 330, "hard_vocab_limit": False}, "neither bpe nor"),
        ({"user_defined_symbols": SYMBOLS, "add_dummy_prefix": True}, "a dummy prefix, which"),
    ],
)
def test_what_cannot_be_said_exactly_is_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        tokenizer_json(train(**settings))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_auto_tokenizer_puts_bos_first_and_names_special_tokens(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "t.model"
    path.write_bytes(train(model_type=kind))
    tokenizer = Tokenizer(path)
    write_tokenizer(tokenizer, tmp_path, max_seq_len=77)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (1, 2, 600)
    assert loaded.model_max_length == 77
    for text in ["", "self  return", "<s>text</s>"]:
        ids = loaded(text)["input_ids"]
        assert ids == [1, *tokenizer.encode(text)]
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert f"ids of {PROOF_TEXTS} texts equal transformers'" in prove_same_ids(tokenizer, tmp_path)


@pytest.mark.parametrize("prefix", [False, True])
def test_an_export_names_the_space_that_llama_cpp_is_to_put_first(tmp_path, prefix):
    path = tmp_path / "t.model"
    path.write_bytes(train(add_dummy_prefix=prefix))
    write_tokenizer(Tokenizer(path), tmp_path, max_seq_len=77)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is prefix
    prove_same_ids(Tokenizer(path), tmp_path)


def test_another_tokenizer_is_not_proven(tmp_path):
    for name, size in (("a.model", 600), ("b.model", 590)):
        (tmp_path / name).write_bytes(train(vocab_size=size))
    write_tokenizer(Tokenizer(tmp_path / "a.model"), tmp_path, max_seq_len=77)
    with pytest.raises(ValueError, match="so nothing was written"):
        prove_same_ids(Tokenizer(tmp_path / "b.model"), tmp_path)


def test_the_tokenizer_of_a_folder_is_found(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        find_tokenizer(tmp_path, 400)
    path = tmp_path / "t.model"
    path.write_bytes(train())
    write_tokenizer(Tokenizer(path), tmp_path, max_seq_len=77)
    assert find_tokenizer(tmp_path, 600).name == "tokenizer.model"
    assert find_tokenizer(tmp_path, 700).name == "tokenizer.json"  # ids were added there


def llama2():
    """Return a model with Llama 2's runs of spaces: all of the same, lowest score, none of 15."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(train(add_dummy_prefix=True))
    for piece in proto.pieces:
        if set(piece.piece) == {"\u2581"}:
            piece.score = -1e9
    known = {piece.piece for piece in proto.pieces}
    for length in (16, *range(14, 1, -1)):
        if "\u2581" * length not in known:
            proto.pieces.add(piece="\u2581" * length, score=-1e9)
    return proto


def test_runs_of_one_score_merge_from_the_left():
    ours, rust = load(llama2().SerializeToString())
    for text in [f"{' ' * n}{end}" for n in range(120) for end in ("", "x", "the", "\n ")]:
        assert rust.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_other_merges_of_one_score_are_refused():
    proto = llama2()
    words = [piece for piece in proto.pieces if piece.piece.isalpha() and len(piece.piece) > 1]
    words[0].score = words[1].score
    with pytest.raises(ValueError, match="has merges of the same score"):
        tokenizer_json(proto.SerializeToString())
