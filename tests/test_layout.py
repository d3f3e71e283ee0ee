"""The house keeps its shape: who may import whom, and which names a file may not have."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("train", "models", "loss", "data", "inference")
ALLOWED = {
    "train": {"models", "loss", "data"},
    "inference": {"models", "data"},
    "models": set(),
    "loss": set(),
    "data": set(),
}
# A model comes and goes with its tokenizer, so the command that converts both names both.
ALSO_ALLOWED = {"models/convert.py": {"data.hugging_face", "data.tokenizer"}}
CHECKPOINT_FILES = {"models/checkpoint_format.py", "models/conversion/plain_checkpoint.py"}
ONLY_IN_TRAIN = {"torchtitan", "tensorboard", "wandb", "tyro"}
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
        if top in ROOMS and name.rpartition(".")[0] not in ALSO_ALLOWED.get(name_of(path), ()):
            assert top == room or top in ALLOWED[room], f"{path} imports {name}"
        if room != "train":
            assert top not in ONLY_IN_TRAIN, f"{path} imports {name}"
            if name.startswith("torch.distributed"):
                assert name_of(path) in CHECKPOINT_FILES, f"{path} imports {name}"
                assert name.startswith("torch.distributed.checkpoint.")


def test_torchtitan_is_imported_in_one_file():
    users = {
        name_of(path) for path in FILES for name in imports(path) if name.startswith("torchtitan")
    }
    assert users == {"train/parallel/titan.py"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_is_imported_by_its_full_name(path):
    siblings = {other.stem for other in path.parent.glob("*.py")} - set(ROOMS)
    for name in imports(path):
        assert name.split(".")[0] not in siblings, f"{path}: write from {path.parent.name}.{name}"


def test_no_file_in_train_hides_another_module():
    # `torchrun train/main.py` puts train/ first on the path, where these names would win.
    installed = set(packages_distributions()) - {"main"}
    taken = installed | set(sys.stdlib_module_names) | set(ROOMS)
    clashes = {path.stem for path in (ROOT / "train").glob("*.py")} & taken - {"__init__"}
    assert not clashes


def test_every_room_is_a_package():
    assert all((ROOT / room / "__init__.py").is_file() for room in ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            limit = 85 if path.parent.name == "train" and path.stem in ("main", "step") else 50
            assert node.end_lineno - node.lineno < limit, f"{path}: {node.name} is too long"


def test_environment_is_read_in_one_file():
    readers = {name_of(path) for path in FILES if "os.environ" in path.read_text()}
    # generate.py asks for NO_COLOR, the terminal's own convention, and nothing else.
    assert readers <= {"train/parallel/runtime.py", "inference/generate.py"}
    assert (ROOT / "inference" / "generate.py").read_text().count("os.environ") == 1


def test_no_option_shadows_the_repository_name_for_data():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert "data/" not in ignored
