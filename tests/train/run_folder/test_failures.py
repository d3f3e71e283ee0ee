"""What failed decides whether a run is over, and never who noticed it."""

import errno
import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from data.urls import UnreachableError, UrlError
from train.config.command_line import parse
from train.monitoring.replica_check import ReplicasDifferError
from train.run_folder.failures import is_communication, is_final


def caught(action):
    with pytest.raises(BaseException) as stop:  # noqa: PT011  whatever it is
        action()
    return stop.value


def closed_peer():
    """Read from a connection that the other side has reset."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()
        with ours:
            ours.recv(1)


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        os.write(writer, b"x")
    finally:
        os.close(writer)


def no_store():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=1))


def silent_store():
    """Wait for a key that no rank sets."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=0.1))
    store.get("never")


def wrapped(number):
    """Raise an error of ours from one of the file system, as many checks do."""
    try:
        raise OSError(number, os.strerror(number))
    except OSError as error:
        raise ValueError(f"output_dir: x cannot be written, {error}") from error


def while_cleaning_up():
    """Raise what looks like a fault of ours while a lost connection is dealt with."""
    try:
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:41234")
    finally:
        {}["state"]


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def gloo_timeout():
    raise RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation")


def nccl():
    raise dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2251, remote process exited")


@pytest.mark.parametrize(
    "action", [closed_peer, broken_pipe, no_store, silent_store, while_cleaning_up, gloo_timeout,
               nccl, lambda: wrapped(errno.ESTALE), lambda: wrapped(errno.EIO)],
)  # fmt: skip
def test_what_a_peer_or_a_network_does_is_not_final(action):
    assert not is_final(caught(action))


@pytest.mark.parametrize("action", [closed_peer, no_store, silent_store, gloo_timeout, nccl])
def test_the_loss_of_a_peer_is_seen_as_that(action):
    assert is_communication(caught(action))


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("CUDA error: ECC"), OSError(5, "x")]
)
def test_a_signal_and_an_unknown_fault_are_not_final(error):
    assert not is_final(error)


@pytest.mark.parametrize(
    "action",
    [
        lambda: parse(["demo", "--optim.lrr", "1"], show=False),
        lambda: parse(["demo", "--steps", "0"], show=False).config.check(1),
        lambda: os.stat("/no/such/file"),
        lambda: wrapped(errno.EACCES),
        lambda: wrapped(errno.ENOSPC),
        lambda: {}["state"],
        lambda: torch.zeros(2).no_such_method(),
        out_of_memory,
    ],
)
def test_what_the_same_command_would_meet_again_is_final(action):
    error = caught(action)
    assert is_final(error)
    assert not is_communication(error)


@pytest.mark.parametrize(
    "error",
    [FloatingPointError("norm.weight is not finite"), ReplicasDifferError("x"),
     OSError("checkpoint: could not write step-00000003, make room")],
)  # fmt: skip
def test_numbers_and_disks_that_stay_bad_are_final(error):
    assert is_final(error)


def test_a_store_that_is_away_is_not_final():
    assert not is_final(UnreachableError("s3://bucket/runs: cannot be reached"))
    assert is_final(UrlError("s3://bucket/runs: access denied"))
