"""Another model's drafts cost no token, whatever prompts its rows have held."""

import pytest
import torch

from inference.engine.compiled import compile_layers, is_compiled
from inference.engine.decoder import advancing
from inference.engine.prefill import allocate, prefill
from inference.engine.sampling import Sampling
from inference.loading.run import load_run
from inference.strategies import speculative
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.registry import parse_strategy
from inference.strategies.speculative import Speculative, check_tokenizer
from models.llama import NOTHING
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.inference.strategies.test_self_speculative import excess
from tests.models.test_llama import build, small


@pytest.fixture(scope="module")
def model():
    return make_model(4)


def drafting_with(monkeypatch, draft_model):
    class Loaded:
        model = draft_model

    monkeypatch.setattr(speculative, "_load", lambda *where: Loaded)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("same", [False, True])
def test_greedy_tokens_are_autoregressive_decodings(model, monkeypatch, d, same, tmp_path):
    draft = model if same else build(small(n_layers=2, n_kv_heads=2), seed=2).eval()
    drafting_with(monkeypatch, draft)
    strategy = Speculative(draft=tmp_path, d=d)
    prompts = [*PROMPTS, [11], [3, 4, 5, 6, 7, 8, 9], [3, 4], [17, 18, 19]]
    plain = [decode(model, [prompt], Autoregressive()).tokens[0] for prompt in prompts]
    stops = [plain[0][2], plain[4][5]]
    cut = [decode(model, [p], Autoregressive(), stop_tokens=stops).tokens[0] for p in prompts]
    for options in ({}, {"batch_size": 2}, {"batch_size": 3}, {"async_readback": True}):
        found = decode(model, prompts, strategy, **options)
        assert found.tokens == plain
        assert decode(model, prompts, strategy, stop_tokens=stops, **options).tokens == cut
        if same:  # also after a row was given another prompt
            assert found.counters.accepted > 0.98 * found.counters.drafted
    alone = decode(model, prompts[:1], strategy).counters
    assert alone.draft_token_layers > 0
    assert alone.token_layers == 4 * (alone.drafted + alone.rounds)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_work_is_what_hooks_count(model, monkeypatch, batch_size, tmp_path):
    draft = build(small(n_layers=2, n_kv_heads=2), seed=2).eval().requires_grad_(False)
    drafting_with(monkeypatch, draft)
    counted = {}

    def count(key, modules):
        def hook(module, args, output):
            counted[key] = counted.get(key, 0) + output.shape[0] * output.shape[1]

        return [module.register_forward_hook(hook) for module in modules]

    hooks = count("layers", model.layers.values()) + count("draft", draft.layers.values())
    hooks += count("heads", [model.norm]) + count("draft heads", [draft.norm])
    strategy = Speculative(draft=tmp_path, d=3)
    counters = decode(model, PROMPTS, strategy, batch_size=batch_size).counters
    for hook in hooks:
        hook.remove()
    assert counters.token_layers + counters.prompt_token_layers == counted["layers"]
    assert counters.draft_token_layers == counted["draft"]
    assert counters.head_evaluations == counted["heads"]
    assert counters.draft_head_evaluations == counted["draft heads"]


def test_the_draft_model_runs_a_prompt_once(model, monkeypatch, tmp_path):
    drafting_with(monkeypatch, build(small(n_layers=2, n_kv_heads=2), seed=2).eval())
    prompt, d = list(range(30)), 3
    counters = decode(model, [prompt], Speculative(draft=tmp_path, d=d)).counters
    # The prompt less its last two tokens; in every round those two and the drafts but the last.
    in_rounds = counters.draft_token_layers / 2 - (len(prompt) - 2)
    assert in_rounds - counters.drafted in (counters.rounds, counters.rounds - 1)


def test_a_draft_that_is_the_model_is_right_after_rounds_without_room(model, monkeypatch, tmp_path):
    drafting_with(monkeypatch, model)
    state = allocate(model, 2, slots=60, sampling=Sampling(), seed=0)
    prefill(state, PROMPTS[:2], (4, NOTHING))
    decoder = advancing(state.batch, Speculative(draft=tmp_path, d=3).start(state))
    syncs = []
    for max_tokens in (9, 9, 1, 9, 1, 1, 1, 9, 9, 2, 9):
        result = decoder(max_tokens)
        assert (result.accepted == result.drafted).all()
        syncs.append(state.counters.syncs)
    assert syncs == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3], "it syncs only where it may be behind"


def test_sampled_tokens_have_the_full_models_distribution(biased_model, monkeypatch, tmp_path):
    config = small(n_layers=2, dim=16, n_heads=2, n_kv_heads=1, vocab_size=6)
    draft = build(config, seed=9).eval().requires_grad_(False)
    drafting_with(monkeypatch, draft)
    hot, name = Sampling(temperature=1.0), f"speculative:draft={tmp_path}"
    assert excess(biased_model, hot, E=None, d=2, name=name) < 4
    monkeypatch.setattr(speculative, "sample", lambda weights, generator: weights.argmax(-1))
    assert excess(biased_model, hot, E=None, d=2, name=name) > 20


def test_a_checkpoint_drafts_for_itself(run_folder):
    run = load_run(run_folder)
    strategy = parse_strategy(f"speculative:draft={run_folder}:d=3")
    check_tokenizer(strategy, run)
    counters = decode(run.model, [[1, 5, 9]], strategy, max_new_tokens=12).counters
    assert counters.acceptance_rate == 1.0
    assert counters.tokens == 12


def test_the_draft_of_a_compiled_model_is_compiled(run_folder, monkeypatch):
    run, loaded = load_run(run_folder), []

    def load(*args, **kwargs):
        loaded.append(load_run(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(speculative, "load_run", load)
    for compiled in (False, True):
        if compiled:
            compile_layers(run.model)
        speculative._load.cache_clear()
        state = allocate(run.model, 1, slots=16, sampling=Sampling(), seed=0)
        Speculative(draft=run_folder, d=2).start(state)
        assert is_compiled(loaded.pop().model) == compiled


def test_what_does_not_fit_is_refused(model, run_folder, monkeypatch, tmp_path):
    run = load_run(run_folder)
    with pytest.raises(ValueError, match="has a vocabulary of 290 and the model one of 61"):
        decode(model, PROMPTS, Speculative(draft=run_folder))
    with pytest.raises(ValueError, match="draft: none, .* give draft=DIR; d: 0"):
        decode(model, PROMPTS, Speculative(d=0))
    monkeypatch.setattr(run.tokenizer, "fingerprint", "0" * 64)
    with pytest.raises(ValueError, match="has tokenizer .* give a model trained with the same"):
        check_tokenizer(Speculative(draft=run_folder), run)
    drafting_with(monkeypatch, build(small(max_seq_len=10)).eval())
    with pytest.raises(ValueError, match="has a context of 10, but rows may have 28 tokens"):
        decode(model, PROMPTS, Speculative(draft=tmp_path))
    assert torch.is_inference_mode_enabled() is False
