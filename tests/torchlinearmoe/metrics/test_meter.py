"""Clock and memory."""

import math

import pytest
import torch

from torchlinearmoe.metrics import Meter, peak_memory_gib


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_throughput_is_that_since_the_last_reading():
    clock = Clock()
    meter = Meter(total_steps=10, clock=clock)
    for seconds, tokens in ((4.0, 40), (1.0, 40)):
        clock.now += seconds
        meter.add(tokens)
    assert meter.read().tokens_per_second == pytest.approx(16.0)
    clock.now += 2.0
    meter.add(40)
    reading = meter.read()
    assert (reading.tokens_per_second, reading.seconds_per_step) == pytest.approx((20.0, 2.0))
    assert reading.trained_seconds == pytest.approx(7.0)


def test_pauses_count_neither_as_training_nor_into_the_throughput():
    clock = Clock()
    meter = Meter(total_steps=10, clock=clock)
    clock.now += 2.0
    meter.add(40)
    with pytest.raises(RuntimeError), meter.paused():
        clock.now += 50.0
        raise RuntimeError
    clock.now += 2.0
    meter.add(40)
    reading = meter.read()
    assert reading.tokens_per_second == pytest.approx(20.0) and reading.trained_seconds == pytest.approx(4.0)


def test_time_left_forgets_the_slow_first_interval():
    clock = Clock()
    meter = Meter(total_steps=110, step=100, clock=clock)
    left = []
    for seconds in (60.0, 1.0, 3.0):
        clock.now += seconds
        meter.add(1)
        left.append(meter.read().seconds_left)
    assert left == pytest.approx([60.0 * 9, 1.0 * 8, 2.0 * 7])


def test_reading_without_a_step_knows_no_pace():
    clock = Clock()
    meter = Meter(total_steps=3, clock=clock)
    clock.now += 1.0
    reading = meter.read()
    assert reading.tokens_per_second == 0 and math.isnan(reading.seconds_left)


def test_the_wait_for_data_is_that_of_the_steps_since_the_last_reading():
    clock = Clock()
    meter = Meter(total_steps=10, clock=clock)

    def loader():
        for seconds in (3.0, 1.0, 0.5):
            clock.now += seconds
            yield seconds
        clock.now += 100.0  # its end is no wait for a step

    waits, got = [], []
    for batch in meter.waiting(loader()):
        got.append(batch)
        clock.now += 10.0
        meter.add(1)
        if len(got) > 1:
            waits.append(meter.read().data_wait)
    assert got == [3.0, 1.0, 0.5] and waits == pytest.approx([2.0, 0.5])


def test_peak_memory_of_the_process_covers_what_was_allocated():
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert held.sum() == 64 * 2**20
    assert 64 / 1024 < peak_memory_gib("cpu") < 1024
