"""Ranks agree before they act."""

import os
import subprocess
import sys

import pytest
import torch

from tests.distributed import run_distributed
from train.parallel.runtime import RuntimeConfig, start_runtime


def agree(runtime):
    assert runtime.on_every_rank(lambda: runtime.rank) == runtime.rank
    assert runtime.gather(runtime.rank * 10) == [0, 10]

    def fail_on_rank_one():
        if runtime.rank == 1:
            raise ValueError("field: 7, choose 8")

    if runtime.is_main:
        with pytest.raises(ValueError, match=r"field: 7, choose 8 \(on rank 1\)"):
            runtime.on_every_rank(fail_on_rank_one)
    else:
        with pytest.raises(SystemExit):
            runtime.on_every_rank(fail_on_rank_one)


def main_goes_first(runtime, path):
    def make_or_find():
        if runtime.is_main:
            path.write_text("made")
        return path.read_text()

    assert runtime.main_first(make_or_find) == "made"


def both(runtime, path):
    agree(runtime)
    main_goes_first(runtime, path)


def test_a_failure_on_one_rank_ends_all_and_the_first_speaks(tmp_path):
    run_distributed(both, 2, tmp_path / "made")


def test_a_deterministic_run_has_no_kernel_that_varies_and_fills_no_memory(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        with start_runtime(RuntimeConfig(deterministic=True), seed=0):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()  # would only warn
            assert not torch.utils.deterministic.fill_uninitialized_memory
            assert torch._inductor.config.deterministic
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


ENDS = {
    "return 3": 3,
    "return 0": 0,
    "sys.exit(2)": 2,
    "sys.exit()": 0,
    "sys.exit('x')": 1,
    "raise KeyboardInterrupt": 130,
    "raise BrokenPipeError": 141,
    "wait(); sys.exit(2)": 2,
}
SCRIPT = """
import atexit, os, sys, threading
from train.parallel import runtime

def wait():  # as a rank that is not the first of its node does
    os.environ["LOCAL_RANK"], runtime.PRINTED_WITHIN_SECONDS = "1", 0.1

for end in sys.argv[1:]:
    if os.fork() == 0:
        exec(
            "def main():\\n"
            "    atexit.register(print, 'closed')\\n"
            "    threading.Thread(target=threading.Event().wait).start()\\n"  # would never end
            f"    print('done', end='')\\n    {end}\\n"
        )
        runtime.end_process(main)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_process_ends_with_its_status_and_all_its_output():
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *ENDS],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    expected = [line for status in ENDS.values() for line in ("doneclosed", str(status))]
    assert ended.stdout.splitlines() == expected
    assert ended.stderr == "ends with an error that no rank of this node has printed\n"


def test_an_error_is_shown_and_ends_the_process():
    script = "from train.parallel.runtime import end_process\nend_process(lambda: 1 // 0)"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr
