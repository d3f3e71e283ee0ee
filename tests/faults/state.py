"""The whole state of a checkpoint, in one hash."""

import hashlib
import json
import warnings

import torch
from torch.distributed.checkpoint.state_dict_loader import load

from models.checkpoint_format import find_checkpoint, read_manifest
from models.tensor_reader import TensorReader


def tensors(checkpoint):
    """Return every tensor of a checkpoint folder: parameters and moments, whole."""
    reader = TensorReader(checkpoint)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is intended here
        load(state, storage_reader=TensorReader(checkpoint), no_dist=True)
    return state


def fingerprint(run):
    """Return (steps done, sha256 of all parameters and moments) of a run's newest checkpoint."""
    checkpoint = find_checkpoint(run)
    digest = hashlib.sha256()
    for name, value in sorted(tensors(checkpoint).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return read_manifest(checkpoint).step, digest.hexdigest()


def records(run):
    """Return the lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run, kind):
    """Return the run's events of one kind."""
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]
