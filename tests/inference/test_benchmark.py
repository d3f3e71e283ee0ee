"""The benchmark measures all strategies on the same prompts, and writes what it measured."""

import json
import sys

import numpy as np
import pytest

from data.shards import TokenStream
from inference import benchmark
from inference.evaluation.candidates import expand_arms
from inference.evaluation.prompts import PromptSet, held_out_prompts
from inference.evaluation.report import LEGEND
from inference.evaluation.tasks import TASKS, Example
from inference.loading.run import load_run
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.early_exit import EarlyExit
from inference.strategies.self_speculative import SelfSpeculative


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    benchmark.main()


def test_the_command_measures_writes_and_draws(run_folder, monkeypatch, capsys, tmp_path):
    run_command(
        monkeypatch,
        *("--run", run_folder, "--E", "1,3", "--d", "2", "--prompts", 4, "--prompt_tokens", 8),
        *("--max_new_tokens", 12, "--repeats", 2, "--batch_size", 2),
        *("--json", tmp_path / "a" / "out.json", "--plot", tmp_path / "plot.png"),
    )
    table = capsys.readouterr().out
    result = json.loads((tmp_path / "a" / "out.json").read_text())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert {"cpu", "torch", "threads", "date"} <= result["machine"].keys()
    arms = {(arm["strategy"], arm["E"], arm["d"]): arm for arm in result["arms"]}
    assert table.rstrip().endswith(LEGEND)
    assert "\nbase: autoregressive, float32 on cpu with " in table
    assert result["base"] == "autoregressive"
    assert len(arms) == 5
    assert all(table.count(arm["settings"] + " ") >= 1 for arm in result["arms"])
    assert all(arm["peak_bytes"] is None or arm["peak_bytes"] >= 0 for arm in result["arms"])
    plain = arms["autoregressive", None, None]
    assert plain["speedup"] == plain["same_tokens"] == 1.0
    assert plain["layers_per_token"] == 4.0
    assert plain["full_choice"] == 1.0
    assert arms["early_exit", 1, None]["log_likelihood"] < plain["log_likelihood"] < 0
    assert arms["early_exit", 3, None]["layers_per_token"] == 3.0
    for E in (1, 3):
        arm = arms["self_speculative", E, 2]
        assert arm["same_tokens"] == 1.0
        assert arm["acceptance_rate"] <= arm["agreement"]
        a, c = arm["agreement"], arm["draft_cost"]
        assert arm["bound"] == pytest.approx((1 - a**3) / ((1 - a) * (1 + 2 * c)))
        assert arm["share_of_bound"] == pytest.approx(arm["speedup"] / arm["bound"])
        assert arm["verify_cost"] > 0
        drafted, accepted = (sum(arm["drafts"][f"{what}_at"]) for what in ("drafted", "accepted"))
        assert arm["acceptance_rate"] == accepted / drafted
        rejected = arm["drafts"]["stops"]["rejected"]
        assert arm["agreement"] == accepted / (accepted + rejected)
        assert sum(request["tokens"] for request in arm["requests"]) == arm["tokens"]
        assert accepted == sum(sum(request["accepted_at"]) for request in arm["requests"])


def test_sampled_tokens_are_not_compared(run_folder, monkeypatch, tmp_path):
    run_command(
        monkeypatch,
        *("--run", run_folder, "--strategies", "self_speculative", "--prompts", 1),
        *("--prompt_tokens", 8, "--max_new_tokens", 4, "--repeats", 1, "--temperature", 1),
        *("--ignore_eos", "--json", tmp_path / "out.json"),
    )
    content = json.loads((tmp_path / "out.json").read_text())
    arms = content["arms"]
    assert [arm["tokens"] for arm in arms] == [4, 4]
    assert content["workload"]["stop_tokens"] == []
    assert [arm["same_tokens"] for arm in arms] == [None, None]


def test_prompts_from_a_file_are_its_lines(run_folder, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\n\nthe moon\n")
    run_command(
        monkeypatch,
        *("--run", run_folder, "--strategies", "early_exit", "--max_new_tokens", 2),
        *("--repeats", 1, "--prompt_file", tmp_path / "prompts.txt"),
        *("--json", tmp_path / "out.json"),
    )
    content = json.loads((tmp_path / "out.json").read_text())
    workload = content["workload"]
    assert (workload["stop_tokens"], content["ignore_eos"]) == ([2], False)
    prompts = workload["prompts"]
    assert len(prompts) == 2
    assert prompts[0][0] == prompts[1][0] == 1  # BOS


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (b"caf\xe9", (), "prompts.txt is not UTF-8, give text in UTF-8"),
        (b" \n", (), "prompts.txt is empty, give one prompt on each line"),
        (None, (), "prompts.txt cannot be read (No such file or directory)"),
        (b"the cat", ("--data", "x"), "data: x, the prompts are a file's, leave --data out"),
    ],
)
def test_a_prompt_file_of_no_use_is_named(
    run_folder, monkeypatch, capsys, tmp_path, content, more, message
):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "--run", run_folder, "--prompt_file", path, *more)
    err = capsys.readouterr().err
    assert err.startswith("error: data" if more else f"error: prompt_file: {tmp_path}")
    assert message in err
    assert err.count("\n") == 1


def test_rules_stand_beside_static_exit_at_their_depth_and_every_batch_size(
    run_folder, monkeypatch, tmp_path
):
    run_command(
        monkeypatch,
        *("--run", run_folder, "--strategies", "calm:threshold=0.0:first=2", "--prompts", 3),
        *("--prompt_tokens", 8, "--max_new_tokens", 4, "--repeats", 1, "--batch_size", "1,3"),
        *("--json", tmp_path / "out.json"),
    )
    arms = json.loads((tmp_path / "out.json").read_text())["arms"]
    assert [(arm["strategy"], arm["E"], arm["batch_size"]) for arm in arms] == [
        (name, E, batch_size)
        for batch_size in (1, 3)
        for name, E in (("autoregressive", None), ("calm", None), ("early_exit", 2))
    ]
    assert arms[1]["mean_depth"] == 2.0


def test_a_tasks_answers_are_scored(run_folder, monkeypatch, capsys, tmp_path):
    rows = [f"{u}\t[IN:{i} {u} ]" for i, u in enumerate(("the cat", "a mat", "moon rise"))]
    (tmp_path / "t.tsv").write_text("\n".join(["utterance\tsemantic_parse", *rows]))
    run_command(
        monkeypatch,
        *("--run", run_folder, "--strategies", "early_exit", "--max_new_tokens", 4, "--repeats", 1),
        *("--task", "topv2", "--task_file", tmp_path / "t.tsv", "--shots", 0, "--prompts", 3),
        *("--json", tmp_path / "out.json"),
    )
    result = json.loads((tmp_path / "out.json").read_text())
    assert all(arm["scores"].keys() == {"exact", "past_end"} for arm in result["arms"])
    assert len(result["workload"]["prompts"]) == 3
    assert "exact" in capsys.readouterr().out


def test_tokens_behind_a_text_that_ends_the_answer_are_counted(run_folder):
    run = load_run(run_folder)
    prompts = PromptSet([[1], [1]], TASKS["topv2"], [Example("a", "the cat"), Example("a", "moon")])
    answer, more = run.tokenizer.encode("the cat"), run.tokenizer.encode("\n")
    ended, running = [*answer, *more, 5, 6], [*answer, run.tokenizer.eos_id, 7]
    scores = prompts.scores(run, [ended, running])
    assert scores["exact"] == 0.5
    assert scores["past_end"] == pytest.approx(2 / len(ended) / 2)


def test_arms_are_every_combination_once():
    arms = expand_arms(["autoregressive", "early_exit", "self_speculative"], (1, 2), (3, 4), 8)
    assert arms == [
        Autoregressive(),
        EarlyExit(E=1),
        EarlyExit(E=2),
        SelfSpeculative(E=1, d=3),
        SelfSpeculative(E=1, d=4),
        SelfSpeculative(E=2, d=3),
        SelfSpeculative(E=2, d=4),
    ]
    with pytest.raises(ValueError, match="E: 8, self_speculative needs 1 to 7"):
        expand_arms(["self_speculative"], (8,), (None,), 8)


def test_prompts_are_spread_over_the_held_out_text():
    stream = TokenStream([np.arange(100, dtype=np.uint16)])
    assert held_out_prompts(stream, 3, 2) == [[0, 1], [33, 34], [66, 67]]
    with pytest.raises(ValueError, match="need 120 held-out tokens but there are 100"):
        held_out_prompts(stream, 4, 30)
    with pytest.raises(ValueError, match="give at least 1 of each"):
        held_out_prompts(stream, 0, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategies", "magic"), "strategy: magic, give one of"),
        (("--repeats", 0), "repeats: 0"),
        (("--E", "1,x"), "E: 1,x, give whole numbers, at least 1, as in 1,4"),
        (("--prompt_tokens", 200), "context of 96"),
    ],
)
def test_a_users_error_is_one_line(run_folder, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, "--run", run_folder, "--prompts", 1, *arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert err.count("\n") == 1
