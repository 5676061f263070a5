"""Pieces that are made one ahead: while one is in use, and no more than one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from sd3_lora.gpu.read_ahead import read_ahead

import pytest


def test_the_next_piece_is_made_while_one_is_in_use() -> None:
    made = [threading.Event() for _ in range(4)]

    def pieces() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    seen = []
    for number in read_ahead(pieces()):
        seen.append(number)
        if number + 1 < len(made):
            assert made[number + 1].wait(10)
        assert not any(event.is_set() for event in made[number + 2 :])
    assert seen == [0, 1, 2, 3]


def test_what_fails_in_the_thread_is_raised_where_the_piece_was_wanted() -> None:
    def pieces() -> Iterator[int]:
        yield 1
        raise ValueError("no second")

    wanted = read_ahead(pieces())
    assert next(wanted) == 1
    with pytest.raises(ValueError, match="no second"):
        next(wanted)


def test_the_thread_ends_with_a_consumer_that_gives_up() -> None:
    before = threading.active_count()
    wanted = read_ahead(iter(range(10)))
    assert next(wanted) == 0
    wanted.close()
    assert threading.active_count() == before
    assert list(read_ahead([])) == []
