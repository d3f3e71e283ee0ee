import random
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch_ramp import BatchRamp
from data.loader import Microbatch, TokenLoader
from data.mixture import Mixture
from data.shards import ShardHeader, TokenStream, open_shard, write_shard
from data.step_rows import StepRows, row_numbers
from data.windows import StreamWindows
from tests.batches import batch_at

FROM_0 = StepRows(0, 0, BatchRamp(8))


def make_stream(count: int, parts: int = 3) -> TokenStream:
    """Return tokens 0, 1, 2, ... in several shards, so that a token is its own position."""
    return TokenStream(np.array_split(np.arange(count, dtype=np.uint32), parts))


def make_loader(stream: TokenStream, **changes: int | bool) -> TokenLoader:
    sizes = {"seq_len": 8, "global_batch_size": 8, "microbatch_size": 2, "seed": 5} | changes
    windows = StreamWindows(stream, sizes.pop("seq_len"))
    order = {name: sizes.pop(name) for name in ("seed", "shuffle") if name in sizes}
    return TokenLoader(Mixture([windows], **order), **sizes)


def rows(batches: list[Microbatch]) -> dict[int, list[int]]:
    """Return the tokens of each row of the global batch, by sample index."""
    return {
        sample: tokens
        for batch in batches
        for sample, tokens in zip(batch.samples.tolist(), batch.tokens.tolist(), strict=True)
    }


def equal(a: list[Microbatch], b: list[Microbatch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.tokens, y.tokens)
        and torch.equal(x.labels, y.labels)
        and torch.equal(x.samples, y.samples)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [8 * 40 + 1, 8 * 41 + 5, 8 * 3 + 1])
def test_every_epoch_reads_every_window_once(count: int, shuffle: bool) -> None:
    loader = make_loader(make_stream(count), shuffle=shuffle)
    windows = loader.mixture.windows
    assert windows == (count - 1) // 8
    starts = [
        row[0] for t in range(windows) for _, row in sorted(rows(batch_at(loader, t)).items())
    ]
    assert len(starts) == 8 * windows  # Eight epochs exactly.
    for epoch in range(8):
        seen = starts[epoch * windows : (epoch + 1) * windows]
        assert sorted(seen) == list(range(0, 8 * windows, 8))
        assert not shuffle or windows < 20 or seen != sorted(seen)


def test_batch_may_straddle_two_epochs() -> None:
    loader = make_loader(make_stream(8 * 10 + 1))
    starts = [row[0] for t in range(2) for _, row in sorted(rows(batch_at(loader, t)).items())]
    assert sorted(starts[:10]) == list(range(0, 80, 8))
    assert max(Counter(starts[10:]).values()) == 1
    assert [int(*loader.mixture.epochs(8 * t)) for t in range(6)] == [0, 0, 1, 2, 3, 4]


def test_batch_is_a_pure_function_of_t_and_seed() -> None:
    stream = make_stream(1000)
    loader = make_loader(stream)
    first = [batch_at(loader, t) for t in range(20)]
    fresh = make_loader(stream)
    assert all(equal(batch_at(fresh, t), first[t]) for t in (19, 3, 3, 0, 11))
    assert not equal(batch_at(make_loader(stream, seed=6), 0), first[0])


@pytest.mark.parametrize("microbatch_size", [1, 2])
def test_global_batch_is_the_same_for_any_world_size(microbatch_size: int) -> None:
    stream = make_stream(900)
    for t in (0, 7, 30):
        whole = rows(batch_at(make_loader(stream, microbatch_size=8), t))
        assert sorted(whole) == list(range(8))
        for world_size in (1, 2, 4):
            union = {}
            for rank in range(world_size):
                sizes = {"rank": rank, "world_size": world_size}
                loader = make_loader(stream, microbatch_size=microbatch_size, **sizes)
                batches = batch_at(loader, t)
                assert len(batches) == 8 // (world_size * microbatch_size)
                part = rows(batches)
                assert not part.keys() & union.keys()
                union |= part
            assert union == whole


def test_microbatch_holds_contiguous_rows_and_each_rank_its_slice() -> None:
    loader = make_loader(make_stream(900), rank=1, world_size=2)
    assert [batch.samples.tolist() for batch in batch_at(loader, 0)] == [[2, 3], [6, 7]]


def test_tokens_and_labels_equal_a_slow_reading_of_the_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{n}.tokens" for n in range(5)]
    for path in paths:
        ids = rng.integers(999, size=int(rng.integers(90, 140)), dtype=np.uint16)
        header = ShardHeader(
            dtype="<u2", tokens=len(ids), documents=1, text_bytes=1, vocab_size=999,
            tokenizer_fingerprint="",
        )  # fmt: skip
        write_shard(path, header, [ids])
    raw = b"".join(path.read_bytes()[1024:] for path in paths)
    flat = [int.from_bytes(raw[n : n + 2], "little") for n in range(0, len(raw), 2)]
    loader = make_loader(TokenStream([open_shard(path)[1] for path in paths]), shuffle=False)
    for t in range(5):
        for batch in batch_at(loader, t):
            assert batch.tokens.dtype == batch.labels.dtype == batch.samples.dtype == torch.int64
            assert batch.tokens.shape == batch.labels.shape == (2, 8)
            for b, sample in enumerate(batch.samples.tolist()):
                start = (t * 8 + sample) % loader.mixture.windows * 8
                assert batch.tokens[b].tolist() == flat[start : start + 8]
                assert batch.labels[b].tolist() == flat[start + 1 : start + 9]


def test_dropped_tokens_are_those_no_window_reads() -> None:
    for count in range(9, 60):
        loader = make_loader(make_stream(count), global_batch_size=2, shuffle=False)
        read = {
            token
            for t in range(loader.mixture.windows)
            for batch in batch_at(loader, t)
            for token in (*batch.tokens.flatten().tolist(), *batch.labels.flatten().tolist())
        }
        assert loader.mixture.sources[0].dropped_tokens == count - len(read)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetched_batches_equal_direct_ones(depth: int) -> None:
    loader = make_loader(make_stream(500))
    ahead = list(loader.batches(StepRows(3, 24, BatchRamp(8)), 17, depth=depth))
    assert [t for t, _ in ahead] == list(range(3, 17))
    assert all(equal(batch, batch_at(loader, t)) for t, batch in ahead)
    assert list(loader.batches(StepRows(4, 32, BatchRamp(8)), 4, depth=depth)) == []


def test_row_number_is_the_t_th_that_no_range_holds() -> None:
    dice = random.Random(0)
    for _ in range(300):
        starts = [dice.randrange(-3, 40) for _ in range(dice.randrange(6))]
        skipped = [(start, start + dice.randrange(9)) for start in starts]
        dealt = [n for n in range(200) if not any(start <= n < stop for start, stop in skipped)]
        assert row_numbers(np.arange(100), skipped).tolist() == dealt[:100]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_skipped_batches_are_never_dealt_and_shift_the_later_ones(depth: int) -> None:
    loader = make_loader(make_stream(500))
    skipped = ((40, 56), (16, 32), (24, 32))
    dealt = list(loader.batches(StepRows(1, 8, BatchRamp(8), skipped), 7, depth=depth))
    assert [t for t, _ in dealt] == [1, 2, 3, 4, 5, 6]
    for (_, batch), number in zip(dealt, [1, 4, 7, 8, 9, 10], strict=True):
        assert equal(batch, batch_at(loader, number))


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("token-loader")]


def test_leaving_the_iterator_early_leaves_no_thread() -> None:
    batches = make_loader(make_stream(500)).batches(FROM_0, 10**9)
    next(batches)
    assert loader_threads()
    batches.close()
    assert not loader_threads()
    for t, _ in make_loader(make_stream(500)).batches(FROM_0, 10**9):
        if t == 3:
            break
    assert not loader_threads()


def test_prefetch_reads_no_further_than_its_depth() -> None:
    class Counting(TokenLoader):
        read = 0

        def batch(self, rows: np.ndarray) -> list[Microbatch]:
            self.read = max(self.read, int(rows[-1]) // 2 + 1)
            return super().batch(rows)

    mixture = Mixture([StreamWindows(make_stream(500), 8)], seed=0)
    loader = Counting(mixture, global_batch_size=2, microbatch_size=2)
    for t, _ in loader.batches(StepRows(0, 0, BatchRamp(2)), 20, depth=3):
        assert t < loader.read <= min(t + 4, 20)


def test_error_of_the_background_thread_reaches_the_caller() -> None:
    class Torn(TokenStream):
        def read_targets(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
            raise OSError("disk went away")

    loader = make_loader(Torn([np.arange(500, dtype=np.uint16)]))
    with pytest.raises(OSError, match="disk went away"):
        next(loader.batches(FROM_0, 5))
    assert not loader_threads()


def test_pinning_without_cuda_changes_nothing() -> None:
    loader = make_loader(make_stream(500))
    assert all(equal(b, batch_at(loader, t)) for t, b in loader.batches(FROM_0, 3, pin_memory=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 100}, "seq_len 100 needs 101 tokens but the data has 100, give"),
        ({"microbatch_size": 3}, "global_batch_size 8 is not a multiple of world_size 1"),
        ({"world_size": 8}, "global_batch_size 8 .* world_size 8 . microbatch_size 2, change"),
        ({"microbatch_size": -1}, "microbatch_size -1 at least 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not in"),
    ],
)
def test_sizes_that_do_not_fit_are_a_value_error(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(make_stream(100), **changes)


def test_shortest_stream_gives_one_window() -> None:
    loader = make_loader(make_stream(9, parts=1), global_batch_size=2)
    assert (loader.mixture.windows, loader.mixture.sources[0].dropped_tokens) == (1, 0)
    assert rows(batch_at(loader, 5)) == {0: list(range(8)), 1: list(range(8))}
