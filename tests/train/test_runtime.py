"""Ranks agree before they act."""

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
