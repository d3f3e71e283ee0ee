"""Everything that only a GPU can show, in order of value, within a budget of seconds.

    PYTHONPATH=. python benchmarks/gpu.py --seconds 540 --json benchmarks/gpu.json
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --size tiny     # a rehearsal

Each block is caught by itself, prints as it goes and is written to the JSON before the next begins;
a table ends the run. It needs torch, numpy, transformers and sentencepiece of the machine, and the
wheels that `benchmarks/gpu_wheels.sh` downloads: without them, the blocks that train say so.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from benchmarks.on_gpu.correctness import correctness
from benchmarks.on_gpu.decoding import decode, decode_long
from benchmarks.on_gpu.loss_alone import loss_alone
from benchmarks.on_gpu.machine import attention, ceilings
from benchmarks.on_gpu.session import Block, Session, run_blocks
from benchmarks.on_gpu.training import mfu, profile_step, saves, syncs


def blocks() -> list[Block]:
    """Return the blocks in order of value; what may be left out where time is short comes last."""
    return [
        Block("ceilings", 5, ceilings),
        Block("attention", 5, attention),
        Block("correctness", 40, correctness),
        Block("syncs", 10, syncs),
        Block("saves", 10, saves),
        Block("loss", 20, loss_alone),
        Block("mfu 110m", 45, lambda s: mfu(s, "110m")),
        Block("mfu 1.5b", 60, lambda s: mfu(s, "layerskip_1.5b")),
        Block("profile 110m", 10, profile_step),
        Block("decode 110m eager", 15, lambda s: decode(s, "110m", "eager")),
        Block("decode 110m compiled", 60, lambda s: decode(s, "110m", "compiled")),
        Block("decode 110m float32", 15, lambda s: decode(s, "110m", "eager", dtype=torch.float32)),
        Block("decode 1.5b eager", 20, lambda s: decode(s, "layerskip_1.5b", "eager")),
        Block("decode 1.5b compiled", 90, lambda s: decode(s, "layerskip_1.5b", "compiled")),
        Block("decode 1.5b 4k eager", 15, lambda s: decode_long(s, "eager")),
        Block("decode 1.5b 4k compiled", 70, lambda s: decode_long(s, "compiled")),
        Block("mfu 350m", 50, lambda s: mfu(s, "350m")),
        Block("decode 110m graphs", 15, lambda s: decode(s, "110m", "graphs")),
        Block("decode 1.5b graphs", 20, lambda s: decode(s, "layerskip_1.5b", "graphs")),
    ]


def main(arguments: list[str]) -> int:
    """Run the blocks; return 1 if one has failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--seconds", type=float, default=540.0, help="budget of all blocks")
    parser.add_argument("--json", type=Path, help="also write the results here, block by block")
    parser.add_argument("--only", nargs="*", help="names of blocks, or how they begin")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or training takes the GPU
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: device: cuda, this machine has no CUDA device", file=sys.stderr)
        return 2
    chosen = [
        block
        for block in blocks()
        if not options.only or block.name.startswith(tuple(options.only))
    ]
    if not chosen:
        print(f"error: only: no block is called {options.only}", file=sys.stderr)
        return 2
    ends = time.monotonic() + options.seconds
    session = Session(torch.device(options.device), options.size == "tiny", ends, options.json)
    with session:
        return run_blocks(session, chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
