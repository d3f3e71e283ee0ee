"""What drafts of the exits would gain, measured while the model trains, and samples of its text.

Held-out prompts are continued greedily by all layers, and some of them by a few exits too, in one
batch of each rank. Of one pass for each token, all else follows: see `train/decoding/rounds.py`.
E = number of layers run, d = tokens drafted in a round.
"""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.tokenizer import Tokenizer
from models.config import LlamaConfig
from models.llama import Llama
from train.decoding.continuation import continue_greedily
from train.decoding.prompts import Prompt, is_answered, new_tokens
from train.decoding.rounds import (
    Choices,
    Rounds,
    count_rounds,
    draft_cost,
    speedup_bound,
    up_to_end,
)
from train.decoding.samples import sample_text
from train.decoding.speculation_config import SpeculationConfig
from train.parallel.runtime import Runtime
from train.run_folder.writing import attempt


@dataclass(frozen=True)
class Measured:
    """What one measurement found."""

    metrics: dict[str, float]
    """agreement of the exits; acceptance, tokens per round and bound of every (E, d)."""
    samples: dict[str, str]
    """Markdown by name, one for each sampled prompt."""
    line: str
    """The log line, without its step."""


class Speculation:
    """The prompts of a run, and the time that continuing them has taken."""

    def __init__(
        self,
        config: SpeculationConfig,
        model: LlamaConfig,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        runtime: Runtime,
        trained: Collection[int] = (),
    ) -> None:
        """Share the rows out to the ranks: each prompt by all layers, samples by the exits too."""
        self._config, self._model, self._runtime = config, model, runtime
        self._prompts, self._tokenizer = prompts, tokenizer
        self._exits = config.exits_of(model.n_layers, trained)
        self._new_tokens = new_tokens(config, model.max_seq_len)
        self._samples = min(config.samples, len(prompts))
        self._rows = [(i, model.n_layers) for i in range(len(prompts))]
        self._rows += [(i, E) for E in self._exits for i in range(self._samples)]
        self._began: float | None = None
        self._spent = 0.0

    def due(self, done_steps: int, steps: int) -> bool:
        """Whether to measure after so many steps, of a run of `steps`."""
        if self._began is None:
            self._began = time.monotonic()
        interval = self._config.interval_steps
        if not interval or not self._new_tokens:
            return False
        return done_steps == steps or done_steps % interval == 0

    def measure(self, model: Llama) -> Measured | None:
        """Measure the model as it is; every rank calls this, and rank 0 gets the result.

        What fails after the last pass, such as a text that cannot be decoded, costs the result.
        """
        device = self._runtime.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what is left of the steps is theirs
        start = time.monotonic()
        choices = self._choices(model)
        results: list[Measured] = []
        if self._runtime.is_main:
            attempt("speculation", lambda: results.append(self._read(choices)))
        now = time.monotonic()
        self._spent += now - start
        share = self._spent / max(now - (self._began or start), 1e-9)
        if not results:
            return None
        [found] = results
        time_line = f"{now - start:.2f} s, {share:.1%} of the time so far"
        metrics = found.metrics | {"perf/speculation_share": share}
        line = " | ".join(filter(None, [found.line, time_line]))
        return Measured(metrics, found.samples, line)

    def _choices(self, model: Llama) -> list[Choices]:
        """Return what all exits predict along every row, (L, tokens) each, on every rank."""
        runtime, rows = self._runtime, self._rows
        own = math.ceil(len(rows) / runtime.world_size)
        mine = rows[runtime.rank * own : (runtime.rank + 1) * own]
        # A rank without rows calls the model with one of no use: under FSDP, all call it alike.
        read = mine or rows[:1]
        found = continue_greedily(
            model,
            [self._prompts[i].tokens for i, _ in read],
            [E for _, E in read],
            self._new_tokens,
            runtime.device,
        )
        parts = runtime.gather(found[: len(mine)].numpy())
        return [row for part in parts for row in part]

    def _read(self, choices: Sequence[Choices]) -> Measured:
        whole = choices[: len(self._prompts)]
        agreement, drafts = self._agreement(whole), self._drafts(whole)
        metrics = {f"early_exit/agreement_exit_{E:02d}": a for E, a in agreement.items()}
        best = ""
        for (E, d), rounds in drafts.items():
            bound = speedup_bound(rounds, d, draft_cost(self._model, E))
            acceptance = rounds.accepted / max(rounds.drafted, 1)
            per_round = rounds.tokens / rounds.rounds
            metrics |= {
                f"speculation/acceptance_E{E}_d{d}": acceptance,
                f"speculation/tokens_per_round_E{E}_d{d}": per_round,
                f"speculation/bound_E{E}_d{d}": bound,
            }
            if bound == max(v for name, v in metrics.items() if "/bound_" in name):
                best = (
                    f"E={E} d={d} accepts {acceptance:.2f}, {per_round:.2f} tok/round, "
                    f"at most {bound:.2f}x"
                )
        parts = [" ".join(["agreement", *(f"E={E} {a:.2f}" for E, a in agreement.items())])]
        parts = [*(parts if agreement else []), *([best] if best else [])]
        if (answered := self._answered(whole)) is not None:
            metrics["speculation/exact_match"] = answered
            parts.append(f"exact match {answered:.2f}")
        return Measured(metrics, self._sample_texts(choices), " | ".join(parts))

    def _agreement(self, whole: Sequence[Choices]) -> dict[int, float]:
        """Return the share of tokens where the exit of E layers predicts the last one's."""
        ended = np.concatenate([up_to_end(row, self._tokenizer.eos_id) for row in whole], axis=1)
        agrees = (ended == ended[-1]).mean(axis=1).tolist()
        return dict(enumerate(agrees[:-1], start=1))

    def _drafts(self, whole: Sequence[Choices]) -> dict[tuple[int, int], Rounds]:
        end = self._tokenizer.eos_id
        return {
            (E, d): sum(
                (count_rounds(row[E - 1].tolist(), row[-1].tolist(), d, end) for row in whole),
                Rounds(),
            )
            for E in self._exits
            for d in self._config.draft_tokens
        }

    def _answered(self, whole: Sequence[Choices]) -> float | None:
        """Return the share of the prompts that are answered exactly; None without answers."""
        pairs = [
            is_answered(prompt.answer, self._text(row[-1]))
            for prompt, row in zip(self._prompts, whole, strict=True)
            if prompt.answer is not None
        ]
        return sum(pairs) / len(pairs) if pairs else None

    def _sample_texts(self, choices: Sequence[Choices]) -> dict[str, str]:
        L, texts = self._model.n_layers, {}
        by_row = dict(zip(self._rows, choices, strict=True))
        for i in range(self._samples):
            shown = {f"E={E}": self._text(by_row[i, E][E - 1]) for E in self._exits}
            shown[f"all {L} layers"] = self._text(by_row[i, L][L - 1])
            prompt = self._tokenizer.decode([*self._prompts[i].tokens])
            texts[f"prompt_{i + 1}"] = sample_text(prompt, shown)
        return texts

    def _text(self, tokens: Choices) -> str:
        """Return the text of a continuation, (tokens,) int64, up to its end."""
        ids = tokens.tolist()
        end = self._tokenizer.eos_id
        return self._tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
