"""Files and folders that are there whole or not at all, and what killed processes leave of them."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished"  # how the names end that a killed process may leave


def unfinished_path(path: Path) -> Path:
    """A hidden name beside `path`, which tells the process that writes there."""
    return path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to, which becomes `path` when the block ends.

    Where the block fails, it is deleted, and `path` is as it was.
    """
    temporary = unfinished_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # its error would hide that of the block, as on a disk that is gone
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Deletes what killed processes left in a folder under hidden names; what a running one writes stays.

    Args:
        folder: it need not exist.
        name: of the file or folder that was being written; None for all, in the folder and two levels below it.
    """
    import psutil  # not before the command line is read

    patterns = [f"{below}.*{UNFINISHED}" for below in ("", "*/", "*/*/")]
    if name is not None:
        patterns = [f".{glob.escape(name)}.*{UNFINISHED}"]
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        number = path.name.removesuffix(UNFINISHED).rpartition(".")[2]
        is_running = number.isdecimal() and int(number) != os.getpid() and psutil.pid_exists(int(number))
        if not is_running:
            remove(path)


def remove(path: Path) -> None:
    """Deletes a file or a folder, as far as that goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
