"""Items that a thread reads one ahead of the one in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Piece = TypeVar("_Piece")


def read_ahead(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """Yields the pieces in order; while one is in use, a thread reads the next, and no more than that.

    Args:
        pieces: none of them is None. It runs in the thread; what it raises is raised here.
    """
    source = iter(pieces)
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, source, None)
        while (piece := upcoming.result()) is not None:
            upcoming = thread.submit(next, source, None)
            yield piece
