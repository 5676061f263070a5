"""Losses made readable: smoothed, and parted by noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sd3_lora.training.loss_log import LoggedStep

import numpy as np

LEVELS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # of sigma, from a clean picture to pure noise
MOST_SPANS = 10  # in which losses by noise level are averaged
_PICTURES_OF_A_LEVEL = 8  # in a span, on average: fewer would show chance alone
MOST_POINTS = 4000  # of a chart; of more steps the means of some at a time are drawn


@dataclass(frozen=True)
class LevelLosses:
    """The mean loss at each noise level in some steps.

    Attributes:
        first: optimizer step of the span.
        last: optimizer step of the span.
        losses: of each of `LEVELS`; None where the span has no picture at it.
    """

    first: int
    last: int
    losses: tuple[float | None, ...]


def window_of(count: int) -> int:
    """Over how many steps a curve of `count` steps is smoothed: a tenth, an odd number from 5 to 201."""
    return min(201, max(5, count // 10)) | 1


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of `window` values around each; of those that there are near both ends.

    >>> smoothed([1.0, 2.0, 6.0, 4.0], 3)
    [1.5, 3.0, 4.0, 5.0]
    """
    sums, count = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))]), len(values)
    places = np.arange(count)
    first, behind = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, count)
    means: list[float] = ((sums[behind] - sums[first]) / (behind - first)).tolist()
    return means


def thinned(count: int) -> list[slice]:
    """The steps of each point of a chart: one, or as many as keep it below `MOST_POINTS`."""
    size = -(-count // MOST_POINTS)
    return [slice(start, min(start + size, count)) for start in range(0, count, size or 1)]


def losses_by_level(lines: Sequence[LoggedStep]) -> list[LevelLosses]:
    """The mean loss at each noise level, span by span; empty where the log does not tell the noise levels.

    The loss of a step is the mean over its pictures, each at a noise level of its own. Over the steps of a span that is
    a system of linear equations in the mean loss of each level, and this is its solution by least squares. With one
    picture a step it is the plain mean.
    """
    known = [line for line in lines if line.sigmas]
    pictures = sum(len(line.sigmas or ()) for line in known)
    spans = min(MOST_SPANS, pictures // (_PICTURES_OF_A_LEVEL * len(LEVELS)), len(known) // (2 * len(LEVELS)))
    if not spans:
        return []
    return [_of_span([known[place] for place in places]) for places in np.array_split(np.arange(len(known)), spans)]


def _of_span(lines: Sequence[LoggedStep]) -> LevelLosses:
    shares = np.array([np.bincount(_level_of(line.sigmas or ()), minlength=len(LEVELS)) for line in lines], np.float64)
    there = shares.sum(0) > 0
    shares /= shares.sum(1, keepdims=True)
    solution, *_ = np.linalg.lstsq(shares[:, there], np.array([line.loss for line in lines]), rcond=None)
    means = iter(solution.tolist())
    return LevelLosses(lines[0].step, lines[-1].step, tuple(next(means) if is_there else None for is_there in there))


def _level_of(sigmas: Sequence[float]) -> np.ndarray:
    return np.clip(np.digitize(sigmas, [upper for _, upper in LEVELS[:-1]]), 0, len(LEVELS) - 1)
