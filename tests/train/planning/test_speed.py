"""The expected time of a step, against numbers worked by hand."""

from dataclasses import replace

import pytest

from train.planning.speed import REACHED, Cluster, Gpu, step_time, traffic

CLUSTER = Cluster(Gpu(peak=1e15, memory_gib=80.0, nvlink=400e9), per_node=8, network=25e9)


@pytest.mark.parametrize(
    ("n", "stride", "link", "hops"),
    [
        (8, 1, 400e9, 7 * 3.4e-6),  # one node
        (64, 1, 200e9, 56 * 3.4e-6 + 7 * 14e-6),  # eight nodes, eight adapters each
        (1024, 1, 200e9, 896 * 3.4e-6 + 127 * 14e-6),
        (4, 8, 25e9, 3 * 14e-6),  # replicas in four nodes, one adapter each
        (4, 2, 400e9, 3 * 3.4e-6),  # replicas in one node
    ],
)
def test_a_ring_goes_through_its_slowest_link(n, stride, link, hops):
    found = CLUSTER.ring_seconds(8e9, 3, n, stride)
    by_hand = 8e9 * (n - 1) / n / (REACHED * link) + 3 * (8.4e-6 + hops)
    assert found == pytest.approx(by_hand, rel=1e-12)
    assert CLUSTER.ring_seconds(8e9, 3, 1) == 0.0


def sent(**changes):
    """Return 9 layers of equal weight and a root of a tenth, without latency; 2 microbatches.

    2 GB of weights, gathered by 4 passes, but the root once.
    """
    bytes_of = {"_allgather_base_": 7.4e9, "_reduce_scatter_base_": 8e9, "allreduce_": 1e9}
    given = {"microbatches": 2, "reduces_all": False, "resharded": True, "root_share": 0.1}
    found = traffic(bytes_of, n_layers=9, **(given | changes))
    counted = ("gathers", "root_gather", "reduces", "all_reduces")
    return replace(found, **{name: (getattr(found, name)[0], 0) for name in counted})


@pytest.mark.parametrize(("resharded", "gathered"), [(True, 7.4), (False, 2.0)])
def test_blocks_are_gathered_by_each_pass_or_once_and_the_root_once(resharded, gathered):
    found = traffic({"allgather": gathered, "reduce_scatter": 6.0}, n_layers=9, microbatches=2,
                    reduces_all=True, resharded=resharded, root_share=0.1)  # fmt: skip
    assert found.gathers == (pytest.approx(1.8), 9)
    assert found.root_gather == (pytest.approx(0.2), 1)
    assert found.reduces == (3.0, 10)


# A pass gathers 1.8 GB * 7/8 / 320 GB/s = 4.92 ms, the root 0.2 GB; 8 GB are reduced.
PASS, ROOT, REDUCE = 4.921875e-3, 0.546875e-3, 21.875e-3


@pytest.mark.parametrize(
    ("flops", "exposed"),
    [
        # All hidden but the root's: its gather, and a tenth of the reduction.
        (1e15, ROOT + REDUCE / 10),
        # 3 ms of computing, 0.5 ms forward and 1 ms backward of each microbatch.
        (1.2e12, ROOT + 2 * (PASS - 0.5e-3) + (PASS - 1e-3) + (PASS + REDUCE - 1e-3)),
    ],
)
def test_what_exceeds_computing_is_exposed(flops, exposed):
    how = {"ranks": 8, "replicate": 1, "microbatches": 2}
    time = step_time(CLUSTER, sent(), flops=flops, mfu=0.4, **how)
    assert time.compute == pytest.approx(flops / 4e14)
    assert time.communication == pytest.approx(ROOT + 4 * PASS + REDUCE)
    # The root is no longer apart where everything is exposed.
    assert time.exposed == pytest.approx(exposed, rel=1e-9)


def test_one_gpu_sends_nothing_and_replicas_sum_once_a_step():
    one = step_time(CLUSTER, sent(), flops=1e12, mfu=0.5, ranks=1, replicate=1, microbatches=2)
    assert (one.total, one.exposed, one.communication) == (2e-3, 0.0, 0.0)
    whole = step_time(
        CLUSTER, sent(whole=True), flops=1e15, mfu=0.5, ranks=8, replicate=8, microbatches=2
    )
    assert whole.exposed == pytest.approx(2 * 7 / 8 / 320)  # after the last backward pass
    copies = step_time(CLUSTER, sent(), flops=1e12, mfu=0.5, ranks=8, replicate=8, microbatches=2)
    # Twice 7/8 of 1 GB at 320 GB/s, less the backward pass of 2/3 ms.
    assert copies.communication == pytest.approx(2 * 7 / 8 / 320)
    assert copies.exposed == pytest.approx(2 * 7 / 8 / 320 - 2e-3 / 2 * 2 / 3)
