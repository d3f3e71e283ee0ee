"""One command for all of them: `skipstone VERB ...` is `python -m` the verb's module.

Knows the names of the modules alone, so that its own help appears at once.
"""

import difflib
import os
import runpy
import signal
import sys
from collections.abc import Sequence

from launch import __version__
from launch.torchrun import SCRIPT, prepare

VERBS = {
    "prepare": ("data.prepare", "text to token shards"),
    "train": ("train.main", "train a preset, under torchrun"),
    "doctor": ("train.doctor", "check all that training needs on this machine"),
    "sweep": ("train.sweep", "train with every combination of some fields' values"),
    "evaluate": ("inference.evaluate", "loss, perplexity and agreement at every exit"),
    "tune": ("inference.tune", "find the fastest decoding strategy for a run on this machine"),
    "report": ("inference.report", "one page on a run: losses, exits, speed, tokens"),
    "generate": ("inference.generate", "continue a prompt"),
    "serve": ("inference.serve", "answer requests over HTTP, by OpenAI's API, and a page"),
    "benchmark": ("inference.benchmark", "compare decoding strategies on the same prompts"),
    "convert": ("models.convert", "Hugging Face folders to and from checkpoints"),
    "calibrate": ("inference.calibrate", "certify a threshold of CALM"),
    "train_gate": ("inference.train_gate", "fit a gate to a frozen model"),
    "fit_jump": ("inference.fit_jump", "fit a linear map from every exit to the last layer"),
    "skip_search": ("inference.skip_search", "find the layers that drafts can do without"),
    "frequent_tokens": ("inference.frequent_tokens", "count tokens, for a smaller head of drafts"),
    "oracle": ("inference.oracle", "the least depth that any exit rule could do with"),
    "lm_harness": ("inference.lm_harness", "a checkpoint under lm-evaluation-harness"),
    "semantic_parsing": ("data.semantic_parsing", "write a small task to finetune on"),
}
_USAGE = """\
usage: skipstone VERB ...
       skipstone train [TORCHRUN OPTION ...] [PRESET] [--section.field VALUE ...]

Pretrain Llama models that can stop early, and decode from them losslessly faster.
"""


def main() -> int:
    """Run the verb that the command line names, and return the exit status where it does."""
    verb, *words = sys.argv[1:] or [""]
    if verb == "--version":
        print(f"skipstone {__version__}")
        return 0
    if verb in ("", "-h", "--help"):
        return _print(_help()) or (0 if verb else 2)
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(VERBS)}"
        print(f"error: verb: {verb} does not exist, {hint}", file=sys.stderr)
        return 2
    if verb == "train" and not {"-h", "--help", "--dry_run", "--check"} & {*words}:
        return train(words)
    sys.argv[1:] = words
    runpy.run_module(VERBS[verb][0], run_name="__main__", alter_sys=True)
    return 0


def _print(text: str) -> int:
    """Print, and return 0, or 141 where whoever read the output has gone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return 128 + signal.SIGPIPE
    return 0


def train(words: Sequence[str]) -> int:
    """Train under torchrun, on every GPU or one CPU process where its options name no other number.

    Args:
        words: Options of torchrun, then those of train/main.py.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # quiet until torchrun handles it
    import torch
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import main as torchrun

    prepare()
    count = 0
    known = get_args_parser()._option_string_actions
    if "--shutdown-timeout" not in known:  # torchrun of torch 2.11 has none
        words = [word for word in words if not word.startswith("--shutdown-timeout=")]
    while count < len(words) and (option := known.get(words[count].partition("=")[0])):
        count += 1 if "=" in words[count] or option.nargs == 0 else 2
    options = [*words[:count]]
    given = " ".join(options).replace("-", "_")
    if "__nproc_per_node" not in given:
        options.append(f"--nproc_per_node={torch.cuda.device_count() or 1}")
    if not any(name in given for name in ("__nnodes", "__rdzv", "__master")):
        options.append("--standalone")
    torchrun([*options, str(SCRIPT), *words[count:]])
    return 0


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {summary}" for verb, (_, summary) in VERBS.items()]
    return "\n".join([_USAGE, *lines, "", "skipstone VERB --help describes the options of a verb."])


if __name__ == "__main__":
    sys.exit(main())
