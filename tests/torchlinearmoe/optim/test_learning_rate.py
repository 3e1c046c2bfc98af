"""The learning rate at the borders and between them."""

import math

import pytest

from torchlinearmoe.optim import SCHEDULES, learning_rate


def rates(total, **options):
    return [learning_rate(step, total_steps=total, **options) for step in range(1, total + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step(schedule):
    series = rates(100, lr=2.0, min_lr=0.5, warmup_steps=8, schedule=schedule)
    assert series[:8] == pytest.approx([2.0 * s / 8 for s in range(1, 9)])
    assert max(series) == series[7] == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("total, warmup", [(100, 0), (100, 7), (100, 95), (100, 99), (1, 0), (2, 1)])
def test_after_warm_up_the_rate_never_rises_and_ends_at_the_minimum(schedule, total, warmup):
    series = rates(total, lr=2.0, min_lr=0.5, warmup_steps=warmup, schedule=schedule)
    after = series[max(0, warmup - 1) :]
    assert all(a >= b for a, b in zip(after, after[1:]))
    assert series[-1] == pytest.approx(0.5)
    assert learning_rate(total + 3, total_steps=total, lr=2.0, min_lr=0.5, warmup_steps=warmup, schedule=schedule) == (
        pytest.approx(0.5)
    )


def test_cosine_is_half_way_at_the_middle():
    options = {"total_steps": 110, "lr": 3.0, "min_lr": 1.0, "warmup_steps": 10, "schedule": "cosine"}
    assert learning_rate(60, **options) == pytest.approx(2.0)
    assert learning_rate(35, **options) == pytest.approx(2.0 + math.cos(math.pi / 4))


def test_wsd_is_flat_until_the_decay_and_then_falls_as_one_minus_sqrt():
    series = rates(100, lr=3.0, min_lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.25)
    assert series[9:75] == [3.0] * 66
    assert series[75:] == pytest.approx([1 + 2 * (1 - math.sqrt(x / 25)) for x in range(1, 26)])


def test_wsd_with_more_steps_agrees_until_the_shorter_run_decays():
    options = {"lr": 3.0, "min_lr": 1.0, "warmup_steps": 10, "schedule": "wsd", "decay_fraction": 0.2}
    assert rates(100, **options)[:80] == rates(400, **options)[:80]


def test_constant_stays_at_the_peak_to_the_end():
    assert rates(20, lr=3.0, min_lr=1.0, warmup_steps=5, schedule="constant")[4:] == [3.0] * 16


def test_run_that_ends_inside_its_warm_up_only_warms_up():
    assert rates(4, lr=1.0, warmup_steps=8, schedule="cosine") == pytest.approx([0.125, 0.25, 0.375, 0.5])


def test_errors_name_the_key_and_the_legal_values():
    with pytest.raises(ValueError, match=r"optimizer.schedule = 'step': must be one of cosine, wsd, constant"):
        learning_rate(1, total_steps=2, lr=1.0, schedule="step")
    with pytest.raises(ValueError, match=r"optimizer.decay_fraction = 0"):
        learning_rate(1, total_steps=2, lr=1.0, schedule="wsd", decay_fraction=0)
    with pytest.raises(ValueError, match="count from 1"):
        learning_rate(0, total_steps=2, lr=1.0)
