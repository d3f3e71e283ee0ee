"""A tracker of storages, against balances worked by hand."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.rope import apply_rope
from train.planning.allocations import Allocation, AllocationTracker, find_peak


def sizes(tracker):
    return [(a.part, a.size) for a in tracker.allocations if a.end is None]


def test_a_storage_lives_until_its_last_view_is_gone():
    tracker = AllocationTracker({})
    with FakeTensorMode(), tracker:
        a = torch.empty(10, 100)
        view = a[0]
        b = a.t() + 1
        del a, b
        assert sizes(tracker) == [("other", 4000)]
        del view
        assert sizes(tracker) == []
    assert [a.size for a in tracker.allocations] == [4000, 4000]


def test_a_storage_belongs_to_the_innermost_module_that_allocates_it():
    tracker = AllocationTracker({"models": "models", __name__: "here", "no": None})
    with FakeTensorMode(), tracker:
        x, table = torch.empty(1, 1, 4, 8), torch.empty(1, 1, 4, 8)
        out = apply_rope(x, table, table)
        tracker.only_part = "given"
        other = torch.empty(3)
    assert sizes(tracker) == [("here", 128), ("here", 128), ("models", 128), ("given", 12)]
    tracker.move({"here"}, "there", since=1)
    assert sizes(tracker) == [("here", 128), ("there", 128), ("models", 128), ("given", 12)]
    del out, other


def test_a_module_without_a_part_is_left_out():
    tracker = AllocationTracker({__name__: None})
    with FakeTensorMode(), tracker:
        kept = torch.empty(3)
    assert tracker.allocations == []
    del kept


def test_a_resized_storage_is_counted_by_its_new_size():
    tracker = AllocationTracker({})
    with FakeTensorMode(), tracker:
        a = torch.empty(100)
        a.untyped_storage().resize_(0)
        assert sizes(tracker) == []
        a.untyped_storage().resize_(80)
        assert sizes(tracker) == [("other", 80)]
    before = torch.UntypedStorage.resize_
    with FakeTensorMode(), AllocationTracker({}):
        assert torch.UntypedStorage.resize_ is not before
    assert torch.UntypedStorage.resize_ is before


def test_the_peak_is_the_moment_of_the_largest_sum():
    allocations = [
        Allocation("a", 5, begin=0, end=3),
        Allocation("b", 7, begin=1, end=2),
        Allocation("b", 4, begin=4),
        Allocation("a", 6, begin=5, end=6),
    ]
    peak = find_peak(allocations)
    assert (peak.total, dict(peak.parts), dict(peak.highest)) == (
        12,
        {"a": 5, "b": 7},
        {"a": 6, "b": 7},
    )
    later = find_peak(allocations, since=4)
    assert (later.total, dict(later.parts), dict(later.highest)) == (
        10,
        {"a": 6, "b": 4},
        {"a": 6, "b": 4},
    )


def test_the_host_may_read_numbers_and_arrays_that_have_data_stay_readable():
    samples = torch.arange(3)
    with FakeTensorMode(), AllocationTracker({}):
        assert torch.empty(3).sum().item() == 1.0
        assert samples.numpy().tolist() == [0, 1, 2]
