"""A checkpoint under lm-evaluation-harness: `python -m inference.lm_harness --run DIR --tasks A,B`.

Likelihoods are those of any exit; continuations are written by any strategy.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro
from torch.nn import functional as F

from data.command_line import run_command
from inference.cli.arguments import Count, DecodingOptions, Names
from inference.cli.terminal import format_table, with_progress, write_json
from inference.engine.generation import Generation
from inference.engine.sampling import Sampling
from inference.engine.strategy import Strategy
from inference.loading.run import Run
from inference.strategies.early_exit import EarlyExit
from inference.strategies.registry import STRATEGIES, describe, parse_strategy
from inference.strategies.speculative import check_tokenizer

if TYPE_CHECKING or importlib.util.find_spec("lm_eval"):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
else:
    TemplateLM = object

_MAX_GEN_TOKS = 256  # the harness's own
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the most tokens of a continuation; the first that is given counts."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """The harness's interface to a model: log-likelihoods and continuations.

    Args:
        run: The checkpoint.
        E: Layers behind a likelihood.
        strategy: Writes continuations.
        batch_size: Rows run at once.
    """

    def __init__(self, run: Run, *, E: int, strategy: Strategy, batch_size: int) -> None:
        super().__init__()
        n_layers = run.model.config.n_layers
        if not 1 <= E <= n_layers:
            raise ValueError(f"E: {E}, give 1 to {n_layers} layers for this model")
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size}, give at least 1")
        self._run, self._E, self._strategy, self._batch = run, E, strategy, batch_size

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self._run.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that every text begins with."""
        return self._run.tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text, BOS first unless that is not wanted."""
        ids = self._run.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def loglikelihood_rolling(
        self, requests: Sequence["Instance"], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, each token predicted once."""
        windows: list[Any] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            cuts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._run.model.config.max_seq_len,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cuts):
                windows.append((("", ""), context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += value
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        """Return log P(continuation | context), and whether it is what greedy decoding writes.

        A context that does not fit is cut at its beginning.
        """
        model = self._run.model
        longest = model.config.max_seq_len + 1  # the last token is only predicted
        rows = [(context + continuation)[-longest:] for _, context, continuation in requests]
        answers = [(0.0, True)] * len(rows)
        longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        batches = [longest_first[i : i + self._batch] for i in range(0, len(rows), self._batch)]
        for batch in with_progress(batches, "likelihoods"):
            width = len(rows[batch[0]])
            # What follows a row's end cannot be seen from within it.
            padded = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in batch])
            tokens = padded.to(model.norm.weight.device)
            h, _ = model.run_layers(model.embed(tokens[:, :-1]), 0, self._E)
            for row, (i, x) in enumerate(zip(batch, h, strict=True)):
                last = len(rows[i])
                first = max(1, last - len(requests[i][2]))
                logits = model.exit_logits(x[first - 1 : last - 1], self._E).float()
                wanted = tokens[row, first:last]
                total = -float(F.cross_entropy(logits, wanted, reduction="sum"))
                answers[i] = (total, bool((logits.argmax(-1) == wanted).all()))
        return answers

    def generate_until(
        self, requests: Sequence["Instance"], disable_tqdm: bool = False
    ) -> list[str]:
        """Return continuations, each cut before the first of the texts it is to end at."""
        by_settings: dict[tuple[int, Sampling], list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(_generation_settings(request.args[1]), []).append(i)
        texts, context = [""] * len(requests), self._run.model.config.max_seq_len
        for (max_new_tokens, sampling), indices in by_settings.items():
            # A prompt that is too long loses its beginning; where the task asks for more tokens
            # than the context has, it keeps half of the context.
            max_prompt = context - max_new_tokens if max_new_tokens < context else context // 2
            generation = Generation(
                self._run.model,
                [self.tok_encode(requests[i].args[0])[-max_prompt:] for i in indices],
                self._strategy,
                max_new_tokens=max_new_tokens,
                batch_size=self._batch,
                stop_tokens=self._run.stop_tokens,
                sampling=sampling,
                graphs=self._run.graphs,
            ).finish()
            for i, tokens in zip(indices, generation.tokens, strict=True):
                text = self._run.tokenizer.decode([t for t in tokens if t != self.eot_token_id])
                texts[i] = _cut(text, requests[i].args[1].get("until"))
        return texts


def _generation_settings(options: Mapping[str, Any]) -> tuple[int, Sampling]:
    """Return the most tokens and the sampling of a task's options, as the harness reads them.

    Raises:
        ValueError: An option is out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    most = int(next((given[name] for name in _MAX_TOKENS if name in given), _MAX_GEN_TOKS))
    if most < 1:
        raise ValueError(f"max_gen_toks: {most}, a task asks for none, give --gen_tokens")
    if not given.get("do_sample", float(given.get("temperature", 0.0)) > 0):
        return most, Sampling()
    top_k = given.get("top_k") or None  # 0: all of them
    temperature = float(given.get("temperature", 1.0))
    return most, Sampling(temperature=temperature, top_k=top_k, top_p=given.get("top_p"))


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for end in [until] if isinstance(until, str) else until or ():
        text = text.split(end)[0] if end else text
    return text


@dataclass(frozen=True, kw_only=True)
class HarnessOptions(DecodingOptions):
    """Score a checkpoint on tasks of lm-evaluation-harness.

    Likelihoods are those of any exit; continuations are written by any strategy.

    Example:
      python -m inference.lm_harness --run outputs/demo --tasks lambada_openai --E 6
    """

    tasks: Names
    """Tasks of the harness, by name."""
    include_path: Path | None = None
    """Folder of further tasks, as .yaml."""
    E: int | None = None
    """Layers behind every likelihood; all of them if not given."""
    strategy: Annotated[
        str | None,
        tyro.conf.arg(
            help="Writes continuations; early_exit with --E layers if not given; of "
            f"{', '.join(STRATEGIES)}."
        ),
    ] = None
    batch_size: Count = 8
    """Rows run at once."""
    limit: Count | None = None
    """Examples of each task; all if not given."""
    num_fewshot: int | None = None
    """Answered examples before each question."""
    gen_tokens: Count | None = None
    """Most tokens of a continuation; the task's if not given."""


def lm_harness(options: HarnessOptions) -> None:
    """Run the tasks; print and write their scores."""
    if TemplateLM is object:
        raise ValueError("tasks: lm_eval is not installed, pip install -e .[lm_eval]")
    import lm_eval
    from lm_eval.tasks import TaskManager

    run = options.open_run()
    n_layers = run.model.config.n_layers
    E = n_layers if options.E is None else options.E
    strategy = EarlyExit(E=E) if options.strategy is None else parse_strategy(options.strategy)
    strategy = strategy.with_defaults(n_layers)
    check_tokenizer(strategy, run)
    model = HarnessModel(run, E=E, strategy=strategy, batch_size=options.batch_size)
    manager = TaskManager(include_path=options.include_path and str(options.include_path))
    tasks = [*options.tasks]
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"tasks: the harness has no {', '.join(unknown)}, see lm-eval ls tasks")
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        gen_kwargs=None if options.gen_tokens is None else {"max_gen_toks": options.gen_tokens},
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    print(f"{run.checkpoint}, likelihoods after {E} layers, written by {describe(strategy)}")
    rows = [
        [task, *measure.split(",", 1)[:1], f"{value:.4f}"]
        for task, measures in found["results"].items()
        for measure, value in measures.items()
        if isinstance(value, float)
    ]
    print(format_table(["task", "measure", "value"], rows))
    header: dict[str, Any] = {
        "checkpoint": str(run.checkpoint),
        "E": E,
        "strategy": describe(strategy),
    }
    write_json(options.json, header | {"results": found["results"]})


def main() -> None:
    run_command(HarnessOptions, lm_harness, prog="python -m inference.lm_harness")


if __name__ == "__main__":
    main()
