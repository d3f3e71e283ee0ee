"""A hash of weights, so that what was fitted to some is not used with others.

It covers a few elements of every parameter: training moves them all.
"""

import hashlib
import json
from dataclasses import asdict, fields

import torch

from models.llama import Llama

ELEMENTS = 64
"""Hashed of each parameter, evenly spread from the first to the last."""


def weights_fingerprint(model: Llama) -> str:
    """Return the hash of a model's weights as stored, or as they are if it was not loaded.

    A loaded model has the same one in every dtype, on every device, packed or quantised.
    """
    return compute_fingerprint(model) if model.fingerprint is None else model.fingerprint


def compute_fingerprint(model: Llama) -> str:
    """Return the hash of a model's configuration and weights, the same in float32 and bfloat16."""
    # Fields at their defaults are left out: a configuration may get new ones.
    defaults = {field.name: field.default for field in fields(model.config)}
    shape = {name: x for name, x in asdict(model.config).items() if x != defaults[name]}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for weight in model.parameters():
        flat = weight.detach().flatten()
        indices = torch.arange(ELEMENTS, device=flat.device) * (len(flat) - 1) // (ELEMENTS - 1)
        rounded = flat[indices].to("cpu", torch.bfloat16)
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
