"""The house keeps its shape: who may import whom, and which names a file may not have."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("train", "models", "loss", "data", "inference", "launch")
ALLOWED = {
    "launch": set(),  # it names the modules it runs, and imports none of them
    "train": {"models", "loss", "data"},
    "inference": {"models", "data"},
    "models": set(),
    "loss": set(),
    "data": set(),
}
# The command that converts a model converts its tokenizer with it.
ALSO_ALLOWED = {
    "models/convert.py": {"data.chats", "data.command_line", "data.hugging_face", "data.tokenizer"},
}
CHECKPOINT_FILES = {
    "models/tensor_reader.py",
    "models/url_streams.py",
    "models/conversion/plain_checkpoint.py",
}
# They read JSON and URLs for every room, and import none of ours but each other's.
EVERYWHERE = {"data.foreign_json", "data.urls", "data.url_cache"}
LOWEST = {"data/foreign_json.py", "data/urls.py"}
ONLY_IN_TRAIN = {"torchtitan", "tensorboard", "trackio", "wandb"}
# Which room of a package may import which; a loose file may import any room.
ROOM_ARROWS = {
    "inference": {
        "serving": {"text", "strategies", "loading", "engine"},
        "report_page": {"evaluation", "strategies", "loading", "engine", "text", "cli"},
        "text": {"strategies", "loading", "engine"},
        "cli": {"loading", "engine"},
        "fitting": {"strategies", "cli"},
        "evaluation": {"strategies", "loading", "engine", "cli"},
        "strategies": {"loading", "engine"},
        "loading": {"engine"},
        "engine": set(),
    },
    "train": {
        "planning": {"config", "loop", "checkpoints", "optimizer", "parallel"},
        "config": {
            *("loop", "decoding", "checkpoints", "monitoring", "run_folder", "optimizer"),
            "parallel",
        },
        "decoding": {"run_folder", "parallel"},
        "loop": {"monitoring", "optimizer", "parallel"},
        "checkpoints": {"optimizer", "parallel"},
        "monitoring": {"parallel"},
        "run_folder": {"monitoring", "parallel"},
        "diagnosis": {"parallel"},
        "optimizer": {"parallel"},
        "parallel": set(),
    },
    "models": {"conversion": set()},
}
COMMANDS_OF_MODELS = {"convert"}
# What the loose files of `train/` may import of each other, from main down.
LOOSE_ARROWS = {
    "main": {"follow", "job", "rollback", "summary"},
    "follow": {"job"},
    "rollback": {"job", "resumed_rows"},
    "job": {"opened_data", "record", "resumed_rows"},
    "opened_data": set(),
    "record": set(),
    "resumed_rows": set(),
    "summary": {"job"},
    "sweep": set(),
    "doctor": set(),
}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path):
    """Return the dotted names a file imports, and the names it takes from each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_arrows(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        assert top != "tests", f"{path} imports {name}"
        module = name.rpartition(".")[0]
        if module in EVERYWHERE:
            continue
        if top in ROOMS and module not in ALSO_ALLOWED.get(name_of(path), ()):
            assert name_of(path) not in LOWEST, f"{path} imports {name}"
            assert top == room or top in ALLOWED[room], f"{path} imports {name}"
        if room not in ("train", "launch"):  # launch runs torchrun
            assert top not in ONLY_IN_TRAIN, f"{path} imports {name}"
            if name.startswith("torch.distributed"):
                assert name_of(path) in CHECKPOINT_FILES, f"{path} imports {name}"
                assert name.startswith("torch.distributed.checkpoint.")


def rooms_of(package):
    return {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()}


def arrows_of(package):
    """Yield (file, its room or "", the loose file or room of the same package it imports)."""
    for path in sorted((ROOT / package).rglob("*.py")):
        inside = path.relative_to(ROOT / package).parts
        for name in imports(path):
            top, *rest = name.split(".")
            if top == package:
                assert rest, f"{path}: import a file of {package}, not the package"
                yield path, inside[0] if len(inside) > 1 else "", rest[0]


@pytest.mark.parametrize("package", sorted(ROOM_ARROWS))
def test_rooms_follow_their_table(package):
    table = ROOM_ARROWS[package]
    assert rooms_of(package) == set(table)
    drawn = {room: set() for room in table}
    for path, room, target in arrows_of(package):
        if room and target != room and (package != "models" or target in COMMANDS_OF_MODELS):
            assert target in table[room], f"{path}: {room} may not import {package}.{target}"
            drawn[room].add(target)
        if package == "models" and not room and path.stem not in COMMANDS_OF_MODELS:
            assert target not in table, f"{path}: imports models.{target}"
    assert drawn == table, "the table names an arrow that no file draws"


@pytest.mark.parametrize("package", ["inference", "train"])
def test_the_arrows_between_rooms_have_no_circle(package):
    left = {room: set(targets) for room, targets in ROOM_ARROWS[package].items()}
    while left:
        floor = {room for room, targets in left.items() if not targets & left.keys()}
        assert floor, f"a circle among {sorted(left)}"
        left = {room: targets for room, targets in left.items() if room not in floor}


def test_every_loose_file_of_inference_is_a_command():
    for path in set((ROOT / "inference").glob("*.py")) - {ROOT / "inference" / "__init__.py"}:
        text = path.read_text()
        assert "\ndef main()" in text, f"{path} is no command"
        assert 'if __name__ == "__main__":' in text, f"{path} is no command"


def test_no_command_of_inference_imports_a_command():
    for path, room, target in arrows_of("inference"):
        assert target in ROOM_ARROWS["inference"], f"{path} ({room}) imports inference.{target}"


def test_loose_files_of_train_follow_their_table():
    loose = {path.stem for path in (ROOT / "train").glob("*.py")} - {"__init__"}
    assert loose == set(LOOSE_ARROWS)
    for path, room, target in arrows_of("train"):
        if target in loose:
            assert not room, f"{path} imports train.{target}"
            assert target in LOOSE_ARROWS[path.stem], f"{path} imports train.{target}"


def test_torchtitan_is_imported_in_one_file():
    users = {
        name_of(path) for path in FILES for name in imports(path) if name.startswith("torchtitan")
    }
    assert users == {"train/parallel/titan.py"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_is_imported_by_its_full_name(path):
    siblings = {other.stem for other in path.parent.iterdir()} - set(ROOMS)
    for name in imports(path):
        assert name.split(".")[0] not in siblings, f"{path}: write from {path.parent.name}.{name}"


def test_no_file_or_folder_in_train_hides_another_module():
    # `torchrun train/main.py` puts train/ first on the path, where these names would win.
    installed = set(packages_distributions()) - {"main"}
    taken = installed | set(sys.stdlib_module_names) | set(ROOMS)
    names = {path.stem for path in (ROOT / "train").iterdir() if path.suffix in ("", ".py")}
    assert not names & taken - {"__init__", "__pycache__"}


def test_every_room_is_a_package():
    folders = {path.parent for path in FILES}
    assert all((folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            limit = 85 if name_of(path) in ("train/main.py", "train/loop/step.py") else 50
            assert node.end_lineno - node.lineno < limit, f"{path}: {node.name} is too long"


def test_environment_is_read_in_one_file():
    readers = {
        name_of(path) for path in FILES if re.search(r"\benviron\b|\bgetenv\b", path.read_text())
    }
    # generate.py reads NO_COLOR, the terminal's own convention; data sets COLUMNS for tyro;
    # torchrun.py names its process to the ranks, where launcher.py reads it before torch is there.
    allowed = {"train/parallel/runtime.py", "inference/generate.py", "data/command_line.py"}
    allowed |= {"launch/torchrun.py", "train/monitoring/launcher.py"}
    allowed |= {"train/diagnosis/surroundings.py"}  # of the doctor, who starts without torch
    allowed |= {"data/urls.py"}  # the folder of copies, which every room has
    allowed |= {"inference/serve.py"}  # the key of clients, which no command line should show
    assert readers <= allowed
    assert (ROOT / "inference" / "generate.py").read_text().count("os.environ") == 1


def test_no_option_shadows_the_repository_name_for_data():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert "data/" not in ignored
