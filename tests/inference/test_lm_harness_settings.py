"""A task's settings are read as the harness's own models read them; lm_eval is not needed."""

from types import SimpleNamespace

import pytest

from inference.engine.sampling import Sampling
from inference.lm_harness import HarnessModel, _cut, _generation_settings
from inference.loading.run import load_run
from inference.strategies.autoregressive import Autoregressive


@pytest.mark.parametrize(
    ("options", "most", "sampling"),
    [
        ({}, 256, Sampling()),
        ({"max_gen_toks": None, "temperature": None, "do_sample": None}, 256, Sampling()),
        ({"max_new_tokens": 7}, 7, Sampling()),
        ({"max_tokens": "8", "until": None}, 8, Sampling()),
        ({"max_completion_tokens": 5}, 5, Sampling()),
        ({"max_tokens": 8, "max_new_tokens": 7, "max_gen_toks": 6}, 6, Sampling()),
        ({"do_sample": False, "temperature": 0.8, "top_p": 0.5, "top_k": 3}, 256, Sampling()),
        ({"temperature": 0.8, "top_k": 0}, 256, Sampling(temperature=0.8)),
        (
            {"do_sample": True, "top_k": 3, "top_p": 1},
            256,
            Sampling(temperature=1, top_k=3, top_p=1),
        ),
        ({"do_sample": True, "temperature": 0}, 256, Sampling()),
    ],
)
def test_settings_of_a_task(options, most, sampling):
    assert _generation_settings(options) == (most, sampling)


def test_a_task_that_asks_for_no_token_is_refused():
    with pytest.raises(ValueError, match="max_gen_toks: 0, a task asks for none, give"):
        _generation_settings({"max_tokens": 0})


@pytest.mark.parametrize("until", [None, [], "", [""], "z", ["z", None]])
def test_a_text_is_cut_only_where_it_ends(until):
    assert _cut("abc", until) == "abc"
    assert _cut("abc", "b") == _cut("abc", ["c", "b"]) == "a"


@pytest.mark.parametrize("most", [1, 95, 96, 256, 10**9])
@pytest.mark.parametrize("words", [1, 500])
def test_any_number_of_tokens_fits_a_context_of_96(run_folder, most, words):
    run = load_run(run_folder)
    model = HarnessModel(run, E=4, strategy=Autoregressive(), batch_size=2)
    request = SimpleNamespace(args=("the cat " * words, {"until": None, "max_new_tokens": most}))
    [text] = model.generate_until([request])
    room = 96 - (min(len(model.tok_encode(request.args[0])), 96 - most if most < 96 else 48))
    [tokens] = [run.tokenizer.encode(text)]
    assert len(tokens) <= 4 * min(most, room)
