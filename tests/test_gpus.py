"""Tests of GPUs may use them, whichever process they run in, and no other test sees one."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

from tests import conftest
from tests.distributed import run_distributed


@pytest.mark.parametrize(
    ("chosen", "hidden"),
    [("not slow and not gpu", True), ("slow", True), ("gpu", False), ("gpu and slow", False)],
)
def test_gpus_are_hidden_but_from_tests_that_are_marked(chosen, hidden, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=chosen)))
    assert (os.environ.get("CUDA_VISIBLE_DEVICES") == "") is hidden


@pytest.mark.parametrize(("has_gpu", "method"), [(True, "spawn"), (False, "forkserver")])
def test_ranks_on_gpus_are_not_forked(has_gpu, method, monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(mp, "start_processes", lambda *_, **how: found.append(how["start_method"]))
    run_distributed(print, 2)
    assert found == [method]
