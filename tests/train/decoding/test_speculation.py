"""The held-out prompts of a run, what is measured of them, and how samples are shown."""

import json

import numpy as np
import pytest
import torch

from data.dataset import VALIDATION
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.row_layout import RowLayout
from data.tokenizer import Tokenizer
from models.llama import Llama
from tests.train.decoding.test_rounds import PLAIN, PROMPTS
from train.decoding.continuation import continue_greedily
from train.decoding.prompts import Prompt, is_answered, read_prompts
from train.decoding.samples import sample_text
from train.decoding.speculation import Speculation
from train.decoding.speculation_config import SpeculationConfig
from train.loop.corpus import Corpus, open_corpus
from train.loop.data_config import DataConfig


def prompts_of(dataset, packing, **fields):
    config = SpeculationConfig(**fields)
    data = DataConfig(path=str(dataset.path), seq_len=64, packing=packing)
    corpus: Corpus = open_corpus(data, dataset.vocab_size)
    tokenizer = Tokenizer(dataset.tokenizer_path)
    windows = corpus.windows(dataset, VALIDATION, data)
    pairs = dataset.holds_pairs
    boundaries = corpus.boundaries(dataset)
    found = read_prompts(config, windows, boundaries, tokenizer, pairs=pairs, context=64)
    return found, tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer_path):
    """Return a dataset of questions and answers."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"q": f"is {n} odd", "a": "yes, it is" if n % 2 else "no"} for n in range(90)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout = RowLayout(prompt="Q: {q}\nA:", response=" {a}")
    config = PrepareConfig(
        input=(str(folder / "rows.jsonl"),),
        tokenizer=tokenizer_path,
        layout=layout,
        validation_fraction=0.4,
    )
    return prepare(config, folder / "data", workers=1)


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_held_out_pairs_are_prompts_with_their_answers(pairs, packing):
    found, tokenizer = prompts_of(pairs, packing, prompts=5)
    assert len(found) == 5
    for prompt in found:
        assert prompt.tokens[0] == tokenizer.bos_id
        text = tokenizer.decode([*prompt.tokens])
        assert text.startswith("Q: is ")
        assert text.endswith(" odd\nA:")
        n = int(text.split()[2])
        assert prompt.answer == (" yes, it is" if n % 2 else " no")
    short, _ = prompts_of(pairs, packing, prompts=5, new_tokens=found[0].answer_tokens)
    assert all(prompt.answer_tokens <= found[0].answer_tokens for prompt in short)


def test_a_task_is_read_from_a_file_and_text_that_is_none_is_one_line(pairs, tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": " 2"}\n\n{"prompt": "b", "answer": "c"}\n')
    found, tokenizer = prompts_of(pairs, "documents", task=str(path))
    assert [prompt.answer for prompt in found] == [" 2", "c"]
    assert tokenizer.decode([*found[0].tokens]) == "1 + 1 ="
    for content, message in (
        (b"", "has no example among 0"),
        (b'{"prompt": "a", "answer": 3}', 'line 1: no text in "prompt" and "answer"'),
        (b'\n{"prompt"', "line 2: "),
        (b"\xff\n", "line 1: "),
        (b'{"prompt": "\\ud800", "answer": ""}', "line 1: "),
        (b"[" * 5000, "line 1: "),
        (json.dumps({"prompt": "a " * 99, "answer": "b"}).encode(), "no example among 1 with an"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^speculation.task: ") as caught:
            prompts_of(pairs, "documents", task=str(path))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="speculation.task: .* cannot be read"):
        prompts_of(pairs, "documents", task=str(tmp_path))


def test_an_answer_is_compared_up_to_the_end_of_its_line():
    assert is_answered(" a  b", "a b")
    assert is_answered("a", "\na\nQ: and so on")
    assert not is_answered("a", "a b")
    assert not is_answered("a", "")
    assert is_answered("a\nb", "a\n b\n")
    assert not is_answered("a\nb", "a\nb\nc")


def test_a_sample_shows_text_as_it_is():
    text = sample_text("a\n```\n# b", {"E=1": "\033[2Jc", "all 2 layers": "<b>"})
    assert "````text\na\n```\n# b\n````" in text
    assert "**E=1**\n\n```text\n\N{REPLACEMENT CHARACTER}[2Jc\n```" in text


class Letters:
    """A tokenizer of letters, whose token 0 ends a row."""

    eos_id = 0

    def decode(self, ids):
        return "".join(chr(64 + each) for each in ids)


class Rank:
    """One of some ranks, run one after the other, the first last."""

    device = torch.device("cpu")

    def __init__(self, rank, world_size, parts):
        self.rank, self.world_size, self._parts = rank, world_size, parts

    @property
    def is_main(self):
        return self.rank == 0

    def gather(self, part):
        self._parts.insert(0, part)
        return self._parts


def measure_on(world_size, tokenizer):
    model = Llama(PLAIN)
    model.init_weights(1)
    answers = [None if len(prompt) % 2 else "A" for prompt in PROMPTS]
    prompts = [Prompt(tuple(p), a) for p, a in zip(PROMPTS, answers, strict=True)]
    config = SpeculationConfig(new_tokens=9, draft_layers=(1, 3), samples=2)
    before, parts = torch.get_rng_state(), []
    for rank in reversed(range(world_size)):
        own = Speculation(config, PLAIN, prompts, tokenizer, Rank(rank, world_size, parts))
        found = own.measure(model)
        assert found is None or rank == 0
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    if found is None:
        return None
    assert 0 < found.metrics.pop("perf/speculation_share") <= 1
    return found.metrics, found.samples


def test_any_number_of_ranks_finds_the_same():
    one = measure_on(1, Letters())
    assert measure_on(3, Letters()) == one  # of 10 rows, the last rank has two
    assert measure_on(7, Letters()) == one  # and the last two of these have none
    metrics, samples = one
    model = Llama(PLAIN)
    model.init_weights(1)
    choices = continue_greedily(model, PROMPTS, [4] * len(PROMPTS), 9, torch.device("cpu"))
    agrees = [
        row[2, i] == row[3, i] for row in choices.numpy() for i in range(9) if 0 not in row[3, :i]
    ]
    assert metrics["early_exit/agreement_exit_03"] == pytest.approx(np.mean(agrees))
    assert set(samples) == {"prompt_1", "prompt_2"}
    assert {f"speculation/{name}_E3_d4" for name in ("acceptance", "tokens_per_round", "bound")} < {
        *metrics
    }
    assert "speculation/exact_match" in metrics
    assert "early_exit/agreement_exit_04" not in metrics


class Broken(Letters):
    def decode(self, ids):
        raise RuntimeError("no such piece")


def test_a_text_that_cannot_be_decoded_costs_the_measurement_alone(caplog):
    assert measure_on(2, Broken()) is None
    assert "speculation: not written, no such piece; training goes on" in caplog.text


def test_settings_that_do_not_fit_are_named():
    bad = SpeculationConfig(prompts=0, draft_layers=(4,), draft_tokens=(0,), interval_steps=-1)
    names = [problem.split(":")[0].removeprefix("speculation.") for problem in bad.problems(4)]
    assert names == ["interval_steps", "prompts", "draft_layers", "draft_tokens"]
    assert [SpeculationConfig().exits_of(L) for L in (1, 2, 8)] == [(), (1,), (2, 4, 6)]
    assert SpeculationConfig().exits_of(8, (5, 3)) == (3, 5)
    assert SpeculationConfig(draft_layers=(1,)).exits_of(8, (5, 3)) == (1,)
