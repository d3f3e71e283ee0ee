"""Speed and memory of data.prepare on 1 and 8 times a corpus, beside SentencePiece alone.

    python benchmarks/prepare.py --json benchmarks/prepare.json

The corpus is `embedded` as JSON lines; the larger one holds every document eight times, its lines
in another order each time. SentencePiece alone encodes the texts in memory, in as many processes, a
document per call, and drops the ids; the whole command starts its processes, reads, splits,
encodes, writes and merges.
"""

import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from data.command_line import run_command
from data.faults import Faults
from data.pieces.plan import MOST_PIECE_BYTES, list_pieces
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.row_layout import RowLayout
from data.sources.documents import read_documents

INTERVAL_SECONDS = 0.02
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure data.prepare."""

    copies: int = 8
    """How many times larger the larger corpus is."""
    documents: int = 0
    """Take so many documents of `embedded`; 0: all."""
    vocab_size: int = 2048
    """Tokens of the tokenizer, which is trained before."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes of both."""
    repeats: int = 3
    """Measurements of each, in turn."""
    json: Path | None = None
    """Also write the numbers to this file."""


def compare(options: Options) -> None:
    """Measure, print, and write the numbers down."""
    folder = Path(tempfile.mkdtemp())
    try:
        small, large = folder / "1.jsonl", folder / f"{options.copies}.jsonl"
        write_corpus(small, 1, options.documents)
        write_corpus(large, options.copies, options.documents)
        config = PrepareConfig(input=(str(small),), vocab_size=options.vocab_size)
        tokenizer = prepare(config, folder / "first", workers=options.workers).tokenizer_path
        runs = dict[str, list[dict[str, float]]]()
        for name, corpus in (("small", small), ("large", large)):
            alone = runs[f"sentencepiece_{name}"] = []
            whole = runs[name] = []
            for _ in range(options.repeats):
                alone.append(encode_alone(corpus, tokenizer, options.workers))
                whole.append(prepare_once(corpus, tokenizer, options.workers))
    finally:
        shutil.rmtree(folder)
    report(options, runs)


def write_corpus(path: Path, copies: int, documents: int) -> None:
    """Write the corpus so many times over, the lines of each document in another order."""
    with path.open("w") as file:
        for copy in range(copies):
            read = read_documents(["embedded"], Faults(), RowLayout())
            for number, document in enumerate(read):
                if number == documents > 0:
                    break
                lines = document.text.splitlines(keepends=True)
                if copy:
                    random.Random(f"{copy} {number}").shuffle(lines)
                file.write(json.dumps({"text": "".join(lines)}) + "\n")


def texts(path: Path) -> list[str]:
    """Return the texts of JSON lines."""
    with path.open() as file:
        return [json.loads(line)["text"] for line in file]


def encode_alone(path: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """Encode with SentencePiece alone, in as many processes."""
    text_bytes = sum(len(text.encode()) for text in texts(path))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers + 1)
    processes = [
        context.Process(target=encode_share, args=(path, tokenizer, rank, workers, barrier))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    begin = time.monotonic()
    for process in processes:
        process.join()
    return {"mb_per_second": text_bytes / 1e6 / (time.monotonic() - begin)}


def encode_share(path: Path, tokenizer: Path, rank: int, workers: int, barrier) -> None:
    """Encode every so-manieth document, once all processes have theirs in memory."""
    share = texts(path)[rank::workers]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    barrier.wait()
    for text in share:
        processor.encode(text)


def prepare_once(path: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """Run the command; return its speed, the memory of its processes and the parent's CPU."""
    output = path.parent / "out"
    command = [sys.executable, "-m", "data.prepare", "--input", path, "--output", output]
    command += ["--tokenizer", tokenizer, "--workers", str(workers)]
    begin = time.monotonic()
    largest = together = parent_cpu = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            sizes = [*resident_bytes(process.pid)]
            largest, together = max(largest, *sizes, 0), max(together, sum(sizes))
            parent_cpu = max(parent_cpu, cpu_seconds(process.pid))
            time.sleep(INTERVAL_SECONDS)
    seconds = time.monotonic() - begin
    description = json.loads((output / "dataset.json").read_text())
    shards = [shard for split in description["splits"].values() for shard in split["shards"]]
    shutil.rmtree(output)
    megabytes = sum(shard["text_bytes"] for shard in shards) / 1e6
    return {
        "megabytes": megabytes,
        "pieces": len(list_pieces([str(path)], Faults())),
        "seconds": seconds,
        "mb_per_second": megabytes / seconds,
        "largest_process_mib": largest / 2**20,
        "all_processes_mib": together / 2**20,
        "parent_cpu_seconds": parent_cpu,
    }


def resident_bytes(pid: int) -> Iterator[float]:
    """Yield the resident memory of a process and of its children."""
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *children):
            pages = Path(f"/proc/{each}/statm").read_text().split()[1]
            yield int(pages) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process alone."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS
    return 0.0


def report(options: Options, runs: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians, and write them as JSON."""
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    small, large = medians["small"], medians["large"]
    beside = {
        name: statistics.median(
            whole["mb_per_second"] / alone["mb_per_second"]
            for whole, alone in zip(runs[name], runs[f"sentencepiece_{name}"], strict=True)
        )
        for name in ("small", "large")
    }
    # What the parent does for each piece, beside its start; 64 workers pay when pieces are largest.
    more = large["pieces"] - small["pieces"]
    per_piece = (large["parent_cpu_seconds"] - small["parent_cpu_seconds"]) / more
    pieces_per_second = large["mb_per_second"] * 64 / options.workers / (MOST_PIECE_BYTES / 1e6)
    numbers = {
        "corpus": f"embedded, and {options.copies} times as much",
        "vocab_size": options.vocab_size,
        "workers": options.workers,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "sentencepiece": sentencepiece.__version__,
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "medians": medians,
        "speed_beside_sentencepiece": beside,
        "parent_share_of_a_core": large["parent_cpu_seconds"] / large["seconds"],
        "parent_seconds_per_piece": per_piece,
        "estimated_share_at_64_workers_and_16_gb": per_piece * pieces_per_second,
        "runs": runs,
    }
    print(json.dumps(numbers, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    run_command(Options, compare, prog="benchmarks/prepare.py")
