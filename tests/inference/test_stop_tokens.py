"""Every command that measures decodes to EOS, as generation does, unless it is to go on."""

import sys

import pytest

from inference import benchmark, calibrate, oracle, skip_search, tune
from inference.engine.generation import Generation
from inference.loading.run import load_run
from inference.text.model import Model

FEW = ("--prompts", 2, "--prompt_tokens", 4, "--max_new_tokens", 2)
COMMANDS = {
    benchmark: ("--strategies", "calm,self_speculative", "--repeats", 1),
    tune: ("--quick", "--max_d", 1, "--repeats", 1),
    oracle: (),
    calibrate: ("--steps", 1, "--delta", 0.9),
    skip_search: ("--iterations", 1),
}


@pytest.fixture
def stops(monkeypatch):
    """The stop tokens of every generation."""
    found, init = [], Generation.__init__

    def noting(generation, *args, stop_tokens=(), **options):
        found.append((*stop_tokens,))
        init(generation, *args, stop_tokens=stop_tokens, **options)

    monkeypatch.setattr(Generation, "__init__", noting)
    return found


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_a_measurement_ends_where_the_answer_does(module, run_folder, monkeypatch, stops, tmp_path):
    monkeypatch.setattr(module, "write_tuned", lambda *_: tmp_path, raising=False)
    eos = (load_run(run_folder).tokenizer.eos_id,)
    both = (((), eos), (("--ignore_eos",), ()))
    for more, expected in both if module is benchmark else both[:1]:
        stops.clear()
        arguments = ["--run", run_folder, *FEW, *COMMANDS[module], *more]
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        module.main()
        assert {*stops} == {expected}


def test_generation_ends_there_too(run_folder, stops):
    run = load_run(run_folder)
    Model(run).generate("the cat", strategy="autoregressive", max_new_tokens=2)
    assert stops == [run.stop_tokens] == [(run.tokenizer.eos_id,)]
