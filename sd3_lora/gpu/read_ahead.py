"""Pieces that a thread makes one ahead of the one in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Piece = TypeVar("_Piece")


def read_ahead(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """Yields the pieces in order; while one is in use, the next is being made, and no more than that.

    Args:
        pieces: none of them None. What it does between two of them is done by a thread, and what it raises is raised
            here.
    """
    source = iter(pieces)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, None)
        while (piece := coming.result()) is not None:
            coming = thread.submit(next, source, None)
            yield piece
