"""Proof that a conversion kept the model: the same bits and the same logits.

Logits are compared in fp32, with transformers' where it is installed.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from data.foreign_json import read_object
from models.config import LlamaConfig
from models.conversion.hugging_face import shape_fields
from models.conversion.safetensors_folder import CONFIG
from models.llama import Llama

TOLERANCE = 1e-5
"""Largest difference of two logits, times the largest logit or 1: fp32's rounding in two orders."""

_PROBE_TOKENS = 256


def prove_same_bits(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """Compare two state dicts, dtypes included.

    Returns:
        What was compared, as a line of text.

    Raises:
        ValueError: Naming the first tensor that differs.
    """
    for name in sorted(expected.keys() | found.keys()):
        a, b = expected.get(name), found.get(name)
        if a is None or b is None or not _same_bits(a, b):
            raise ValueError(
                f"output: {name} is not what was written, so nothing was published; check the disk"
            )
    return f"{len(expected)} tensors read back, equal bit for bit"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def prove_same_logits(expected: Tensor, found: Tensor, *, reader: str) -> str:
    """Compare logits, (batch, seq, vocab) each.

    Args:
        expected: Of what was read.
        found: Of what was written.
        reader: The program that computed `found`, as it appears in messages.

    Returns:
        What was compared, as a line of text.

    Raises:
        ValueError: If they differ by more than rounding, or any is not finite.
    """
    if expected.shape != found.shape:
        raise ValueError(
            f"output: {reader} gives logits of shape {tuple(found.shape)}, not "
            f"{tuple(expected.shape)}, so nothing was published"
        )
    difference = float((expected - found).abs().max())
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:  # also refuses NaN
        raise ValueError(
            f"output: logits differ by {difference:.2g}, more than {limit:.2g}, from {reader}, "
            "so nothing was published; check the input's weights"
        )
    return f"logits equal {reader} (largest difference {difference:.1g})"


def probe(config: LlamaConfig) -> Tensor:
    """Return seeded random tokens, (1, seq) int64, at most 256."""
    generator = torch.Generator().manual_seed(0)
    seq = min(_PROBE_TOKENS, config.max_seq_len)
    return torch.randint(config.vocab_size, (1, seq), generator=generator)


@torch.no_grad()
def our_logits(config: LlamaConfig, state: dict[str, Tensor]) -> Tensor:
    """Return our model's logits of the probe in fp32, (1, seq, vocab)."""
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    model.fill_rope_table()
    h, _ = model.run_layers(model.embed(probe(config)), 0, config.n_layers)
    return model.exit_logits(h)


@torch.no_grad()
def transformers_logits(
    folder: Path, config: LlamaConfig, dtype: torch.dtype | None
) -> Tensor | None:
    """Return the logits of the probe in fp32, (1, seq, vocab), as transformers reads a folder.

    Args:
        folder: A Hugging Face folder.
        config: The shape of its model.
        dtype: Round its weights to this first; None leaves them as they are.

    Returns:
        The logits; None where transformers is not installed.
    """
    if find_spec("transformers") is None:
        return None
    with _quietly():
        import transformers

        transformers.utils.logging.disable_progress_bar()
        try:
            fields = shape_fields(read_object(folder / CONFIG))
            theirs = transformers.AutoConfig.for_model(**fields)
            model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(theirs)].from_pretrained(
                folder,
                config=theirs,
                dtype=dtype or torch.float32,
                local_files_only=True,
            )
            logits: Tensor = model.eval().float()(probe(config)).logits
        except Exception as error:  # of any kind, as its checks are not ours
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise ValueError(
                f"input: transformers cannot read {folder} ({reason}), mend its config.json"
            ) from None
    return logits


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress warnings of transformers' imports about GPU libraries, which are not used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
