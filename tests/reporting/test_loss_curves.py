"""Losses smoothed, and parted by noise level."""

from __future__ import annotations

from sd3_lora.reporting.loss_curves import LEVELS, MOST_POINTS, losses_by_level, smoothed, thinned, window_of
from sd3_lora.training.loss_log import LoggedStep

import numpy as np
import pytest


def logged(step: int, loss: float, *sigmas: float) -> LoggedStep:
    return LoggedStep(step, loss, 1.0, 1e-4, False, sigmas)


def test_a_smoothed_curve_is_the_mean_around_each_step() -> None:
    values = np.random.default_rng(0).normal(size=40)
    curve = smoothed(values.tolist(), 7)
    assert curve[20] == pytest.approx(values[17:24].mean())
    assert curve[0] == pytest.approx(values[:4].mean())
    assert curve[-1] == pytest.approx(values[-4:].mean())
    assert len(curve) == 40


@pytest.mark.parametrize(("steps", "window"), [(1, 5), (60, 7), (500, 51), (10_000, 201)])
def test_the_window_grows_with_the_run(steps: int, window: int) -> None:
    assert window_of(steps) == window


def test_a_long_run_is_drawn_in_means() -> None:
    assert thinned(3) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    places = thinned(2 * MOST_POINTS + 1)
    assert len(places) <= MOST_POINTS
    assert sum(place.stop - place.start for place in places) == 2 * MOST_POINTS + 1
    assert thinned(0) == []


def test_one_picture_a_step_gives_plain_means() -> None:
    lines = [logged(step, (step % 4) + step / 1000, 0.1 + 0.25 * (step % 4)) for step in range(1, 65)]
    (first, second) = losses_by_level(lines)
    assert (first.first, first.last, second.first, second.last) == (1, 32, 33, 64)
    for level in range(4):
        expected = np.mean([line.loss for line in lines[:32] if line.step % 4 == level])
        assert first.losses[level] == pytest.approx(expected)


def test_several_pictures_a_step_are_parted() -> None:
    """The mean of four pictures, each at its own level, tells what a level costs once there are enough of them."""
    draws, by_level = np.random.default_rng(1), np.array([0.9, 0.5, 0.3, 0.2])
    lines = []
    for step in range(1, 201):
        sigmas = draws.uniform(size=4)
        lines.append(logged(step, float(by_level[(sigmas * 4).astype(int)].mean()), *sigmas))
    for span in losses_by_level(lines):
        assert span.losses == pytest.approx(by_level.tolist())


def test_a_level_that_never_came_has_no_loss() -> None:
    lines = [logged(step, 0.5, 0.6 + 0.001 * (step % 9)) for step in range(1, 65)]
    assert all(span.losses == (None, None, pytest.approx(0.5), None) for span in losses_by_level(lines))
    assert len(LEVELS) == 4


@pytest.mark.parametrize("sigmas", [(), (0.5,)], ids=["of an earlier build", "too few"])
def test_nothing_is_made_up(sigmas: tuple[float, ...]) -> None:
    assert losses_by_level([logged(step, 0.5, *sigmas) for step in range(1, 7)]) == []
