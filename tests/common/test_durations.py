"""Durations in words."""

from __future__ import annotations

from sd3_lora.common.durations import duration

import pytest


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.42, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (75, "75 s"), (119.4, "119 s"), (119.6, "2 min"),
     (150, "2.5 min"), (300, "5 min"), (2400, "40 min"), (7169, "119 min"), (7171, "2 h 0 min"), (7500, "2 h 5 min")],
)  # fmt: skip
def test_a_duration_has_the_unit_that_suits_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words
