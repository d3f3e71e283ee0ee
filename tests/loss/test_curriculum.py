"""The curricula, against tables worked by hand and the properties the paper states."""

import math

import pytest

from loss.curriculum import CurriculumConfig, active_layers, period


def table(C, T, L, **changes):
    config = CurriculumConfig(C=C, **changes)
    return [active_layers(t, L=L, T=T, config=config) for t in range(T)]


def test_rotation_equals_the_table_worked_by_hand():
    # L = 5, R = 3, without the last layer pinned: layers t mod 3, + 3.
    assert table("rot", 4, 5, R=3, last_layer_always_on=False) == [(0, 3), (1, 4), (2,), (0, 3)]
    assert table("rot", 3, 5, R=3) == [(0, 3, 4), (1, 4), (2, 4)]


@pytest.mark.parametrize(("L", "R"), [(24, 23), (32, 8), (7, 3), (5, 8), (6, 1)])
def test_rotation_covers_every_layer_in_R_steps(L, R):
    steps = table("rot", R, L, R=R, last_layer_always_on=False)
    assert sorted(l for active in steps for l in active) == list(range(L))
    assert max(map(len, steps)) == math.ceil(L / R)


def test_gradual_equals_the_table_worked_by_hand():
    # L = 4, T = 16: one more every T / (2 L) = 2 steps, from the last layer down.
    assert table("grad", 16, 4) == (
        [(3,)] * 2 + [(2, 3)] * 2 + [(1, 2, 3)] * 2 + [(0, 1, 2, 3)] * 10
    )


@pytest.mark.parametrize(("L", "T"), [(12, 1000), (5, 37), (32, 50000)])
def test_gradual_has_every_exit_on_from_half_time(L, T):
    config = CurriculumConfig(C="grad")
    assert active_layers(math.ceil(T / 2), L=L, T=T, config=config) == tuple(range(L))
    assert active_layers(0, L=L, T=T, config=config) == (L - 1,)


def test_all_and_none():
    assert table("all", 2, 3) == [(0, 1, 2)] * 2
    assert table("none", 2, 3) == [(2,)] * 2


def test_problems_name_field_value_and_remedy():
    assert CurriculumConfig().problems() == []
    assert "curriculum.R: 0" in CurriculumConfig(C="rot", R=0).problems()[0]
    assert CurriculumConfig(last_layer_always_on=False).problems()


def test_alternating_has_every_exit_at_even_steps():
    assert table("alternating", 4, 3) == [(0, 1, 2), (2,)] * 2


@pytest.mark.parametrize("C", ["rot", "grad", "all", "alternating", "none"])
@pytest.mark.parametrize("R", [1, 3, 8])
@pytest.mark.parametrize("last", [True, False])
def test_no_step_has_fewer_exits_than_one_of_the_first_period(C, R, last):
    steps = table(C, 40, 6, R=R, last_layer_always_on=last)
    n = period(CurriculumConfig(C=C, R=R, last_layer_always_on=last))
    for t, active in enumerate(steps):
        assert set(steps[t % n]) <= set(active)
        assert C == "grad" or steps[t % n] == active
