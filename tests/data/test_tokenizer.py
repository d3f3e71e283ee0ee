import io
import json
import pickle
import random
from pathlib import Path

import pytest
import sentencepiece

import data.tokenizer
from data.tokenizer import Tokenizer, train_tokenizer

DIFFICULT = [
    "",
    "\n",
    "\n\n\n",
    " ",
    "   leading",
    "trailing   ",
    " " * 100 + "x",
    "\t\ttabs\t",
    "windows\r\nlines\r\n",
    "    def f(x):\n\treturn  x\n\n",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f389\u200d\U0001f680",
    "line\u2028separator\x85\x0b\x0c\x1c",
    "\ufeffbom \ufffd",
    "<s>not BOS</s> <unk> <0x0A>",
    "e\u0301 is not \u00e9; \ufb01 is not fi",
    "0123456789 3.14159",
    "\x00\x01\x7f",
    "no newline at all " * 500,
    "one line\n" * 1000,
]


@pytest.mark.parametrize("text", DIFFICULT)
def test_round_trip_is_exact_on_difficult_text(tokenizer_path: Path, text: str) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_is_exact_on_random_text(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    rng = random.Random(0)
    alphabet = "ab \n\t\r<>s/_0\u00e9\u65e5\U0001f389\u0301\u00a0"
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 60)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_one_lossy_character_becomes_a_space(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_pieces_give_the_ids_of_the_whole_text(tokenizer_path: Path, documents: list[str]) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    text = "".join(documents)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    assert len(list(tokenizer.encode_pieces(text))) > 10
    assert tokenizer.encode(text) == processor.encode(text)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"add_dummy_prefix": True},  # As in Llama 2.
        {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True, "add_dummy_prefix": True},
        {"split_by_whitespace": False, "vocab_size": 400},
        # Whose runs of spaces may be cut in several ways of the same score.
        {"model_type": "unigram", "allow_whitespace_only_pieces": False},
    ],
)
def test_pieces_change_no_id_for_any_kind_of_model(
    tmp_path: Path,
    documents: list[str],
    kind: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data.tokenizer, "_PIECE_CHARS", 3)  # Many cuts.
    settings = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    settings |= {"allow_whitespace_only_pieces": True} | kind
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(documents).split("\n")),
        model_writer=model,
        model_type=settings.pop("model_type", "bpe"),
        vocab_size=settings.pop("vocab_size", 310),
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
        **settings,
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    rng = random.Random(0)
    words = ["self", "return", " ", "  ", "     ", "caf\u00e9", "x", "\t", "12", "layer ", "\n"]
    for newlines in (True, False):
        text = "".join(rng.choices(words if newlines else words[:-1], k=2000)) + "x "
        assert Tokenizer(path).encode(text) == processor.encode(text)


def test_text_without_white_space_is_cut_into_bounded_pieces(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    text = "".join(random.Random(0).choices("selfdraft\u65e5", k=200_000))
    pieces = [tokenizer.decode(ids) for ids in tokenizer.encode_pieces(text)]
    assert [len(piece) for piece in pieces] == [65536, 65536, 65536, 200_000 - 3 * 65536]
    assert "".join(pieces) == text


def test_training_twice_gives_the_same_file(tmp_path: Path, documents: list[str]) -> None:
    train_tokenizer(documents, 300, tmp_path / "a.model")
    train_tokenizer(documents, 300, tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_special_ids_are_fixed_and_never_in_text(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 320)
    assert min(tokenizer.encode("".join(DIFFICULT))) > 2
    assert tokenizer.decode([1, *tokenizer.encode(" x\n"), 2]) == " x\n"


def test_long_lines_take_part_in_training(tmp_path: Path) -> None:
    train_tokenizer(["zebra " * 100_000], 268, tmp_path / "tokenizer.model")
    assert len(Tokenizer(tmp_path / "tokenizer.model").encode("zebra")) < len("zebra")


def test_pickled_tokenizer_encodes_the_same(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(DIFFICULT[9]) == tokenizer.encode(DIFFICULT[9])


@pytest.mark.parametrize("content", [b"", b"no model", bytes(100)])
def test_file_that_is_no_model_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.model is not a SentencePiece model, give"):
        Tokenizer(path)


def test_missing_model_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.model is not a file, give"):
        Tokenizer(tmp_path / "absent.model")


def test_text_too_small_for_the_vocabulary_names_the_largest_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size 2048 is too large .* at most \d+$"):
        train_tokenizer(["hello world"], 2048, tmp_path / "tokenizer.model")
    assert not (tmp_path / "tokenizer.model").exists()


def test_vocabulary_too_small_for_the_bytes_names_the_smallest_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small .* above \d+$"):
        train_tokenizer(["hello world"], 100, tmp_path / "tokenizer.model")


def test_an_id_without_a_piece_becomes_one_character(tokenizer_path: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "tokenizer.json"
    ids = {"<s>": 0, "</s>": 1, "a": 2, "b": 5}
    inner = {"type": "WordLevel", "vocab": ids, "unk_token": "a"}
    outer = {"version": "1.0", "model": inner, "added_tokens": [], "decoder": {"type": "Fuse"}}
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer": outer}
    theirs.write_text(json.dumps(named))
    gaps = Tokenizer(theirs)
    assert gaps.vocab_size == 6
    assert gaps.decode([3, 2, 4, 5, 6, 9**9, -1]) == "\ufffda\ufffdb\ufffd\ufffd\ufffd"
    ours = Tokenizer(tokenizer_path)
    text = ours.encode("a caf\u00e9")
    assert ours.decode([*text, ours.vocab_size, *text]) == "a caf\u00e9\ufffda caf\u00e9"
    assert ours.decode([]) == ""
