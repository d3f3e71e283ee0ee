"""The command streams text and its tokens' provenance; user errors are one line."""

import io
import json
import os
import subprocess
import sys

import pytest

from inference import fit_jump, generate, train_gate
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
    accepted = result["provenance"].count("accepted")
    assert sum(result["drafts"]["accepted_at"]) == accepted == result["counters"]["accepted"]


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
        (("--strategy", "calmm"), "strategy: calmm, did you mean calm?"),
        (("--stratgy", "calm"), "option: --stratgy does not exist, did you mean --strategy?"),
        (("--num_samples", 2), "num_samples: 2, greedy samples are all the same"),
        (("--prompt", "\udcff"), "prompt: '\\udcff' is not valid UTF-8, give text"),
        (("--prompt", "-", "--prompt", "-"), "prompt: -, standard input can be read once"),
        (("--interactive",), "interactive: True, texts come from standard input"),
        (("--prompt_file", "nowhere"), "prompt_file: nowhere cannot be read (No such file"),
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


def test_a_command_without_a_prompt_names_the_ways_to_give_one(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "--run", "nowhere")
    assert capsys.readouterr().err == (
        "error: prompt: none, give --prompt TEXT, --prompt_file PATH or --interactive\n"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff", "a.txt is not valid UTF-8, give text"),
        ("a.txt", b"\n \n", "a.txt holds no prompt, write one a line"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"text": "a"}', "a.jsonl, line 3, is no JSON object with"),
        ("a.jsonl", b'{"prompt": 1}', "line 1, is no JSON object with a text `prompt`"),
        ("a.jsonl", b'["a"', "line 1, is no JSON object"),
        ("a.jsonl", b"[" * 10000, "line 1, is no JSON object"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="^prompt_file: ") as raised:
        generate.read_prompt_file(tmp_path / name)
    assert message in str(raised.value)


def test_several_texts_come_from_options_input_and_files(run_folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a mat\\n", "id": 3}\n\n{"prompt": ""}\n')
    monkeypatch.setattr(sys, "stdin", io.StringIO("the moon\nrise\n"))
    command(
        monkeypatch, "--run", run_folder, "--prompt", PROMPT, "--prompt", "-", "--num_samples", 2,
        "--prompt_file", tmp_path / "a.jsonl", "--temperature", 0.9, "--max_new_tokens", 4,
        "--batch_size", 3, "--E", 2, "--json", tmp_path / "out.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert result.keys() == {
        "checkpoint", "strategy", "sampling", "seed", "results", "counters"
    }  # fmt: skip
    texts = [text for text in (PROMPT, "the moon\nrise", "a mat\n", "") for _ in range(2)]
    assert [found["prompt"] for found in result["results"]] == texts
    for what in ("drafted_at", "accepted_at", "accepted_lengths"):
        each = [sum(found["drafts"][what]) for found in result["results"]]
        assert sum(each) == sum(result["counters"]["drafts"][what])
        assert what == "accepted_at" or min(each) > 0
    assert result["counters"]["tokens"] == sum(len(f["tokens"]) for f in result["results"])
    assert capsys.readouterr().out == "".join(
        f"== prompt {i // 2 + 1}, sample {i % 2 + 1}\n{found['prompt']}{found['text']}\n"
        for i, found in enumerate(result["results"])
    )


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf{the cat\n\n  a\x0bmat \n")
    assert generate.read_prompt_file(tmp_path / "a.txt") == ["{the cat", "  a\x0bmat "]


def test_without_a_strategy_decoding_is_plain_and_names_what_finds_a_faster_one(
    run_folder, monkeypatch, capsys, tmp_path
):
    arguments = ["--run", run_folder, "--prompt", PROMPT, "--max_new_tokens", 3]
    arguments += ["--json", tmp_path / "out.json"]
    for options, strategy in (
        ((), "autoregressive"),
        (("--E", 2), "self_speculative:E=2"),
        (("--d", 3), "self_speculative:E=1:d=3"),
    ):
        command(monkeypatch, *arguments, *options)
        assert json.loads((tmp_path / "out.json").read_text())["strategy"] == strategy
        note = capsys.readouterr().err.splitlines()[0]
        assert ("strategy: autoregressive, plain decoding" in note) == (not options)
        assert ("python -m inference.tune --run " in note) == (not options)


def test_a_conversation_keeps_the_model_and_outlives_mistakes(
    run_folder, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\na \ud800\nthe mat"))
    loaded, load = [], generate.Model
    monkeypatch.setattr(generate, "Model", lambda run: loaded.append(run) or load(run))
    command(
        monkeypatch, "--run", run_folder, "--interactive", "--max_new_tokens", 4,
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert [found["prompt"] for found in result["results"]] == ["the cat", "the mat"]
    assert result["counters"]["tokens"] == 8
    out, err = capsys.readouterr()
    assert out == "".join(f"{found['prompt']}{found['text']}\n" for found in result["results"])
    assert "error: prompt: 'a \\ud800' is not valid UTF-8" in err
    assert len(loaded) == 1


def test_ctrl_c_ends_a_conversation_quietly(monkeypatch, capsys):
    def interrupt(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    assert generate.converse(interrupt) == []
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_ends_the_command_quietly(run_folder, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    pipe = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", pipe)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--run", run_folder, "--prompt", PROMPT, "--max_new_tokens", 2)
    pipe.close()
    assert stop.value.code == 128 + 13
    assert "rror" not in capsys.readouterr().err


def test_characters_that_an_output_lacks_are_replaced(run_folder, monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as output:
        monkeypatch.setattr(sys, "stdout", output)
        command(monkeypatch, "--run", run_folder, "--prompt", "caf\u00e9", "--max_new_tokens", 2)
        output.flush()
        assert output.buffer.getvalue().startswith(b"caf?")


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
