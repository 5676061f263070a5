"""The identity of pictures: the sha256 of their bytes. A large folder's hashes are kept in a file.

A kept hash is used while the file's size, time of modification and time of change are the same. No program can set the
time of change, so a file that is copied over another with its old date is read again. (On Windows that time is the
creation's, so there size and modification decide.)
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import write_text_atomically
from sd3_lora.common.devices import cpu_cores
from sd3_lora.common.progress import Progress
from sd3_lora.stage_one.image_files import hash_file

NOTES_NAME = "pictures.json"  # beside the latents of these pictures
NOTED_FROM_BYTES = 256 * 1024**2  # a smaller folder is read in a second
MOST_THREADS = 16
# A file that is written twice within a tick of its file system's clock has the same times twice.
_CLOCK_TICK_NS = 2 * 10**9
Times = tuple[int, int, int]  # bytes, and nanoseconds of the modification and of the change


def hash_pictures(paths: Sequence[Path], notes_path: Path | None = None) -> list[str]:
    """The sha256 of each file, hexadecimal.

    Args:
        paths: the files.
        notes_path: the file of kept hashes; None to read all pictures and keep nothing.

    Raises:
        UserError: a file cannot be read.
    """
    started_ns = time.time_ns()
    names = [os.path.abspath(path) for path in paths]
    times = [_times(path) for path in paths]
    notes = _read_notes(notes_path) if notes_path else {}
    known = {
        name: notes[name][1]
        for name, time_now in zip(names, times, strict=True)
        if name in notes and notes[name][0] == time_now
    }
    missing = [path for name, path in zip(names, paths, strict=True) if name not in known]
    is_large = sum(size for size, *_ in times) >= NOTED_FROM_BYTES
    with ThreadPoolExecutor(min(MOST_THREADS, cpu_cores())) as pool:  # hashing releases the lock
        hashes = (pool.map if is_large else map)(hash_file, missing)  # tiny files need no threads
        read = Progress(hashes, total=len(missing), desc="hashing", leave=False, disable=len(missing) < 100)
        known |= zip((os.path.abspath(path) for path in missing), read, strict=True)
    if notes_path and missing and is_large:
        kept = {
            name: (*time_now, known[name])
            for name, time_now in zip(names, times, strict=True)
            if max(time_now[1:]) < started_ns - _CLOCK_TICK_NS
        }
        with contextlib.suppress(OSError):  # a folder that cannot be written is read again each time
            notes_path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(notes_path, json.dumps(kept))
    return [known[name] for name in names]


def _times(path: Path) -> Times:
    try:
        status = path.stat()
    except OSError:  # the reader reports it
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_notes(path: Path) -> dict[str, tuple[Times, str]]:
    """Times and hash of each file, by its absolute path; none where the notes are damaged."""
    try:
        notes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {name: ((size, modified, changed), digest) for name, (size, modified, changed, digest) in notes.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
