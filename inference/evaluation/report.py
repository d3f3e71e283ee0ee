"""The tables of measured strategies."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from inference.cli.arguments import DecodingOptions
from inference.cli.terminal import format_table
from inference.evaluation.arm_result import ArmResult
from inference.loading.run import Run
from inference.strategies.registry import shorten

LEGEND = """\
strategy   settings at their defaults left out, such as d=4; ... stands for measured costs, which
           --json names
tok/s      new tokens per second, of all rows together, the prompts' time left out
speedup    tokens/s over the base's in the same repeat: the median; range: least and most
layers     layers run for each new token, drafts included; heads: LM heads
depth      mean layers run for a new token, of strategies that exit early
syncs      times the host waited for the device, for each new token
prompt_s   seconds for all prompts
MiB        peak memory: allocated on CUDA, growth of the resident set on a CPU
same       tokens equal to autoregressive's at the same position; of a lossless strategy, tie:
           where they first differ, both tokens' logits are equal within rounding; fault: not
chosen     tokens that the full model finds most probable
ln_p       log likelihood under the full model, nats per token
past_end   of a task: tokens behind a text that ends an answer, where rows go on
accept     acceptance rate: drafted tokens that were accepted, and so in the text
agreement  a, probability that a drafted token is accepted if those before it were
c, verify  cost of a draft step and of a verification, in full steps
bound      the best speedup for this a, d and c"""


def describe_setting(run: Run, options: DecodingOptions) -> str:
    """Return what all arms have in common: dtype, device, threads, forms of the weights."""
    weight, threads = run.model.head_weight, torch.get_num_threads()
    parts = [str(weight.dtype).removeprefix("torch."), f"on {weight.device}"]
    if weight.device.type == "cpu":
        parts.append(f"with {threads} thread" + "s" * (threads > 1))
    parts += [options.quantize] if options.quantize else []
    parts += ["compiled"] if options.compile else []
    return " ".join(parts)


def comparison(results: Sequence[ArmResult], setting: str) -> str:
    """Return the base, the tables, and a warning for each arm that should have its tokens.

    Args:
        results: The arms of one batch size, autoregressive decoding first.
        setting: Of all arms, see `describe_setting`.
    """
    return "\n".join(
        [base_line(results[0], setting), table(results), *difference_warnings(results)]
    )


def base_line(base: ArmResult, setting: str) -> str:
    """Return what speedups are over, with its own spread."""
    line = f"base: {base.strategy}, {setting}, batch {base.batch_size}: "
    line += f"{base.tokens_per_second:.1f} tokens/s"
    if len(base.speeds) > 1:
        line += f", {min(base.speeds):.1f} to {max(base.speeds):.1f} in {len(base.speeds)} repeats"
    return line


def difference_warnings(results: Sequence[ArmResult]) -> list[str]:
    """Return a line for each lossless arm whose tokens are not the base's."""
    causes = {
        "tie": "where they part the two tokens' logits are equal within rounding",
        "fault": "which rounding does not explain: a fault, and no speed to compare",
    }
    names = short_names([r.settings for r in results])
    return [
        f"warning: {names[r.settings]}: {1 - (r.same_tokens or 0.0):.1%} of the tokens are not "
        f"the base's, {causes[r.first_difference]}"
        for r in results
        if r.first_difference is not None
    ]


def table(results: Sequence[ArmResult]) -> str:
    """Return the results as text, one line for each arm, and a second table of the drafts."""
    header = "strategy tok/s speedup range layers heads depth syncs prompt_s MiB same chosen ln_p"
    names = short_names([r.settings for r in results])
    rows = [
        [
            names[r.settings],
            f"{r.tokens_per_second:.1f}",
            f"{r.speedup:.2f}x",
            speed_range(r),
            f"{r.layers_per_token:.2f}",
        ]
        + [f"{r.heads_per_token:.2f}", _cell(r.mean_depth, ".2f"), f"{r.syncs_per_token:.2f}"]
        + [f"{r.prefill_seconds:.3f}", _cell(r.peak_bytes and r.peak_bytes / 2**20, ".1f")]
        + ["yes" if r.same_tokens == 1.0 else _cell(r.same_tokens, ".1%") + _cause(r)]
        + [f"{r.full_choice:.1%}", f"{r.log_likelihood:.3f}"]
        + [f"{value:.3f}" for value in r.scores.values()]
        for r in results
    ]
    text = format_table([*header.split(), *results[0].scores], rows)
    drafts = [
        [names[r.settings], _cell(r.acceptance_rate, ".1%"), _cell(r.tokens_per_verify, ".2f")]
        + [_cell(r.agreement, ".3f"), _cell(r.draft_cost, ".3f"), _cell(r.verify_cost, ".2f")]
        + [f"{r.speedup:.2f}x", _cell(r.bound, ".2f"), _cell(r.share_of_bound, ".0%")]
        for r in results
        if r.acceptance_rate is not None
    ]
    if not drafts:
        return text
    header = "strategy accept tok/round agreement c verify speedup bound of_bound"
    return f"{text}\n\n{format_table(header.split(), drafts)}"


def short_names(strategies: Iterable[str], short: Callable[[str], str] = shorten) -> dict[str, str]:
    """Return strategies' short names by their text: the text itself where two would be the same."""
    names = {text: short(text) for text in strategies}
    shared = Counter(names.values())
    return {text: name if shared[name] == 1 else text for text, name in names.items()}


def speed_range(result: ArmResult) -> str:
    """Return the least and the most of the repeats' speedups; "-" for one repeat, or the base."""
    least, most = min(result.speedups), max(result.speedups)
    return "-" if least == most else f"{least:.2f}-{most:.2f}"


def _cause(result: ArmResult) -> str:
    return f" {result.first_difference}" if result.first_difference else ""


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
