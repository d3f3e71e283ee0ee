"""Tables of measured strategies, and the machine they were measured on."""

import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from inference.cli.terminal import format_table
from inference.evaluation.measurement import ArmResult
from inference.loading.run import Run

LEGEND = """speedup: over autoregressive in the same repeat. layers, heads: computed per new
token, drafts included. depth: mean layers behind a token, where a strategy tells. syncs: times
the host waited per token. prompt_s: seconds for all prompts. MiB: CUDA: most memory allocated,
weights included; CPU: growth of the peak resident set. same: tokens equal to autoregressive's,
place by place. chosen: tokens the full model finds most probable after those before them. ln_p:
log likelihood of what was written under the full model, nats per token.
accept: drafted tokens accepted. a: agreement of a draft token given those before it were
accepted. c: a draft step, verify: a verification, in full steps. bound: best speedup for this a,
d and c."""


def table(results: list[ArmResult]) -> str:
    """Return the results as text, one line for each arm, and a second table of the drafts."""
    header = "strategy tok/s speedup layers heads depth syncs prompt_s MiB same chosen ln_p"
    rows = [
        [r.settings, f"{r.tokens_per_second:.1f}", f"{r.speedup:.2f}x", f"{r.layers_per_token:.2f}"]
        + [f"{r.heads_per_token:.2f}", _cell(r.mean_depth, ".2f"), f"{r.syncs_per_token:.2f}"]
        + [f"{r.prefill_seconds:.3f}", _cell(r.peak_bytes and r.peak_bytes / 2**20, ".1f")]
        + ["yes" if r.same_tokens == 1.0 else _cell(r.same_tokens, ".1%")]
        + [f"{r.full_choice:.1%}", f"{r.log_likelihood:.3f}"]
        + [f"{value:.3f}" for value in r.scores.values()]
        for r in results
    ]
    text = format_table([*header.split(), *results[0].scores], rows)
    drafts = [
        [r.settings, _cell(r.acceptance_rate, ".1%"), _cell(r.tokens_per_verify, ".2f")]
        + [_cell(r.agreement, ".3f"), _cell(r.draft_cost, ".3f"), _cell(r.verify_cost, ".2f")]
        + [f"{r.speedup:.2f}x", _cell(r.bound, ".2f"), _cell(r.share_of_bound, ".0%")]
        for r in results
        if r.acceptance_rate is not None
    ]
    if not drafts:
        return text
    header = "strategy accept tok/round a c verify speedup bound of_bound"
    return f"{text}\n\n{format_table(header.split(), drafts)}"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def machine() -> dict[str, str | int | None]:
    """Say where the numbers come from."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "platform": platform.platform(),
        "cpu": models[0] if models else platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_draft_fits(name: str, d: int, run: Run) -> None:
    """Make sure that drafts of d tokens, which argument `name` asks for, can be timed.

    Raises:
        ValueError: the context has no room for a token, d drafted ones and the one after.
    """
    longest = run.model.config.max_seq_len
    if d + 2 > longest:
        raise ValueError(
            f"{name}: {d} drafted tokens do not fit the model's context of {longest}, give at "
            f"most {longest - 2}"
        )
