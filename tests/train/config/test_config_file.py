"""A run from a file: over a preset, under the options, and every fault of it in one line."""

import dataclasses
import json
import logging

import pytest

from train.config.command_line import parse
from train.config.config_file import read_config
from train.config.presets import PRESETS


@pytest.fixture
def write(tmp_path):
    """Return write(name, content), which writes a file and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize("name", PRESETS)
def test_the_config_json_of_a_run_is_the_run(name, write, caplog):
    config = PRESETS[name]()
    with caplog.at_level(logging.INFO):
        assert read_config(write("config.json", config.as_dict()), None) == config
    assert not caplog.records


FILES = {
    "lr.yaml": "optim:\n  lr: 1e-3\n  betas: [0.8, 0.9]\nearly_exit.exits: [2]\n",
    "lr.yml": "{optim.lr: 0.001, optim.betas: [0.8, 0.9], early_exit: {exits: [2]}}",
    "lr.toml": "early_exit.exits = [2]\n[optim]\nlr = 1e-3\nbetas = [0.8, 0.9]\n",
    "lr.json": '{"optim": {"lr": 0.001, "betas": [0.8, 0.9]}, "early_exit": {"exits": [2]}}',
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_goes_over_the_preset_and_under_the_options(name, write):
    path = write(name, FILES[name])
    demo = PRESETS["dense_demo"]()
    expected = dataclasses.replace(
        demo,
        name="again",
        optim=dataclasses.replace(demo.optim, lr=1e-3, betas=(0.7, 0.9)),
        early_exit=dataclasses.replace(demo.early_exit, exits=(2,)),
    )
    words = ["dense_demo", "--optim.betas", "0.7", "0.9", "--config", str(path), "--name", "again"]
    assert parse(words, show=False).config == expected


def test_a_run_is_varied_from_its_own_file(write):
    path = write("config.json", PRESETS["scratch_7b"]().as_dict())
    command = parse([f"--config={path}", "--name", "again", "--dry_run"], show=False)
    assert command.config == dataclasses.replace(PRESETS["scratch_7b"](), name="again")
    # Of a preset beside it nothing is left: the file has every field.
    command = parse(["demo", f"--config={path}", "--tokens", "1e9"], show=False)
    assert command.config == dataclasses.replace(PRESETS["scratch_7b"](), steps=1908)


def test_sections_that_may_be_absent(write):
    llama3 = PRESETS["continual_llama3_8b"]()
    path = write("rope.json", {"model": {"rope_scaling": None}})
    assert read_config(path, llama3).model.rope_scaling is None
    path = write("rope.json", {"model": {"rope_scaling": {"factor": 4}}})
    assert read_config(path, PRESETS["demo"]()).model.rope_scaling.factor == 4.0


def test_what_an_earlier_version_left_out_is_named(write, caplog):
    fields = PRESETS["demo"]().as_dict()
    del fields["stragglers"], fields["optim"]["muon_momentum"]
    with caplog.at_level(logging.INFO):
        config = read_config(write("config.json", fields), None)
    assert config == PRESETS["demo"]()
    assert "leaves 6 fields at their defaults: optim.muon_momentum, stragglers." in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {lr: much}", "optim.lr: 'much', give a number"),
        ("optim: {lr: true}", "optim.lr: True, give a number"),
        ("optim: {lr: [1]}", "optim.lr: [1], give a number"),
        ("steps: 2.0", "steps: 2.0, give an integer"),
        ("steps: '5'", "steps: '5', give an integer"),
        ("steps: {a: 1}", "steps: {'a': 1}, give an integer"),
        ("steps: true", "steps: True, give an integer"),
        ("name: 7", "name: 7, give text"),
        ("name:", "name: None, give text"),
        ("metrics: {wandb: 1}", "metrics.wandb: 1, give true or false"),
        ("curriculum: {C: no}", "curriculum.C: False, give one of rot, grad, all"),
        ("curriculum: {C: [rot]}", "curriculum.C: ['rot'], give one of rot, grad, all"),
        ("early_exit: {exits: 2}", "early_exit.exits: 2, give a list, each an integer"),
        ("early_exit: {exits: [a]}", "early_exit.exits: ['a'], give a list, each an integer"),
        ("optim: {betas: [1]}", "optim.betas: [1], give a list of 2, each a number"),
        ("token_depth: {max_layers: a}", "token_depth.max_layers: 'a', give an integer"),
        ("optim: 3", "optim: 3, give its fields, below its name"),
        ("optim: {lrr: 3}", "optim.lrr: 3, does not exist, did you mean optim.lr?"),
        ("batch_size: 3", "batch_size: 3, does not exist, did you mean data.global_batch_size?"),
        ("zzzzzz: {q: 3}", "zzzzzz: {'q': 3}, does not exist, take it out"),
        ("&a {optim: *a}", "optim.optim: {"),
        ("early_exit: {exits: &a [*a]}", "early_exit.exits: [[...]], give a list"),
    ],
)
def test_a_faulty_field_is_one_line_of_file_field_value_and_remedy(content, message, write):
    path = write("run.yaml", content)
    with pytest.raises(ValueError, match=".") as error:
        read_config(path, PRESETS["demo"]())
    [line] = str(error.value).splitlines()
    assert line.startswith(f"{path}: {message}")


def test_all_faults_are_found_at_once(write):
    path = write("run.toml", "steps = 'a'\nseeds = 1\n")
    with pytest.raises(ValueError, match=".") as error:
        read_config(path, None)
    first, second, third = str(error.value).splitlines()
    assert first == f"{path}: steps: 'a', give an integer"
    assert second == f"{path}: seeds: 1, does not exist, did you mean seed?"
    assert third == (
        f"{path}: leaves out name, steps, model, data, optim, give them, or name the preset that "
        f"the file changes: train/main.py PRESET --config {path}"
    )


def test_what_is_missing_of_a_section_is_named(write):
    path = write("run.yaml", "name: a\nsteps: 2\nmodel: {dim: 8}\ndata: {}\noptim: {lr: 1}\n")
    with pytest.raises(ValueError, match=r"leaves out model\.n_layers, .*, data, give them, or"):
        read_config(path, None)


BOMB = "a: &a [1,1]\n" + "".join(
    f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n"
    for x, y in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"steps": 1, "steps": 2}', "is not valid json, steps is given twice, mend it"),
        ("a.yaml", "steps: 1\nsteps: 2", "is not valid yaml, steps is given twice, mend it"),
        ("a.yaml", "a: [", "is not valid yaml, while parsing a flow node"),
        ("a.yaml", "a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a.toml", "steps = ", "is not valid toml, Invalid value (at end of document), mend it"),
        ("a.json", "[" * 100_000, "is not valid json, it is nested deeper than 64"),
        ("a.json", " " * 2**18 + "{}", "is not valid json, it has more than 262144 bytes"),
        ("a.json", "[1]", "holds no fields, write them as in a run's config.json"),
        ("a.yaml", "", "holds no fields"),
        ("a.py", "x = 1", "give a file that ends in .json, .yaml, .yml, .toml"),
        ("b/a.json", None, "cannot be read, No such file or directory"),
        ("a.yaml", BOMB + "optim: {lr: *k}", "does not exist, take it out"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(name, content, message, write, tmp_path):
    path = tmp_path / name if content is None else write(name, content)
    with pytest.raises(ValueError, match=".") as error:
        read_config(path, None)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 4000


def test_one_file_is_given(write):
    path = str(write("a.json", {}))
    with pytest.raises(ValueError, match=f"config: {path}, {path}, give one file"):
        parse(["demo", "--config", path, f"--config={path}"], show=False)
    with pytest.raises(ValueError, match="config: no value, give a value"):
        parse(["demo", "--config"], show=False)
