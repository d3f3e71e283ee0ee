"""Texts end at EOS or at their limit, in their order, and torn characters come with the end."""

import pytest

from inference.engine.counters import Counters
from inference.engine.generation import Emission
from inference.engine.sampling import Sampling
from inference.loading.run import load_run
from inference.strategies.autoregressive import Autoregressive
from inference.text import stream
from inference.text.continuation import provenance

TORN = "\N{REPLACEMENT CHARACTER}"


class ScriptedGeneration:
    """Emits what a test wrote down."""

    def __init__(self, script, prompts):
        self.prompts, self.tokens = prompts, [[] for _ in prompts]
        self.drafts = [None for _ in prompts]
        self.counters, self.finished = Counters(), False
        self._script = iter(script)

    def __next__(self):
        emissions = next(self._script)
        for emission in emissions:
            self.tokens[emission.prompt_index] += emission.tokens
        return emissions

    def finish(self):
        self.finished = True


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder)


def open_stream(monkeypatch, run, script, prompts, max_new_tokens):
    monkeypatch.setattr(
        stream,
        "Generation",
        lambda _, encoded, *args, **options: ScriptedGeneration(script, encoded),
    )
    return stream.TextStream(
        run, prompts, Autoregressive(), max_new_tokens=max_new_tokens, sampling=Sampling(), seed=0,
        batch_size=2,
    )  # fmt: skip


def test_half_a_character_at_the_end_comes_with_the_last_token(monkeypatch, run):
    cat = run.tokenizer.encode("\U0001f408")
    script = [[Emission(0, [*cat, *cat[:-1]], 3, 8)]]
    texts = open_stream(monkeypatch, run, script, ["the"], 7)
    pieces = [*texts]
    [found] = texts.continuations()
    assert found.text == "".join(piece.text for piece in pieces)
    assert found.text.startswith("\U0001f408")
    assert {*found.text[1:]} == {TORN}
    assert [piece.text for piece in pieces[:3]] == [""] * 3
    assert pieces[-1].text == found.text[1:]
    assert found.provenance == ["accepted"] * 3 + ["corrected"] * 4


def test_each_text_is_yielded_when_it_and_those_before_have_ended(monkeypatch, run):
    cat, mat = (run.tokenizer.encode(text)[:1] for text in ("cat", "mat"))
    script = [
        [Emission(0, cat, 0, 0), Emission(1, [*mat, run.tokenizer.eos_id], 1, 1)],
        [Emission(0, cat * 2, 0, 0)],
        [Emission(2, cat * 3, 0, 0)],
    ]
    texts = open_stream(monkeypatch, run, script, ["a", "b", "c"], 3)
    found = texts.continuations()
    generation = texts._generation
    assert len(next(found).tokens) == 3
    assert next(found).tokens == [*mat, run.tokenizer.eos_id]
    assert generation.tokens[2] == [], "the last text is not decoded before the first are yielded"
    assert next(found).tokens == cat * 3
    assert not generation.finished
    assert [*found] == []
    assert generation.finished, "a generation that was left would keep its graphs"


def test_tokens_of_a_round_have_their_provenance():
    assert provenance(Emission(0, [4, 5, 6], 2, 3)) == ["accepted"] * 2 + ["corrected"]
    assert provenance(Emission(0, [4, 5], 2, 3)) == ["accepted"] * 2
    assert provenance(Emission(0, [4], 0, 0)) == ["plain"]
