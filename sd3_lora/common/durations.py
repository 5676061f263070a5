"""Durations in words, the same in every report, card, page and sentence."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> [duration(each) for each in (0.42, 75, 150, 300, 2400, 7500)]
    ['0.4 s', '75 s', '2.5 min', '5 min', '40 min', '2 h 5 min']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 10:
        return f"{round(seconds / 60, 1):g} min"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
