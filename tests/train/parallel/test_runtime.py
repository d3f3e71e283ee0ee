"""Ranks agree before they act."""

import subprocess
import sys

import pytest

from tests.distributed import run_distributed


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


@pytest.mark.parametrize(
    ("end", "status"),
    [("return 3", 3), ("return 0", 0), ("sys.exit(2)", 2), ("sys.exit()", 0), ("sys.exit('x')", 1)],
)
def test_a_process_ends_with_its_status_and_all_its_output(end, status):
    script = (
        "import atexit, sys, threading\n"
        "from train.parallel.runtime import end_process\n"
        "def main():\n"
        "    atexit.register(print, 'closed')\n"
        "    threading.Thread(target=threading.Event().wait).start()  # would never end\n"
        f"    print('done', end='')\n    {end}\n"
        "end_process(main)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (status, "doneclosed\n")


def test_an_error_is_shown_and_ends_the_process():
    script = "from train.parallel.runtime import end_process\nend_process(lambda: 1 // 0)"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr
