"""A checkpoint that continues text.

Three lines lead from a run folder to a text:

    import inference
    model = inference.load("outputs/demo")
    print(model.generate("def main(").text)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch

from data.chat_template import ChatTemplate
from data.chats import open_template
from data.urls import location
from inference.engine.sampling import Sampling
from inference.engine.strategy import Strategy
from inference.loading.quantized import Bits
from inference.loading.run import Run, load_run
from inference.strategies.speculative import check_tokenizer
from inference.text.continuation import Continuation
from inference.text.strategy_choice import choose_strategy
from inference.text.stream import TextStream

BATCH_SIZE = 8
"""Texts decoded at once, if not given."""
_SEEDS = 2**64
_NUMBERS: dict[str, tuple[bool, type]] = {
    **{"max_new_tokens": (False, int), "temperature": (False, float)},
    **{"top_k": (True, int), "top_p": (True, float), "seed": (False, int)},
    **{"num_samples": (False, int), "batch_size": (True, int)},
}
"""Whether an option of `Model.stream` may be None, and its type."""


class Options(TypedDict, total=False):
    """What `Model.stream` takes besides texts and `num_samples`; see there."""

    strategy: str | Strategy | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    batch_size: int | None
    chat: bool | str


class Model:
    """A checkpoint in memory; `load` makes one.

    Args:
        run: The checkpoint, opened.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def __repr__(self) -> str:
        weight = self.run.model.norm.weight
        return f"Model({str(self.run.checkpoint)!r}, {weight.dtype}, {weight.device})"

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, prompts: str, *, num_samples: Literal[1] = 1, **options: Unpack[Options]
    ) -> Continuation: ...

    @overload
    def generate(
        self, prompts: Sequence[str], *, num_samples: int = 1, **options: Unpack[Options]
    ) -> list[Continuation]: ...

    def generate(
        self, prompts: str | Sequence[str], *, num_samples: int = 1, **options: Unpack[Options]
    ) -> Continuation | list[Continuation]:
        """Continue texts, up to EOS.

        Args:
            prompts: A text, or several.
            num_samples: Continuations of each text.
            options: As in `stream`: strategy, max_new_tokens, temperature, top_k, top_p, seed,
                batch_size, chat.

        Returns:
            For one text a `Continuation`; for a list of texts, and for num_samples above 1, a list
            of them in the order of the texts, the samples of a text side by side.

        Raises:
            ValueError: A text or an option is not valid; the message names field, value and remedy.
        """
        stream = self.stream(prompts, num_samples=num_samples, **options)
        found = [*stream.continuations()]
        return found[0] if isinstance(prompts, str) and num_samples == 1 else found

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        strategy: str | Strategy | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        num_samples: int = 1,
        batch_size: int | None = None,
        chat: bool | str = False,
    ) -> TextStream:
        """Continue texts, up to EOS; iterate over what is returned for the pieces as they come.

        Args:
            prompts: A text, or several.
            strategy: How to decode, as in "self_speculative:E=2:d=4"; see
                `inference.strategies.registry.STRATEGIES`. None: the fastest lossless one that
                `python -m inference.tune` found for the checkpoint, or else plain decoding.
            max_new_tokens: Most tokens to add to a text.
            temperature: Divides the logits; 0 is greedy, else at least 1e-6.
            top_k: Keep the k most probable tokens; None keeps all.
            top_p: Keep the most probable tokens that sum to this probability; None keeps all.
            seed: Of every random draw, at least 0 and less than 2^64.
            num_samples: Continuations of each text, side by side.
            batch_size: Texts decoded at once; None: 8 at most.
            chat: Read texts as a user's turns, by the checkpoint's chat template, or this file.

        Raises:
            ValueError: A text or an option is not valid; the message names field, value and remedy.
        """
        numbers = (max_new_tokens, temperature, top_k, top_p, seed, num_samples, batch_size)
        _check(prompts, strategy, dict(zip(_NUMBERS, numbers, strict=True)))
        given = [prompts] if isinstance(prompts, str) else prompts
        texts = [text for text in given for _ in range(num_samples)]
        rows = max(1, min(batch_size or BATCH_SIZE, len(texts)))
        chosen, _ = choose_strategy(self.run, strategy, batch_size=rows, temperature=temperature)
        check_tokenizer(chosen, self.run)
        return TextStream(
            self.run,
            texts,
            chosen,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
            seed=seed,
            batch_size=rows,
            chat=self._template(chat),
        )

    def _template(self, chat: bool | str) -> ChatTemplate | None:
        if not chat:
            return None
        return open_template(self.run.tokenizer, None if chat is True else chat)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    quantize: Bits | None = None,
    compile: bool = False,
) -> Model:
    """Load a checkpoint for decoding.

    Args:
        path: A run folder, whose newest checkpoint is taken, or one checkpoint folder; or its
            URL, such as s3://bucket/runs/demo.
        device: "auto" (CUDA if there is one, else CPU), "cpu", "cuda" or "cuda:N".
        dtype: Of weights and KV cache: float32, bfloat16 or float16, by name or torch's; None:
            bfloat16 on CUDA and float32 on a CPU.
        quantize: Hold the layers' matrices in so few bits, "int8" or "int4", by torchao.
        compile: Compile the layers, and on CUDA replay whole rounds as graphs: faster, after
            seconds for each shape of a pass.

    Raises:
        ValueError: There is no checkpoint, it is damaged, or an option is not valid.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise ValueError(f"path: {path!r}, give the folder of a run or a checkpoint")
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    run = load_run(
        location(str(path)), device=str(device), dtype=name, quantize=quantize, compiled=compile
    )
    return Model(run)


def _check(prompts: object, strategy: object, numbers: Mapping[str, Any]) -> None:
    """Raise a ValueError with every argument that is of no use, and a remedy."""
    names = ("seed", "num_samples", "temperature", "batch_size")
    found = _type_problems(prompts, strategy, numbers)
    found = found or _problems(*(numbers[name] for name in names))
    if found:
        raise ValueError("; ".join(found))


def _type_problems(prompts: object, strategy: object, numbers: Mapping[str, object]) -> list[str]:
    """Return which arguments are of a type that cannot be used."""
    found = []
    if isinstance(prompts, bytes) or not isinstance(prompts, str | Sequence):
        found.append(f"prompts: {prompts!r}, give a text or a list of texts")
    if strategy is not None and not isinstance(strategy, str | Strategy):
        found.append(f"strategy: {strategy!r}, give a text such as 'self_speculative:E=2:d=4'")
    for name, value in numbers.items():
        optional, kind = _NUMBERS[name]
        fits = isinstance(value, (int, float) if kind is float else int)
        if isinstance(value, bool) or not (fits or (optional and value is None)):
            found.append(f"{name}: {value!r}, give a {'' if kind is float else 'whole '}number")
    return found


def _problems(seed: int, num_samples: int, temperature: float, batch_size: int | None) -> list[str]:
    """Return the faults of the options that the engine does not check."""
    found = []
    if not 0 <= seed < _SEEDS:
        found.append(f"seed: {seed}, give 0 to {_SEEDS - 1}")
    if num_samples < 1:
        found.append(f"num_samples: {num_samples}, give at least 1")
    if num_samples > 1 and not temperature:
        found.append(
            f"num_samples: {num_samples}, greedy samples are all the same, give a temperature"
        )
    if batch_size is not None and batch_size < 1:
        found.append(f"batch_size: {batch_size}, give at least 1")
    return found
