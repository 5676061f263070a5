"""Locks between runs: who writes a folder or a file, and who reads a cache. The system frees them when a process dies.

A lock is a hidden file that `filelock` locks. Whoever gets it deletes the file at the end; one that a killed run left
locks nobody out.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sd3_lora.common.atomic_files import remove_unfinished
from sd3_lora.common.command_line import UserError, require_writable_folder

if TYPE_CHECKING:
    from filelock import BaseFileLock

_LOCK, _READING = ".lock", ".reading-"
# Of disks that have no locks, as some of a network: there runs go on without.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def writing_in(folder: Path, refusal: str | None = None) -> Iterator[None]:
    """Inside the block this run alone writes in a folder; what killed runs left unfinished there is deleted first.

    The folder is made; if it is empty in the end, it is deleted again.

    Args:
        folder: that is written.
        refusal: what to say where another run writes there; None to wait for its end.

    Raises:
        UserError: another run writes there, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    require_writable_folder(folder)
    try:
        with _held(folder / _LOCK, folder, refusal):
            remove_unfinished(folder)
            yield
    finally:
        for path in made:
            with suppress(OSError):  # there is something in it
                path.rmdir()


@contextmanager
def writing(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Inside the block this run alone writes a file, or a folder that is to come; else as `writing_in`."""
    require_writable_folder(path.parent)
    with _held(_lock_of(path), path, refusal):
        for name in (path.name, "writable"):
            remove_unfinished(path.parent, name)
        yield


@contextmanager
def reading_in(folder: Path) -> Iterator[None]:
    """Waits until nobody writes in a folder, and keeps others from deleting there what is read inside the block.

    Other runs may read it too, and may add to it. A folder that cannot be written is read as it is.
    """
    with ExitStack() as stack:
        with suppress(OSError), _held(folder / _LOCK, folder, None):
            _is_read(folder)
            stack.enter_context(_held(folder / f"{_READING}{uuid.uuid4().hex[:8]}{_LOCK}", folder, None))
        yield


def wait_for_writer(path: Path) -> None:
    """Waits until nobody writes a file."""
    with suppress(OSError), _held(_lock_of(path), path, None):
        pass


def require_unread(folder: Path) -> None:
    """Checks that no run reads what is to be deleted in a folder.

    Raises:
        UserError: one does.
    """
    if _is_read(folder):
        raise UserError(
            f"a run that goes on reads {folder}, where --overwrite would delete latents: wait for its end, or give "
            "another --output_path"
        )


def _is_read(folder: Path) -> bool:
    """Whether a run reads a folder; what killed ones left of their locks is deleted."""
    from filelock import FileLock, Timeout

    is_read = False
    for path in folder.glob(f"{_READING}*{_LOCK}"):
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            is_read = True
        else:
            _release(lock)
    return is_read


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}{_LOCK}")


@contextmanager
def _held(path: Path, what: Path, refusal: str | None) -> Iterator[None]:
    """Holds a lock inside the block, on a disk that has locks.

    Args:
        path: of the lock's file.
        what: is locked.
        refusal: as `writing_in`.
    """
    lock = _acquired(path, what, refusal)
    try:
        yield
    finally:
        if lock is not None:
            _release(lock)


def _acquired(path: Path, what: Path, refusal: str | None) -> BaseFileLock | None:
    from filelock import FileLock, Timeout  # not before the command line is read

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        if refusal is not None:
            raise UserError(refusal) from error
        print(f"{what} is being written by another run: waiting for its end", flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return lock


def _release(lock: BaseFileLock) -> None:
    """Frees a lock and deletes its file: whoever has it open already finds that out, and makes a new one."""
    with suppress(OSError):  # Windows deletes it when it is freed
        os.unlink(lock.lock_file)
    lock.release()
