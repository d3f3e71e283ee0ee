"""What the command line asks for: a run, or its plan."""

import pytest

from train.command_line import parse
from train.dry_run import DryRun
from train.presets import PRESETS


def test_no_arguments_train_the_demo():
    command = parse([], show=False)
    assert command.config == PRESETS["demo"]()
    assert command.dry_run is None


@pytest.mark.parametrize(
    ("words", "machine"),
    [
        ("--dry_run", DryRun()),
        ("--dry_run --ranks 64", DryRun(ranks=64)),
        ("--memory_gib=141 --dry_run --ranks=16", DryRun(ranks=16, memory_gib=141.0)),
    ],
)
def test_a_dry_run_carries_the_machine_it_plans_for(words, machine):
    command = parse(["scratch_7b", *words.split(), "--optim.lr", "1e-3"], show=False)
    assert command.dry_run == machine
    assert command.config.name == "scratch_7b"
    assert command.config.optim.lr == 1e-3


def test_dry_run_may_stand_before_any_preset():
    assert parse(["--dry_run"], show=False).config == PRESETS["demo"]()


@pytest.mark.parametrize("word", ["--ranks=8", "--memory_gib=80", "--memory-gib=80"])
def test_the_machine_without_dry_run_is_refused(word):
    with pytest.raises(ValueError, match="belongs to a plan and not to training, add --dry_run"):
        parse(["demo", word], show=False)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--dryrun", "--dry_run"),
        ("--rank", "--ranks"),
        ("--memory", "--memory_gib"),
        ("--layer_dropout.pmax", "--layer_dropout.p_max"),
    ],
)
def test_an_unknown_option_names_the_nearest(word, meant):
    with pytest.raises(ValueError, match=f"{word} does not exist, did you mean {meant}"):
        parse(["demo", word, "1"], show=False)


def test_flags_of_the_run_still_take_a_value():
    command = parse(["demo", "--metrics.wandb", "True"], show=False)
    assert command.config.metrics.wandb is True


def test_help_documents_the_plan_with_units_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], show=True)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--dry_run" in text
    assert "--ranks INT" in text
    assert "GiB. (default: 80.0)" in text
