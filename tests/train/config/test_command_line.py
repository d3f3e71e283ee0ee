"""The command line: a run, or its plan, and every mistake in one line."""

import re
from dataclasses import replace

import pytest

from data.command_line import option_names
from data.suggestion import suggest
from train.config.command_line import DryRun, _CommandLine, parse
from train.config.presets import PRESETS
from train.config.synonyms import SYNONYMS

OPTIONS = [*option_names(_CommandLine)]


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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", None),
        ("--parallel.compile", True),
        ("--parallel.compile=false", False),
        ("--parallel.compile None", None),
    ],
)
def test_compile_is_a_switch_or_left_to_the_device(words, expected):
    config = parse(["layerskip_110m", *words.split(), "--steps", "5"], show=False).config
    assert config.parallel.compile is expected


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
        ("--token", "--tokens"),
        ("--memory", "--memory_gib"),
        ("--layer_dropout.pmax", "--layer_dropout.p_max"),
    ],
)
def test_an_unknown_option_names_the_nearest(word, meant):
    with pytest.raises(ValueError, match=f"{word} does not exist, did you mean {meant}"):
        parse(["demo", word, "1"], show=False)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--metrics.tensorboard True", True),
        ("--metrics.tensorboard=false --steps 3", False),
        ("--metrics.tensorboard FALSE", False),
        ("--metrics.tensorboard", True),
        ("--metrics.tensorboard --steps 3", True),
    ],
)
def test_a_switch_takes_a_value_in_any_case_or_none(words, value):
    command = parse(["demo", *words.split()], show=False)
    assert command.config.metrics.tensorboard is value
    assert command.config.steps == (3 if "steps" in words else 500)


# A step of scratch_1_5b is 128 sequences of 4096: 524,288 tokens.
@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("--tokens 26e9", 49_592),
        ("--tokens=524288", 1),
        ("--tokens 524289", 2),
        ("--tokens 0.5", 1),
        ("--tokens 1048576 --data.seq_len 2048", 4),
        ("--data.global_batch_size 256 --tokens 1048576 --dry_run", 1),
    ],
)
def test_tokens_become_steps_rounded_up(words, steps):
    config = parse(["scratch_1_5b", *words.split()], show=False).config
    assert config == replace(config, steps=steps)
    assert "tokens" not in config.as_dict()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tokens 1e9 --steps 5", r"tokens: 1e\+09, but steps are given too, leave one"),
        ("--steps=5 --tokens=1e9", "steps are given too"),
        ("--tokens 0", "tokens: 0, must be positive"),
        ("--tokens nan", "tokens: nan, must be positive"),
        ("--tokens inf", "tokens: inf, must be positive"),
    ],
)
def test_tokens_that_say_no_number_of_steps_are_refused(words, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(["demo", *words.split()], show=False)
    assert "\n" not in str(error.value)


def test_what_was_given_is_known_by_full_names(tmp_path):
    words = "--data.seq-len 64 --optim.lr=1e-3 --tokens 4096"
    given = parse(["demo", *words.split()], show=False).given
    assert {"data.seq_len", "optim.lr", "steps"} <= given
    assert "data.global_batch_size" not in given
    file = tmp_path / "config.yaml"
    file.write_text("steps: 3\n")
    given = parse(["demo", "--config", str(file)], show=False).given
    assert "steps" in given
    assert "data.path" not in given


def test_starting_from_two_runs_is_refused_but_for_the_presets_own():
    branch = ["--checkpoint.resume_from", "outputs/x"]
    with pytest.raises(ValueError, match=r"checkpoint.init_from: outputs/y, but checkpoint.resume"):
        parse(["demo", *branch, "--checkpoint.init_from", "outputs/y"], show=False)
    config = parse(["continual_demo", *branch], show=False).config
    assert config.problems(1) == []
    assert config.checkpoint.starts_from == "outputs/x"


def test_a_step_without_tokens_is_refused_as_ever():
    config = parse(["demo", "--tokens", "10", "--data.seq_len", "0"], show=False).config
    assert any("data.seq_len: 0" in line for line in config.problems(1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim.lr fast", "optim.lr: fast, give a number"),
        ("--curriculum.C spiral", "curriculum.C: spiral, give one of all, alternating, grad, "),
        ("--steps", "steps: no value, give an integer"),
        ("--metrics.wandb yes --steps 3", "metrics.wandb: yes, give one of False, True"),
        ("--optim.betas 0.9", "optim.betas: too few values, give 2 values"),
        ("--steps 3 demo", "demo: a value without an option, name the preset first"),
        ("--demo 3", "option: --demo does not exist, name the preset first"),
        ("--lr 1 --epochs 2", "option: --lr does not exist, did you mean --optim.lr?"),
    ],
)
def test_a_mistake_is_one_line_on_every_rank(words, message, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    for show in (True, False):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
            parse(["demo", *words.split()], show=show)
        assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("lr learning_rate learning-rate max_lr optim.learning_rate", "--optim.lr?"),
        ("batch_size batchsize train_batch_size data.batch_size", "--data.global_batch_size?"),
        ("micro_batch_size per_device_train_batch_size", "--data.microbatch_size?"),
        ("step max_steps train_steps iterations", "--steps?"),
        ("seq_length context_length block_size", "--data.seq_len?"),
        ("num_layers num_hidden_layers", "--model.n_layers?"),
        ("hidden_size d_model n_embd", "--model.dim?"),
        ("warmup num_warmup_steps optim.warmup", "--optim.warmup_steps?"),
        ("save_steps save_interval", "--checkpoint.interval_steps?"),
        ("eval_steps val_interval", "--validate.interval_steps?"),
        ("logging_steps log_interval", "--metrics.interval_steps?"),
        ("output out_dir", "--output_dir?"),
        ("data dataset data_path", "--data.path?"),
        ("bf16 precision", "--parallel.param_dtype?"),
        ("fp16", "set --parallel.param_dtype to bfloat16 or float32"),
        ("epochs num_train_epochs", "set --steps or --tokens; the first lines of a run count the"),
        ("gradient_accumulation_steps", "set --data.microbatch_size, the sequences a rank takes"),
        ("tokenizer", "leave it out, a dataset has its own: python -m data.prepare --tokenizer"),
        ("resume", "leave it out, the same command resumes"),
        ("nproc_per_node gpus", "give it to torchrun"),
        ("warmup_steps", "one of --optim.warmup_steps, --early_exit.warmup_steps?"),
        ("exits", "one of --token_depth.exits, --early_exit.exits?"),
        ("grad_clip", "--optim.max_grad_norm?"),
        ("pmax layer_dropout.pmax", "--layer_dropout.p_max?"),
        ("early_exit.warmup", "--early_exit.warmup_steps?"),
        ("tp fsdp", "see --help"),
    ],
)
def test_a_suggestion_is_what_the_user_meant(words, meant):
    for word in words.split():
        hint = suggest(word.replace("-", "_"), OPTIONS, SYNONYMS, prefix="--")
        assert hint.removeprefix("did you mean ").startswith(meant)


def test_synonyms_name_options_and_hide_none():
    assert not SYNONYMS.keys() & {*OPTIONS}
    assert {meant for meant in SYNONYMS.values() if " " not in meant} <= {*OPTIONS}


@pytest.mark.parametrize(
    ("name", "hint"), [("dmeo", "did you mean demo?"), ("scratch7b", "did you mean scratch_7b?")]
)
def test_an_unknown_preset_names_the_nearest(name, hint):
    with pytest.raises(ValueError, match=f"^preset: {name} does not exist, {re.escape(hint)}"):
        parse([name], show=False)


def test_help_documents_the_plan_with_units_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], show=True)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--dry_run" in text
    assert "--ranks INT" in text
    assert "--tokens FLOAT" in text
    assert "usual. (default: 0.4)" in text


@pytest.mark.parametrize(
    "words",
    [
        "--early_exit.z_loss inf",
        "--early_exit.exit_weights nan 1",
        "--early_exit.temperature inf",
        "--early_exit.distill_states_weight nan",
        "--optim.lr inf",
        "--optim.eps nan",
        "--optim.weight_decay inf",
        "--optim.embedding_weight_decay nan",
        "--optim.max_grad_norm=-inf",
        "--density.weight inf",
        "--token_depth.speedup nan",
        "--layer_dropout.p_max nan",
        "--model.rope_theta inf",
    ],
)
def test_a_number_that_is_not_finite_is_one_line_of_its_field(words):
    config = parse(["demo", *words.split()], show=False).config
    [line] = config.problems(1)
    name, value = words[2:].replace("=", " ").split()[:2]
    assert line == f"{name}: {value}, must be a finite number"
