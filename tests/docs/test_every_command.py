"""Every command of README and docs, run in order in a fresh clone: pytest -m slow tests/docs."""

import shutil

import pytest

from tests.docs.clone import Clone
from tests.docs.pages import all_pages, missing_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(shutil.which("git") is None, reason="needs git"),
]
BLOCKS = [block for page in all_pages() for block in page.commands if block.runs]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return run(block) -> (status, lines), which first runs all blocks before it."""
    clone = Clone(tmp_path_factory.mktemp("clone") / "skipstone")
    results = {}

    def run_up_to(block):
        for other in BLOCKS[: BLOCKS.index(block) + 1]:
            if str(other) not in results:
                results[str(other)] = clone.run(other)
        return results[str(block)]

    return run_up_to


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_runs_and_prints_what_is_quoted(block, run):
    status, lines = run(block)
    shown = "\n".join(lines[-40:])
    assert bool(status) == block.refused, f"{block}: exit status {status}\n{shown}"
    missing = missing_lines(block.expected, lines)
    assert not missing, f"{block}: not printed: {missing}\nbut:\n{shown}"
