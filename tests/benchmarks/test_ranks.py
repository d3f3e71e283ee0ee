"""Where a step's time goes, from a trace worked by hand."""

import gzip
import json

import pytest

from benchmarks.ranks import REST, parts


def event(name, begin, duration, tid=1, cat="cpu_op"):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": duration, "tid": tid, "pid": 7}


def test_each_event_counts_without_those_inside_it_and_as_what_it_is_in(tmp_path):
    events = [
        event("ProfilerStep#3", 0, 10_000, cat="user_annotation"),
        event("aten::mm", 100, 1000),
        event("FSDP::pre_forward", 2000, 3000, cat="user_annotation"),
        event("c10d::_allgather_base_", 2500, 1500),
        event("aten::copy_", 4200, 300),  # in the hook, and counted to it
        event("ProfilerStep#4", 10_000, 6000, cat="user_annotation"),
        event("aten::_scaled_dot_product_attention", 11_000, 2000),
        event("aten::bmm", 11_500, 500),
        event("aten::mm", 100, 9000, tid=2),  # another thread
        event("Memcpy", 100, 9000, cat="gpu_memcpy"),
    ]
    trace = tmp_path / "rank.pt.trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert parts(trace) == pytest.approx(
        {  # milliseconds of two steps, 16 in all
            REST: (10 - 1 - 3 + 6 - 2) / 2,
            "products": (1 + 0.5) / 2,
            "FSDP2, its waiting too": (3 - 1.5) / 2,
            "other collectives": 1.5 / 2,
            "attention": (2 - 0.5) / 2,
        }
    )
