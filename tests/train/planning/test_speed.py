"""The expected time of a step, against numbers worked by hand."""

from dataclasses import replace

import pytest

from train.planning.speed import REACHED, Cluster, Gpu, step_time, traffic

PASS = 4.921875e-3
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
    """Return 9 layers of equal weight and a root of a tenth, without latency; 2 microbatches."""
    bytes_of = {"_allgather_base_": 7.4e9, "_reduce_scatter_base_": 8e9, "allreduce_": 1e9}
    given = {"microbatches": 2, "reduces_all": False, "resharded": True, "root_share": 0.1}
    found = traffic(bytes_of, n_layers=9, **(given | changes))
    return replace(
        found,
        **{
            name: (getattr(found, name)[0], 0)
            for name in ("root_gather", "gathers", "reduces", "all_reduces")
        },
    )


@pytest.mark.parametrize(("resharded", "passes"), [(True, 4), (False, 1)])
def test_blocks_are_gathered_for_every_pass_or_once_and_the_root_once(resharded, passes):
    found = traffic(
        {"allgather": 9.0 * passes + 1.0, "reduce_scatter": 6.0},
        n_layers=9, microbatches=2, reduces_all=True, resharded=resharded, root_share=0.1,
    )  # fmt: skip
    assert found.root_gather == pytest.approx((1.0, 1))
    assert (found.gathers, found.reduces) == (pytest.approx((9.0, 9)), (3.0, 10))


@pytest.mark.parametrize(
    ("flops", "exposed"),
    [
        # 2 GB of weights, of which 1.8 GB are blocks: 1.8 GB * 7/8 / 320 GB/s = 4.92 ms for each
        # of four passes; 8 GB reduced: 21.875 ms. All hidden but the root's tenth of both.
        (1e15, 0.546875e-3 + 2.1875e-3),
        # 3 ms of computing, 0.5 ms forward and 1 ms backward of each microbatch. Forward twice:
        # 4.92 - 0.5; backward: 4.92 - 1, then 4.92 + 21.875 - 1. The root is gathered once.
        (1.2e12, 0.546875e-3 + 2 * (PASS - 0.5e-3) + (PASS - 1e-3) + (PASS + 21.875e-3 - 1e-3)),
    ],
)
def test_what_exceeds_computing_is_exposed(flops, exposed):
    how = {"ranks": 8, "replicate": 1, "microbatches": 2}
    time = step_time(CLUSTER, sent(), flops=flops, mfu=0.4, **how)
    assert time.compute == pytest.approx(flops / 4e14)
    assert time.communication == pytest.approx(0.546875e-3 + 2 * 2 * PASS + 21.875e-3)
    # The root's reduction is no longer apart where everything is exposed.
    assert time.exposed == pytest.approx(exposed, rel=1e-9)


def test_weights_that_are_kept_are_gathered_before_the_first_pass_alone():
    how = {"ranks": 8, "replicate": 1, "microbatches": 4}
    time = step_time(CLUSTER, sent(resharded=False), flops=2.4e12, mfu=0.4, **how)
    # Of 7.4 GB: the root's tenth, then the blocks less a forward of 0.5 ms; the reduction.
    whole = 7.4 * 7 / 8 / 320
    assert time.communication == pytest.approx(whole + 21.875e-3)
    assert time.exposed == pytest.approx(whole - 0.5e-3 + 21.875e-3 - 1e-3)


def test_one_gpu_sends_nothing_and_replicas_sum_once_a_step():
    one = step_time(CLUSTER, sent(), flops=1e12, mfu=0.5, ranks=1, replicate=1, microbatches=2)
    assert (one.total, one.exposed, one.communication) == (2e-3, 0.0, 0.0)
    copies = step_time(CLUSTER, sent(), flops=1e12, mfu=0.5, ranks=8, replicate=8, microbatches=2)
    # Twice 7/8 of 1 GB at 320 GB/s, less the backward pass of 2/3 ms.
    assert copies.communication == pytest.approx(2 * 7 / 8 / 320)
    assert copies.exposed == pytest.approx(2 * 7 / 8 / 320 - 2e-3 / 2 * 2 / 3)
