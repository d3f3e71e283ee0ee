"""Find parts that drafts can leave out: `python -m inference.skip_search --run DIR`.

Draft & Verify (arXiv 2309.08168), section 3.2: Bayesian optimisation over the 2 L attention and
feed-forward parts of a model. The paper maximises tokens/s, which another machine or another load
orders otherwise; by default ours maximises a cost model, which is the same everywhere. The process
is fitted to the choices themselves: the paper's is fitted to [0, 1]^(2 L), cut at 1/2, and so
measures one choice many times.
"""

import shlex
from dataclasses import asdict, dataclass, replace
from typing import Literal

from data.command_line import run_command
from inference.cli.arguments import Count, RunOptions, SamplingOptions
from inference.cli.terminal import format_table, report_line, write_json
from inference.engine.counters import Counters, speedup_bound
from inference.engine.generation import Generation
from inference.engine.sampling import Sampling
from inference.engine.strategy import Strategy
from inference.evaluation.prompts import PromptOptions, prompts_from
from inference.fitting.bayesian_search import Choice, search
from inference.loading.run import Run
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.registry import describe
from inference.strategies.skip_draft import SkipDraft
from models.config import LlamaConfig
from models.flops import attention_params, feed_forward_params, step_params
from models.llama import Llama, SkippedParts

MODEL_COST, TOKENS_PER_SECOND = "model_cost", "tokens_per_second"
_FINALISTS = 5


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One strategy, measured."""

    strategy: SkipDraft
    score: float
    """What is maximised: speedup by the cost model, or tokens/s."""
    draft_cost: float
    """c, see `draft_cost`."""
    agreement: float
    """a, see `Counters.agreement`; in a search, of drafts of the most tokens."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A way to measure strategies."""

    model: Llama
    objective: str
    """MODEL_COST or TOKENS_PER_SECOND."""
    d: int
    """Most tokens drafted in a round."""
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_tokens: tuple[int, ...] = ()

    def of_choice(self, choice: Choice, prompts: list[list[int]]) -> Trial:
        """Decode prompts without some parts; by the cost model, with the best d up to ours.

        There, drafts end for no other reason than d, so that all prompts may be decoded at once
        and one agreement describes them.
        """
        strategy = replace(strategy_of(choice), d=self.d)
        if self.objective == TOKENS_PER_SECOND:
            return self.of_strategy(strategy, prompts)
        strategy = replace(strategy, gamma=0.0)
        counters = self.decode(strategy, prompts)
        trials = [self._scored(replace(strategy, d=d), counters) for d in range(1, self.d + 1)]
        return max(trials, key=lambda trial: trial.score)

    def of_strategy(self, strategy: SkipDraft, prompts: list[list[int]]) -> Trial:
        """Decode prompts with a strategy as it is."""
        return self._scored(strategy, self.decode(strategy, prompts))

    def decode(self, strategy: Strategy, prompts: list[list[int]]) -> Counters:
        """Return the counts of a run: of all prompts at once, or one at a time for tokens/s."""
        generation = Generation(
            self.model,
            prompts,
            strategy,
            max_new_tokens=self.max_new_tokens,
            batch_size=1 if self.objective == TOKENS_PER_SECOND else None,
            stop_tokens=self.stop_tokens,
            sampling=self.sampling,
            seed=self.seed,
        )
        return generation.finish().counters

    def _scored(self, strategy: SkipDraft, counters: Counters) -> Trial:
        a, c = counters.agreement or 0.0, draft_cost(strategy.skipped, self.model.config)
        score = counters.tokens_per_second
        if self.objective == MODEL_COST:
            score = speedup_bound(a, strategy.d, c)
        return Trial(strategy=strategy, score=score, draft_cost=c, agreement=a)


def strategy_of(choice: Choice) -> SkipDraft:
    """Return the strategy whose drafts leave out what is chosen of the 2 L parts.

    The first L answers are the attention parts'.
    """
    n_layers = len(choice) // 2
    attention, feed_forward = choice[:n_layers], choice[n_layers:]
    return SkipDraft(
        attention=tuple(l for l in range(n_layers) if attention[l]),
        feed_forward=tuple(l for l in range(n_layers) if feed_forward[l]),
    )


def draft_cost(skipped: SkippedParts, config: LlamaConfig) -> float:
    """Return c: parameters that a draft step reads over those of a full step, head included.

    Keys and values are not counted: where texts are long, attention costs more than this.
    """
    attention, feed_forward = attention_params(config), feed_forward_params(config)
    full = step_params(config, config.n_layers)
    saved = len(skipped.attention) * attention + len(skipped.feed_forward) * feed_forward
    return 1.0 - saved / full


def starting_points(n_layers: int) -> list[Choice]:
    """Return the choices tried first, given by hand as the authors' are.

    Nothing; `SkipDraft`'s own; every other attention part, and the middle half of them; the same of
    both kinds; the upper half of the layers, which is early exit.
    """
    layers, quarter = range(n_layers), n_layers // 4
    own, none = SkipDraft().with_defaults(n_layers).skipped, [False] * n_layers
    odd = [l % 2 == 1 for l in layers]
    middle = [quarter <= l < n_layers - quarter for l in layers]
    upper = [l >= (n_layers + 1) // 2 for l in layers]
    given = [
        (none, none),
        ([l in own.attention for l in layers], [l in own.feed_forward for l in layers]),
        *((part, none) for part in (odd, middle)),
        *((part, part) for part in (odd, middle, upper)),
    ]
    return [*dict.fromkeys((*attention, *feed_forward) for attention, feed_forward in given)]


@dataclass(frozen=True, kw_only=True)
class SkipSearchOptions(SamplingOptions, PromptOptions, RunOptions):
    """Search for the attention and feed-forward parts that drafts of skip_draft can leave out.

    Every other prompt is searched on. The best few are then measured on the prompts between, which
    give the table its order; the first is the strategy to use. The other commands take the
    strategies as they are written there.

    Example:
      python -m inference.skip_search --run outputs/demo --iterations 100 --json skip.json
    """

    objective: Literal["model_cost", "tokens_per_second"] = "model_cost"
    """Maximise the speedup by agreement and parameters read, or measured tokens/s, batch 1."""
    iterations: Count = 200
    """Choices to try."""
    d: Count = 8
    """Tokens drafted per round at most; model_cost finds fewer."""
    prompts: Count = 16
    max_new_tokens: Count = 32


def find(
    measurement: Measurement, prompts: list[list[int]], *, iterations: int
) -> list[tuple[Trial, Trial]]:
    """Search on every other prompt; return the best few there, and as they are on the others."""
    seen, fresh = prompts[::2], prompts[1::2]
    trials: dict[Choice, Trial] = {}

    def measure(choice: Choice) -> float:
        trials[choice] = measurement.of_choice(choice, seen)
        return trials[choice].score

    starts = starting_points(measurement.model.config.n_layers)
    measurement.of_choice(starts[0], seen[:1])  # Warm-up: the first call of a shape is slow.
    found = search(
        measure, starts, iterations=iterations, seed=measurement.seed, report=report_line
    )
    best = [trials[choice] for choice in [*found][:_FINALISTS]]
    pairs = [(trial, measurement.of_strategy(trial.strategy, fresh)) for trial in best]
    return sorted(pairs, key=lambda pair: -pair[1].score)


def table(pairs: list[tuple[Trial, Trial]], plain: list[float]) -> str:
    """Return what was found as text; `plain` is autoregressive decoding's score on both halves."""
    rows = [["autoregressive", *(f"{score:.4g}" for score in plain), "-", "1.000"]]
    rows += [
        [describe(again.strategy), f"{first.score:.4g}", f"{again.score:.4g}"]
        + [f"{again.agreement:.3f}", f"{again.draft_cost:.3f}"]
        for first, again in pairs
    ]
    return format_table(["strategy", "searched", "other prompts", "a", "c"], rows)


def next_step(options: SkipSearchOptions, best: Trial, plain: float) -> str:
    """Return which strategy to use and the command that measures it; `plain` is what to beat."""
    if best.score <= plain:
        return "none is faster than autoregressive: use that, or search with more --iterations"
    strategy, run = describe(best.strategy), shlex.quote(str(options.run))
    command = f"python -m inference.benchmark --run {run} --strategies {strategy}"
    return f"use {strategy}\nnext: {command}"


def skip_search(options: SkipSearchOptions) -> None:
    """Search; print and write the best few."""
    if options.max_new_tokens < 2:
        raise ValueError(f"max_new_tokens: {options.max_new_tokens}, give at least 2")
    run = options.open_run()
    prompts = prompts_from(run, options)
    if len(prompts) < 2:
        raise ValueError(f"prompts: {len(prompts)}, give at least 2, one to search on")
    measurement = Measurement(
        model=run.model,
        objective=options.objective,
        d=options.d,
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        seed=options.seed,
        stop_tokens=options.stop_tokens(run),
    )
    pairs = find(measurement, prompts, iterations=options.iterations)
    plain = [1.0, 1.0]
    if options.objective == TOKENS_PER_SECOND:
        runs = [
            measurement.decode(Autoregressive(), part) for part in (prompts[::2], prompts[1::2])
        ]
        plain = [counters.tokens_per_second for counters in runs]
    unit = "speedup by the cost model" if options.objective == MODEL_COST else "tokens/s"
    print(f"{run.checkpoint}, step {run.manifest.step}, {options.iterations} trials, {unit}")
    print(table(pairs, plain))
    print(next_step(options, pairs[0][1], plain[1]))
    write_json(options.json, _content(options, run, prompts, pairs) | {"autoregressive": plain})


def _content(
    options: SkipSearchOptions, run: Run, prompts: list[list[int]], pairs: list[tuple[Trial, Trial]]
) -> dict[str, object]:
    return {
        "checkpoint": str(run.checkpoint),
        "step": run.manifest.step,
        "objective": options.objective,
        "iterations": options.iterations,
        "d": options.d,
        "prompts": prompts,
        "max_new_tokens": options.max_new_tokens,
        "sampling": asdict(options.sampling),
        "seed": options.seed,
        "found": [
            {
                "strategy": describe(again.strategy),
                "searched": asdict(first),
                "other_prompts": asdict(again),
            }
            for first, again in pairs
        ],
    }


def main() -> None:
    run_command(SkipSearchOptions, skip_search, prog="python -m inference.skip_search")


if __name__ == "__main__":
    main()
