import pytest

from train.monitoring.sections import SECTIONS, Sections


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_time_is_counted_for_the_section_it_was_spent_in(clock):
    sections = Sections(clock)
    clock.now += 2
    sections.enter("data", 0)
    clock.now += 3
    sections.enter("step", 0)
    clock.now += 5
    sections.enter("data", 1)
    clock.now += 7
    assert sections.read() == dict.fromkeys(SECTIONS, 0.0) | {"setup": 2, "data": 10, "step": 5}


def test_a_reading_starts_from_zero_and_splits_the_open_section(clock):
    sections = Sections(clock)
    sections.enter("step", 4)
    clock.now += 6
    assert sections.read()["step"] == 6
    clock.now += 1
    assert sections.read() == dict.fromkeys(SECTIONS, 0.0) | {"step": 1}


def test_current_counts_from_the_entry_whatever_is_read(clock):
    sections = Sections(clock)
    assert sections.current == ("setup", 0, 0)
    sections.enter("validate", 9)
    clock.now += 4
    sections.read()
    clock.now += 4
    assert sections.current == ("validate", 9, 8)
    sections.enter("validate", 9)  # the same again is a new section
    assert sections.current == ("validate", 9, 0)
