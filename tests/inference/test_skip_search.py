"""The search finds parts that do nothing, and its strategies are read back."""

import json
import shlex
import sys

import pytest

from data.command_line import read_options
from inference import skip_search
from inference.benchmark import BenchmarkOptions
from inference.engine.generation import Generation
from inference.engine.sampling import Sampling
from inference.loading.run import load_run
from inference.skip_search import (
    Measurement,
    SkipSearchOptions,
    draft_cost,
    find,
    next_step,
    starting_points,
    strategy_of,
)
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.registry import parse_strategy
from models.llama import NOTHING, SkippedParts, whole_layers
from tests.inference.every_strategy import PROMPTS, make_model

L = 4


@pytest.fixture(scope="module")
def model():
    """One whose layer 2, and feed-forward part of layer 3, do nothing."""
    model = make_model(L)
    for weight in (
        model.block(2).attention.wo.weight,
        model.block(2).feed_forward.w2.weight,
        model.block(3).feed_forward.w2.weight,
    ):
        weight.zero_()
    return model


def measurement(model, **changes):
    settings = {"objective": "model_cost", "d": 4, "max_new_tokens": 12, "seed": 0}
    return Measurement(model=model, sampling=Sampling(), **(settings | changes))


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["skip_search", *map(str, arguments)])
    skip_search.main()


def test_draft_cost_counts_parameters(model):
    def size(*modules):
        return sum(weight.numel() for module in modules for weight in module.parameters())

    full = size(*model.layers.values(), model.lm_head)
    block = model.block(1)
    attention = size(block.attention, block.attention_norm)
    config = model.config
    assert draft_cost(NOTHING, config) == 1.0
    found = draft_cost(SkippedParts(frozenset({0, 1}), frozenset({3})), config)
    assert found == pytest.approx(1 - (size(block) + attention) / full)
    everything = draft_cost(whole_layers(range(L)), config)
    assert everything == pytest.approx(size(model.lm_head) / full)


def test_starting_points_worked_by_hand():
    T, F = True, False
    assert starting_points(4) == [
        (F, F, F, F, F, F, F, F),
        (F, T, F, F, F, F, T, F),
        (F, T, F, T, F, F, F, F),
        (F, T, T, F, F, F, F, F),
        (F, T, F, T, F, T, F, T),
        (F, T, T, F, F, T, T, F),
        (F, F, T, T, F, F, T, T),
    ]
    assert strategy_of((F, T, F, F, T, F, T, F)).skipped == SkippedParts(
        frozenset({1}), frozenset({0, 2})
    )
    for n_layers in (1, 2, 3):
        assert all(len(choice) == 2 * n_layers for choice in starting_points(n_layers))


def test_a_draft_that_leaves_nothing_out_costs_what_it_saves(model):
    trial = measurement(model).of_choice((False,) * 8, PROMPTS)
    assert trial.agreement == trial.draft_cost == 1.0
    assert trial.strategy.gamma == 0.0, "drafts are not to stop where they are unsure"
    assert trial.score == pytest.approx(1.0)


def test_parts_that_do_nothing_are_found(model, monkeypatch):
    decoded = []

    def decode(self, strategy, prompts):
        decoded.append(prompts)
        return true_decode(self, strategy, prompts)

    true_decode = Measurement.decode
    monkeypatch.setattr(Measurement, "decode", decode)
    pairs = find(measurement(model), PROMPTS, iterations=70)
    # A warm-up, the search on every other prompt, five finalists on the others.
    assert decoded == [PROMPTS[:1]] + [PROMPTS[::2]] * 70 + [PROMPTS[1::2]] * 5
    first, again = pairs[0]
    assert again.strategy.skipped == SkippedParts(frozenset({2}), frozenset({2, 3}))
    c = draft_cost(again.strategy.skipped, model.config)
    assert again.strategy.d == 4
    assert again.score == first.score == pytest.approx(5 / (1 + 4 * c))
    assert [pair[1].score for pair in pairs] == sorted((p[1].score for p in pairs), reverse=True)


def test_the_strategy_to_use_and_the_next_command_are_named(model):
    options = SkipSearchOptions(run="a run")
    useless = tuple(l in (2, 6, 7) for l in range(2 * L))
    good = measurement(model).of_choice(useless, PROMPTS)
    use, following = next_step(options, good, 1.0).splitlines()
    strategy = use.removeprefix("use ")
    assert parse_strategy(strategy) == good.strategy
    command = ["python", "-m", "inference.benchmark", "--run", "a run", "--strategies", strategy]
    assert shlex.split(following.removeprefix("next: ")) == command
    assert read_options(BenchmarkOptions, command[3:], prog="").strategies == (strategy,)
    nothing = measurement(model).of_choice((False,) * 8, PROMPTS)
    assert next_step(options, nothing, 1.0).startswith("none is faster")


def test_the_best_d_is_the_least_when_drafts_are_wrong(model):
    trial = measurement(model).of_choice((True,) * 8, PROMPTS)
    assert trial.agreement < 0.3
    assert trial.strategy.d == 1
    c, a = trial.draft_cost, trial.agreement
    assert trial.score == pytest.approx((1 + a) / (1 + c))


def test_the_command_writes_strategies_that_decode(run_folder, monkeypatch, capsys, tmp_path):
    arguments = ("--run", run_folder, "--iterations", 20, "--d", 3, "--prompts", 4)
    arguments += ("--prompt_tokens", 8, "--max_new_tokens", 10, "--json", tmp_path / "a" / "b.json")
    run_command(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    content = json.loads((tmp_path / "a" / "b.json").read_text())
    assert content["autoregressive"] == [1.0, 1.0]
    assert "trial 1 of 20" in err
    lines, best = out.splitlines(), content["found"][0]
    assert len(content["found"]) == 5
    if best["other_prompts"]["score"] > 1.0:
        assert lines[8] == f"use {best['strategy']}"
        assert lines[9].startswith("next: python -m inference.benchmark --run ")
    else:
        assert lines[8].startswith("none is faster than autoregressive: ")
    model = load_run(run_folder, device="cpu").model
    plain = Generation(model, [[1, 5]], Autoregressive(), max_new_tokens=9).finish().tokens
    for one in content["found"]:
        strategy = parse_strategy(one["strategy"])
        assert one["strategy"] in out
        assert one["strategy"].startswith("skip_draft:attention=")
        assert Generation(model, [[1, 5]], strategy, max_new_tokens=9).finish().tokens == plain
    run_command(monkeypatch, *arguments)
    assert capsys.readouterr().out == out, "the cost model is the same every time"


def test_tokens_per_second_are_measured(run_folder, monkeypatch, capsys, tmp_path):
    run_command(
        monkeypatch,
        *("--run", run_folder, "--objective", "tokens_per_second", "--iterations", 3),
        *("--prompts", 2, "--prompt_tokens", 8, "--max_new_tokens", 6, "--d", 2),
        *("--json", tmp_path / "out.json"),
    )
    assert "3 trials, tokens/s" in capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    assert min(content["autoregressive"]) > 1.0
    assert all(one["other_prompts"]["score"] > 1.0 for one in content["found"])
    assert all("gamma" not in one["strategy"] for one in content["found"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--iterations", 0), "iterations: 0, give at least 1"),
        (("--d", 0), "d: 0, give at least 1"),
        (("--max_new_tokens", 1), "max_new_tokens: 1, give at least 2"),
        (("--prompts", 1), "prompts: 1, give at least 2"),
        (("--objective", "luck"), "objective: luck, give one of model_cost, tokens_per_second"),
    ],
)
def test_a_users_error_is_one_line(run_folder, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, "--run", run_folder, *arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert err.count("\n") == 1
