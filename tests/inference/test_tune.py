"""The tuner's costs and agreement lead to its predictions, and generate uses what it found."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from inference import generate, tune
from inference.engine.sampling import Sampling
from inference.evaluation.candidates import candidates
from inference.evaluation.measurement import AUTOREGRESSIVE, Workload, measure
from inference.evaluation.prediction import predict
from inference.evaluation.round_breakdown import (
    prediction_table,
    round_cost_breakdown,
    round_table,
    round_terms,
)
from inference.loading.machine import processor
from inference.loading.run import load_run
from inference.loading.tuned import (
    Conditions,
    Tuned,
    conditions_of,
    read_tuned,
    tuned_path,
    write_tuned,
)
from inference.strategies.dynamic import Dynamic
from inference.strategies.registry import shorten
from inference.strategies.self_speculative import SelfSpeculative
from tests.inference.evaluation.test_costs import OF_FOUR_LAYERS, OF_THREE_LAYERS
from tests.inference.every_strategy import PROMPTS, make_model


def test_the_table_of_predictions():
    trace = torch.tensor([[1.0, 0, 1, 1, 0, 1], [1.0] * 6, [1.0] * 6])[..., None]
    table = prediction_table(predict([trace], OF_THREE_LAYERS, 2), 3).splitlines()
    assert [row.split()[0] for row in table] == ["E", "1", "2"]
    of = dict(zip(table[0].split(), table[2].split(), strict=True))
    assert of == {
        "E": "2", "d": "2", "branch": "1", "agrees": "1.000", "tokens/round": "3.00",
        "draft": "1.80", "verify": "0.40", "head": "0.50", "overhead": "0.05", "speedup": "1.09x",
        "without_draft": "3.16x", "without_head": "1.33x",
    }  # fmt: skip


def test_a_round_shorter_than_one_of_its_terms_is_no_negative_speedup():
    costs = replace(OF_THREE_LAYERS, rounds=[(0.1, 0.2), (0.1, 0.2)])
    table = prediction_table(predict([torch.ones(3, 3, 1)], costs, 2), 3).splitlines()
    assert table[1].split()[-2] == "-"
    assert "x" in table[1].split()[-3]


def test_dynamic_gets_the_costs_that_were_measured():
    rounds = [(0.1234, 1.7), (0.3, 1.5), (0.5, 1.45), (0.7, -0.1), (2.0, 2.0)]
    costs = replace(OF_FOUR_LAYERS, draft=[0.2, 0.3, 0.5, 0.7, 1.0], rounds=rounds, lookup=1.234)
    predictions = predict([torch.ones(6, 4, 1)], costs, 2)
    # By prediction E = 4, 2, 1, 3, 5 in this order, as all agree.
    arms = candidates(predictions, costs, 5, top=1)
    expected = Dynamic(
        d=5,
        exits=(1, 2, 4),
        draft_costs=(0.12, 0.3, 0.7),
        verify_costs=(1.7, 1.5, 0.01),
    )
    assert [arm for arm in arms if arm.name == "dynamic"] == [
        expected,
        *(replace(expected, lookup_cost=1.23, ngram=n) for n in (2, 3)),
    ]
    assert {arm.E for arm in arms if arm.name == "self_speculative"} == {4}
    noisy = candidates(predictions, replace(costs, lookup=0.4), 5, top=1, ngrams=(2,))
    assert noisy[-1] == replace(expected, lookup_cost=1.0, ngram=2)


def test_leaves_are_confirmed_where_they_are_predicted_to_pay():
    chances = torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.8, 0.1], [1.0, 0.0, 0.0]])[:, None]
    costs = replace(OF_THREE_LAYERS, leaves=(0.0123, 0.0001))
    predictions = predict([chances.expand(-1, 40, -1)], costs, 2)
    assert predictions[0].branch == 3
    drafting = [SelfSpeculative(E=p.E, d=p.d, branch=p.branch) for p in predictions]
    plain = next(strategy for strategy in drafting if strategy.branch == 1)
    arms = candidates(predictions, costs, 2, top=1, ngrams=(2,))
    stopping = replace(drafting[0], d=2, stop=0.5)
    dynamic = Dynamic(
        d=2, branch=3, exits=(1, 2), draft_costs=(0.55, 0.75), verify_costs=(1.4, 1.25),
        leaf_costs=(0.012, 0.001),
    )  # fmt: skip
    assert arms == [
        AUTOREGRESSIVE, drafting[0], stopping, replace(stopping, ngram=2), plain,
        dynamic, replace(dynamic, lookup_cost=1.4, ngram=2),
    ]  # fmt: skip
    dear = predict([chances.expand(-1, 40, -1)], replace(costs, leaves=(9.0, 0.0)), 2)
    assert all(arm.branch == 1 for arm in candidates(dear, costs, 2, top=1)[1:])


def test_every_arm_has_a_row_of_where_its_time_went():
    model, costs = make_model(3), replace(OF_THREE_LAYERS, layers=[0.8, 1.0, 1.2])
    workload = Workload(
        prompts=PROMPTS[:1], max_new_tokens=12, batch_size=1, sampling=Sampling(), seed=0
    )
    arms = [
        AUTOREGRESSIVE,
        SelfSpeculative(E=1, d=2),
        SelfSpeculative(E=2, d=2, stop=0.05, ngram=1),
        Dynamic(d=2, probe=1, verify_costs=(0.2,), lookup_cost=0.2, ngram=1),
        SelfSpeculative(E=1, d=2, branch=3),
    ]
    results = measure(model, arms, workload, repeats=1, report=lambda line: None)
    plain, drafted, *_ = map(round_cost_breakdown, results, [costs] * 5)
    assert plain == pytest.approx({"draft": 0.0, "verify": 0.8, "head": 0.1})
    assert drafted["draft"] == pytest.approx(3 * 0.4, rel=0.2)  # the last round has less room
    assert drafted["verify"] == pytest.approx(1.2 * 2 / 3, rel=0.1)
    assert drafted["head"] == pytest.approx(2 * 0.1 + 0.3, rel=0.2)
    by_hand = replace(  # 2 rounds that draft, 1 of n-gram drafts alone, 1 plain
        results[1], passes=[(0, 1, 1, 6), (0, 3, 1, 1), (0, 3, 3, 1), (1, 3, 3, 2)],
        head_passes=[(1, 5), (3, 3)],
    )  # fmt: skip
    terms = round_cost_breakdown(by_hand, costs)
    assert terms["draft"] == pytest.approx(6 * 0.4 / 4)
    assert terms["verify"] == pytest.approx((0.8 + 1.2 + 2 * 1.2 * 2 / 3) / 4)
    assert terms["head"] == pytest.approx((5 * 0.1 + 3 * 0.3) / 4)
    rounds = round_terms(results, costs)
    header, *rows = (line.split() for line in round_table(rounds).splitlines())
    assert [row[0] for row in rows] == [shorten(result.settings) for result in results]
    for result, row in zip(results, rows, strict=True):
        of = dict(zip(header, row, strict=True))
        took = float(of["worth"]) / result.speedup
        assert float(of["took"]) == pytest.approx(took, rel=0.02, abs=0.02)
        parts = [float(of[term]) for term in ("draft", "verify", "head", "overhead")]
        assert sum(parts) == pytest.approx(float(of["took"]), abs=0.03)
        assert float(of[of["most_on"]]) == max(parts)
        layers = sum((stop - start) * n * times for start, stop, n, times in result.passes)
        assert layers == pytest.approx(12 * result.layers_per_token)
        heads = sum(n * times for n, times in result.head_passes)
        assert heads == pytest.approx(12 * result.heads_per_token)
        if result.tokens_per_verify:
            assert float(of["worth"]) == pytest.approx(result.tokens_per_verify, abs=0.01)


def run_command(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    module.main()


@pytest.fixture
def folder(run_folder, tmp_path):
    """A copy of the run, beside which things may be kept."""
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run"


def tune_a_little(monkeypatch, folder, *arguments):
    run_command(
        monkeypatch, tune, "--run", folder, "--prompts", 2, "--prompt_tokens", 8,
        "--max_new_tokens", 12, "--repeats", 1, *arguments,
    )  # fmt: skip


def generate_a_little(monkeypatch, capsys, folder, *arguments):
    """Return what is printed on stderr."""
    run_command(
        monkeypatch, generate, "--run", folder, "--prompt", "the", "--max_new_tokens", 3, *arguments
    )
    return capsys.readouterr().err


def tuned_under(run, strategy, **changes):
    conditions = conditions_of(run, batch_size=1, quantize=None)
    return Tuned(strategy=strategy, conditions=replace(conditions, **changes))


def test_a_threshold_is_tuned_under_the_agreement_asked_for(folder, tmp_path, monkeypatch, capsys):
    tune_a_little(
        monkeypatch, folder, "--strategy", "calm:first=2", "--thresholds", "0,1.1",
        "--min_agreement", 0.999, "--json", tmp_path / "out.json",
    )  # fmt: skip
    content = json.loads((tmp_path / "out.json").read_text())
    settings = {arm["settings"]: arm for arm in content["measured"]}
    never, always = settings["calm:threshold=1.1:first=2"], settings["calm:threshold=0.0:first=2"]
    assert never["full_choice"] == never["same_tokens"] == 1.0
    assert always["mean_depth"] == 2.0
    assert always["full_choice"] < 0.999
    assert content["strategy"] in (None, "calm:threshold=1.1:first=2")
    assert "predicted:" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tune_a_little(monkeypatch, folder, "--strategy", "early_exit:E=1")
    assert "early_exit:E=1 has nothing to tune" in capsys.readouterr().err


def test_a_threshold_never_becomes_what_generate_uses_by_default(folder, monkeypatch, capsys):
    run = load_run(folder)
    write_tuned(run, None, tuned_under(run, "self_speculative:E=3:d=2"), {})
    for thresholds, found in (("0", True), ("1.1", False)):
        monkeypatch.setattr(tune, "measure", with_speedups({"calm": 2.0 if found else 0.5}))
        tune_a_little(
            monkeypatch, folder, "--strategy", "calm", "--thresholds", thresholds,
            "--min_agreement", 0,
        )  # fmt: skip
        assert ("best: calm:threshold=0.0" in capsys.readouterr().out) == found
        err = generate_a_little(monkeypatch, capsys, folder)
        assert "tuned for this checkpoint: self_speculative:E=3:d=2\n" in err
        err = generate_a_little(monkeypatch, capsys, folder, "--strategy", "calm")
        assert ("tuned for this checkpoint: calm:threshold=0.0\n" in err) == found
        for other in ("calm:threshold=0.5", "patience", "self_speculative"):
            assert "tuned" not in generate_a_little(
                monkeypatch, capsys, folder, "--strategy", other
            )


@pytest.mark.parametrize("strategy", ["dynamic:fixed_cost=0.5", "unified:speedup=3:keep=1"])
def test_what_another_version_tuned_is_refused_with_the_remedy(
    folder, monkeypatch, capsys, strategy
):
    run = load_run(folder)
    write_tuned(run, None, tuned_under(run, strategy), {})
    with pytest.raises(SystemExit):
        generate_a_little(monkeypatch, capsys, folder)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: tuned: {strategy} cannot be used (")
    assert line.endswith(f"delete {tuned_path(run)} or run inference.tune")


def with_speedups(by_name, **changes):
    """Return `measure` with other speedups, by the strategy's name, and other changes of these."""

    def changed(*args, **options):
        found = []
        for result in measure(*args, **options):
            speedup = by_name.get(result.strategy, 1.0)
            fields = {"speedup": speedup, "speedups": [speedup]}
            found.append(replace(result, **fields | (changes if speedup != 1.0 else {})))
        return found

    return changed


@pytest.mark.parametrize(
    "changes", [{"first_difference": "fault", "same_tokens": 0.5}, {"speedups": [9.0, 0.9]}]
)
def test_what_is_faulty_or_once_slower_is_not_kept(folder, monkeypatch, capsys, changes):
    monkeypatch.setattr(tune, "measure", with_speedups({"dynamic": 9.0}, **changes))
    tune_a_little(monkeypatch, folder, "--quick", "--max_d", 1)
    out = capsys.readouterr().out
    assert out.startswith("best: autoregressive, nothing measured below beats plain decoding in ev")
    assert ("\nwarning: dynamic:" in out) == ("first_difference" in changes)
    assert read_tuned(load_run(folder), None).strategy == "autoregressive"


def test_a_threshold_that_is_not_faster_is_not_kept(folder, monkeypatch, capsys):
    monkeypatch.setattr(tune, "measure", with_speedups({"calm": 0.5}))
    tune_a_little(monkeypatch, folder, "--strategy", "calm", "--thresholds", "0.5,1.1")
    out = capsys.readouterr().out
    assert "no threshold that agrees in 99.0% of the tokens beats plain decoding" in out
    assert read_tuned(load_run(folder), "calm").strategy is None


def test_what_is_tuned_is_decoded_with(folder, tmp_path, monkeypatch, capsys):
    tune_a_little(monkeypatch, folder, "--top", 1, "--max_d", 3, "--json", tmp_path / "out.json")
    answer, _, *tables = capsys.readouterr().out.splitlines()
    run = load_run(folder)
    tuned = read_tuned(run, None)
    assert answer.startswith("best: ")
    assert answer.endswith(f"; kept in {tuned_path(run)}")
    assert any(line.startswith("leaves: E=") for line in tables)
    assert {"predicted:", "measured:", "rounds, in full steps:"} <= {*tables}
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["costs"]["draft"]) == 3
    assert len(found["costs"]["layers"]) == 4
    assert all(arm["same_tokens"] == 1.0 for arm in found["measured"])
    fastest = max(found["measured"], key=lambda arm: arm["speedup"])
    assert fastest["settings"] == found["strategy"] == tuned.strategy
    write_tuned(run, None, tuned_under(run, "early_exit:E=2"), {})
    err = generate_a_little(monkeypatch, capsys, folder)
    assert "tuned for this checkpoint: early_exit:E=2\n" in err
    err = generate_a_little(monkeypatch, capsys, folder, "--strategy", "autoregressive")
    assert "tuned" not in err


def test_the_quick_form_measures_little(folder, tmp_path, monkeypatch, capsys):
    few = tune.TuneOptions(run=folder, quick=True, repeats=9, max_d=4).limited()
    assert (few.prompts, few.max_new_tokens, few.repeats, few.top, few.max_d) == (2, 64, 3, 1, 4)
    path = tmp_path / "out.json"
    (tmp_path / "prompts.txt").write_text("the cat\na mat\nthe moon\n")
    run_command(
        monkeypatch, tune, "--run", folder, "--quick", "--json", path, "--max_d", 1, "--repeats", 1,
        "--prompt_file", tmp_path / "prompts.txt", "--max_new_tokens", 8,
    )  # fmt: skip
    assert capsys.readouterr().out.startswith("best: ")
    found = json.loads(path.read_text())
    settings = [arm["settings"] for arm in found["measured"]]
    assert settings[0] == "autoregressive"
    assert len(settings) in (6, 7)  # with leaves, and the best without
    assert all("ngram=3" not in text for text in settings)
    assert sum(times for *_, times in found["measured"][0]["passes"]) == 2 * 8, "two prompts"
    assert found["strategy"] == read_tuned(load_run(folder), None).strategy


def test_a_strategy_tuned_under_other_conditions_is_named_and_not_taken(
    folder, monkeypatch, capsys
):
    tune_a_little(
        monkeypatch, folder, "--top", 1, "--max_d", 1, "--batch_size", 2, "--temperature", 0.5
    )
    assert read_tuned(load_run(folder), None).conditions == Conditions(
        batch_size=2, compiled=False, quantize=None, dtype="float32", device="cpu", temperature=0.5,
        processor=processor(torch.device("cpu")), threads=torch.get_num_threads(),
    )  # fmt: skip
    capsys.readouterr()
    err = generate_a_little(monkeypatch, capsys, folder, "--dtype", "bfloat16")
    assert err.startswith("strategy: autoregressive, plain decoding; ")
    write_tuned(load_run(folder), None, tuned_under(load_run(folder), "early_exit:E=2"), {})
    assert "for this checkpoint: early_exit:E=2\n" in generate_a_little(
        monkeypatch, capsys, folder
    ), "each of several conditions has its own"
    changes = "batch_size 2 (now 1), dtype float32 (now bfloat16), temperature 0.5 (now 0.0)"
    assert f" was tuned with {changes}, tune again for these\n" in err
    assert err.count("\n") == 2  # and the counts


def test_a_share_above_one_is_refused(run_folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        tune_a_little(monkeypatch, run_folder, "--min_agreement", 7)
    assert capsys.readouterr().err == "error: min_agreement: 7.0, give a share from 0 to 1\n"


def test_drafts_that_do_not_fit_the_context_are_refused(run_folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        tune_a_little(monkeypatch, run_folder, "--max_d", 95)
    assert capsys.readouterr().err == (
        "error: max_d: 95 drafted tokens do not fit the model's context of 96, give at most 94\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"strategy": "x", "weights": "y"}', "is damaged"),
        ('{"lossless": null, "thresholds": {}, "weights": "y"}', "belongs to another checkpoint"),
    ],
)
def test_a_file_of_something_else_is_refused_and_tuning_replaces_it(folder, content, message):
    run = load_run(folder)
    assert read_tuned(run, None) is None
    tuned = tuned_under(run, "calm:threshold=0.5")
    write_tuned(run, "calm", tuned, {})
    assert read_tuned(run, None) is None
    tuned_path(run).write_text(content)
    for name in (None, "calm"):
        with pytest.raises(ValueError, match=message):
            read_tuned(run, name)
    write_tuned(run, "calm", tuned, {})
    assert read_tuned(run, "calm") == tuned
