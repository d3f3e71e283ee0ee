"""Every exit's loss and agreement, against a plain computation and a model known by heart."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from data.shards import NO_LOSS, TokenStream
from data.windows import StreamWindows
from inference import evaluate
from inference.evaluation.exit_quality import evaluate_exits
from tests.models.test_llama import build, small


def stream_of(count, vocab=61):
    draw = np.random.default_rng(0)
    return TokenStream([draw.integers(vocab, size=count).astype(np.uint16)])


def test_measures_equal_a_plain_computation():
    model = build(small(max_seq_len=16)).eval()
    stream = stream_of(100)
    windows = StreamWindows(stream, 16)
    exits, tokens = evaluate_exits(model, windows, bytes_per_token=2.5, max_tokens=90)
    assert tokens == 80, "five windows of 16 fit into 90"
    logits = []
    for window in range(5):
        ids = torch.from_numpy(stream.read(16 * window, 17))
        _, states = model.run_layers(model.embed(ids[None, :-1]), 0, 3, exit_layers=range(3))
        logits.append(torch.stack([model.exit_logits(states[l])[0] for l in range(3)]))
    log_probs = torch.cat(logits, dim=1).log_softmax(-1)  # (exit, token, vocab)
    labels = torch.from_numpy(stream.read(1, 80))
    for l, quality in enumerate(exits):
        loss = -log_probs[l, torch.arange(80), labels].mean().item()
        choices = log_probs.argmax(-1)
        assert l + 1 == quality.E
        assert quality.loss == pytest.approx(loss, abs=1e-5)
        assert quality.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert quality.bits_per_byte == pytest.approx(loss / 2.5 / math.log(2), rel=1e-5)
        assert quality.accuracy == pytest.approx((choices[l] == labels).float().mean().item())
        assert quality.agreement == pytest.approx((choices[l] == choices[2]).float().mean().item())
    assert exits[2].agreement == 1.0 > exits[0].agreement


def test_a_model_that_knows_nothing_needs_log2_vocab_bits_per_token():
    model = build(small(vocab_size=64)).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    exits, _ = evaluate_exits(
        model, StreamWindows(stream_of(50, 64), 49), bytes_per_token=3.0, max_tokens=40
    )
    for quality in exits:
        assert quality.perplexity == pytest.approx(64, rel=1e-5)
        assert quality.bits_per_byte == pytest.approx(6 / 3, rel=1e-5)


class Masked:
    """Windows of 8 tokens, of which those of a prompt have no loss."""

    dropped_tokens = 0

    def __init__(self, learnt):
        self.learnt = learnt

    def __len__(self):
        return 3

    def read(self, i):
        labels = np.arange(8, dtype=np.int64)
        return labels, np.where(np.isin(labels, self.learnt), labels, NO_LOSS)


def test_bits_per_byte_of_pairs_are_over_the_bytes_that_are_learnt():
    model = build(small(vocab_size=64)).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    texts = {(2, 3): "\u00e9\u00e9\u00e9\u00e9", (6,): "x"}
    options = {"bytes_per_token": 99.0, "max_tokens": 24}
    exits, tokens = evaluate_exits(
        model, Masked([2, 3, 6]), decode=lambda ids: texts[tuple(ids)], **options
    )
    assert tokens == 9
    assert exits[0].bits_per_byte == pytest.approx(3 * 6 / (8 + 1), rel=1e-5)
    with pytest.raises(ValueError, match="data: none of the tokens in 3 windows of seq_len 8"):
        evaluate_exits(model, Masked([]), decode=lambda ids: texts[tuple(ids)], **options)


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="max_tokens: 0, give at least 1"):
        evaluate_exits(
            build(small()), StreamWindows(stream_of(50), 40), bytes_per_token=1, max_tokens=0
        )


def test_the_command_prints_a_table_and_writes_json(run_folder, monkeypatch, capsys, tmp_path):
    other = {"name": "other", "exits": [{"loss": 5.0 - l} for l in range(4)]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    arguments = ["--run", run_folder, "--max_tokens", 300, "--json", tmp_path / "out.json"]
    arguments += ["--plot", tmp_path / "plot.png", "--compare", tmp_path / "other.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "out.json").read_text())
    assert lines[1].split()[:3] == ["E", "loss", "perplexity"]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3", "4"]
    assert [f"{quality['loss']:.4f}" for quality in result["exits"]] == [
        line.split()[1] for line in lines[2:]
    ]
    assert result["tokens"] == 288
    assert result["name"] == "run"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "content", [None, "{}", "[" * 100_000, '{"name": "a", "exits": [{"loss": "b"}]}']
)
def test_a_file_to_compare_that_is_no_evaluation_is_one_line(
    content, run_folder, monkeypatch, capsys, tmp_path
):
    if content is not None:
        (tmp_path / "other.json").write_text(content)
    arguments = ["--run", run_folder, "--max_tokens", 50, "--plot", tmp_path / "plot.png"]
    arguments += ["--compare", tmp_path / "other.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert capsys.readouterr().err.startswith("error: compare: ")
