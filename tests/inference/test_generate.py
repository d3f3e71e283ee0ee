"""The command streams text, says where tokens come from, and turns user errors into one line."""

import json
import subprocess
import sys

import pytest

from inference import fit_jump, generate, train_gate
from inference.engine.generation import Emission
from inference.strategies.registry import STRATEGIES

PROMPT = "the cat sat"


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    generate.main()


def test_the_command_line_end_to_end(run_folder, tmp_path):
    arguments = ["--run", run_folder, "--prompt", PROMPT, "--strategy", "self_speculative"]
    arguments += ["--E", 2, "--d", 3, "--max_new_tokens", 20, "--json", tmp_path / "out.json"]
    done = subprocess.run(
        [sys.executable, "-m", "inference.generate", *map(str, arguments)],
        capture_output=True,
        check=True,
    )
    result = json.loads((tmp_path / "out.json").read_text())
    assert done.stdout.decode() == PROMPT + result["text"] + "\n"
    assert b"\033[3" not in done.stdout
    assert f"{len(result['tokens'])} tokens, " in done.stderr.decode()
    assert len(result["provenance"]) == len(result["tokens"]) == result["counters"]["tokens"]
    assert set(result["provenance"]) <= {"accepted", "corrected", "plain"}


@pytest.mark.parametrize("options", [(), ("--temperature", 1, "--top_k", 20, "--top_p", 0.9)])
def test_greedy_text_does_not_depend_on_the_strategy(run_folder, monkeypatch, capsys, options):
    texts = []
    for strategy in ("self_speculative", "autoregressive"):
        command(
            monkeypatch, "--run", run_folder, "--prompt", PROMPT, "--strategy", strategy, *options
        )
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith(PROMPT)
    assert (texts[0] == texts[1]) == (not options)


@pytest.fixture(scope="module")
def needed(run_folder, tmp_path_factory):
    """Settings that a strategy cannot do without."""
    folder = tmp_path_factory.mktemp("fitted")
    gate, jump = folder / "gate.safetensors", folder / "jump.safetensors"
    few = ["--run", run_folder, "--train_tokens", 192, "--test_tokens", 96]
    with pytest.MonkeyPatch.context() as patch:
        for module, arguments in (
            (train_gate, ["--form", "linear", "--epochs", 1, "--output", gate]),
            (fit_jump, ["--rank", 2, "--output", jump]),
        ):
            patch.setattr(sys, "argv", ["fit", *map(str, [*few, *arguments])])
            module.main()
    return {
        "speculative": f":draft={run_folder}",
        "gate": f":path={gate}",
        "jump": f":path={jump}",
        "calm": ":threshold=0.3",
    }


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "routed"])
def test_every_strategy_writes_its_results(name, run_folder, needed, monkeypatch, tmp_path):
    strategy, path = name + needed.get(name, ""), tmp_path / "out.json"
    command(
        monkeypatch, "--run", run_folder, "--prompt", PROMPT, "--max_new_tokens", 5,
        "--strategy", strategy, "--json", path,
    )  # fmt: skip
    counters = json.loads(path.read_text())["counters"]
    assert counters["tokens"] == 5
    depths = {int(depth): tokens for depth, tokens in counters["depths"].items()}
    if name in ("calm", "patience", "gate", "free", "skipdecode"):
        assert sum(depths.values()) == 5
        assert set(depths) <= {1, 2, 3, 4}
    else:
        assert depths == {}


def test_tokens_of_a_round_have_their_provenance():
    assert generate.provenance(Emission(0, [4, 5, 6], 2, 3)) == ["accepted"] * 2 + ["corrected"]
    assert generate.provenance(Emission(0, [4, 5], 2, 3)) == ["accepted"] * 2
    assert generate.provenance(Emission(0, [4], 0, 0)) == ["plain"]


def test_colors_only_on_a_terminal_that_wants_them(run_folder, monkeypatch, capsys):
    arguments = ("--run", run_folder, "--prompt", PROMPT, "--E", 3, "--max_new_tokens", 20)
    monkeypatch.delenv("NO_COLOR", raising=False)
    command(monkeypatch, *arguments)
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command(monkeypatch, *arguments)
    colored = capsys.readouterr().out
    assert "\033[32m" in colored
    assert "\033[33m" in colored
    for code in ("\033[32m", "\033[33m", "\033[0m"):
        colored = colored.replace(code, "")
    assert colored == generate.printable(plain)
    monkeypatch.setenv("NO_COLOR", "1")
    command(monkeypatch, *arguments)
    assert capsys.readouterr().out == generate.printable(plain)


def test_a_terminal_is_not_sent_what_the_model_made_of_escape_bytes():
    assert (
        generate.printable("a\033[2J\r\u009bb\n\tcaf\u00e9")
        == "a\ufffd[2J\ufffd\ufffdb\n\tcaf\u00e9"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--E", 4), "E: 4, self_speculative needs 1 to 3 for this model"),
        (("--d", 0), "d: 0, give at least 1 drafted token"),
        (("--prompt", "cat " * 100), "leave no room in the model's context of 96"),
        (("--strategy", "oracle"), "strategy: oracle, give one of autoregressive, early_exit"),
        (("--strategy", ""), "strategy: empty, give one of autoregressive, early_exit"),
        (("--E", ""), "self_speculative: E=, give an integer"),
        (("--strategy", f"skipdecode:length=1{'0' * 27}"), "give an integer of at most 64 bits"),
        (("--temperature", -1), "temperature: -1.0"),
        (("--d", "two"), "self_speculative: d=two, give an integer"),
        (("--run", "nowhere"), "run: nowhere holds no finished checkpoint"),
    ],
)
def test_a_users_error_is_one_line(run_folder, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--run", run_folder, "--prompt", PROMPT, *arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_users_error_leaves_the_process_with_one_line_and_code_2(run_folder):
    done = subprocess.run(
        [sys.executable, "-m", "inference.generate"]
        + ["--run", str(run_folder), "--prompt", PROMPT, "--E", "0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: E: 0, self_speculative needs 1 to 3 for this model\n"
