"""Room on the disk for what a stage will write, checked before it begins: no hours of work end on a full disk."""

from __future__ import annotations

from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.common.memory import GIB, free_disk_bytes


def require_room(folder: Path, needed: int, what: str) -> None:
    """Checks that a folder's disk has room.

    Args:
        folder: that is written; it need not exist.
        needed: bytes that will be written beside what is there.
        what: they are, in words, with a verb.

    Raises:
        UserError: there is less.
    """
    free = free_disk_bytes(folder)
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {_gib(free)} left, and {what} up to {_gib(needed)}: make room, or write to "
            "another disk"
        )


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"
