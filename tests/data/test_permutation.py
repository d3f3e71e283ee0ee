import numpy as np
import pytest

from data.permutation import mix, permute


def image(size: int, *, seed: int = 0, epoch: int = 0) -> list[int]:
    slots = np.arange(size)
    return permute(slots, np.full(size, epoch), size=size, seed=seed).tolist()


def splitmix64(state: int) -> int:
    """One output of splitmix64 in whole integers, from its reference code."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_mix_is_splitmix64() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # Published first output for seed 0.
    words = [0, 1, 12345, 2**63, 2**64 - 1]
    assert mix(np.array(words, dtype=np.uint64)).tolist() == [splitmix64(w) for w in words]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097, 100_003])
def test_every_slot_goes_to_a_window_of_its_own(size: int) -> None:
    for epoch in range(3):
        assert sorted(image(size, epoch=epoch)) == list(range(size))


def test_slots_go_to_the_same_place_alone_and_together() -> None:
    whole = image(1000, seed=3, epoch=7)
    alone = [permute(np.array([n]), np.array([7]), size=1000, seed=3).item() for n in range(1000)]
    assert alone == whole


def test_keys_may_differ_within_one_call() -> None:
    keys = np.arange(50) % 2
    mixed = permute(np.arange(50), keys, size=50, seed=0).tolist()
    by_epoch = [image(50, epoch=0), image(50, epoch=1)]
    assert mixed == [by_epoch[n % 2][n] for n in range(50)]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**70])
def test_epochs_and_seeds_have_orders_of_their_own(seed: int) -> None:
    assert image(100, seed=seed, epoch=0) != image(100, seed=seed, epoch=1)
    assert image(100, seed=seed) != image(100, seed=seed + 2)


def test_neighbours_are_spread_evenly() -> None:
    # Over 4000 (seed, epoch) pairs slot 0 of 10 falls on each window 400 times, sd 19: 5 sd wide.
    slots = np.zeros(100, dtype=np.int64)
    images = [permute(slots, np.arange(100), size=10, seed=seed) for seed in range(40)]
    counts = np.bincount(np.concatenate(images), minlength=10)
    assert counts.min() > 305
    assert counts.max() < 495
    # Consecutive slots of a long permutation are as good as uncorrelated: sd 1/sqrt(n) = 0.01.
    order = np.array(image(10_007))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
