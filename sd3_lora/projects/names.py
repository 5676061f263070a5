"""Names of files and folders that come from outside: made safe, so that nothing lies outside its folder."""

from __future__ import annotations

import re
import unicodedata

MOST_LETTERS = 40
_MOST_BYTES = 150  # of 255 that a file's name may have, endings not counted
_RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)  # that Windows keeps for devices


def safe_name(text: str) -> str:
    """A name of letters, digits, `-` and `_` for whatever was typed or uploaded; empty where nothing of it is left.

    Neither separators nor dots are left, so it is a name within a folder on every system.
    """
    letters = unicodedata.normalize("NFKC", text)
    words = "".join(letter if _is_kept(letter) else " " for letter in letters).split()
    name = "-".join(words)[:MOST_LETTERS]
    name = name.encode()[:_MOST_BYTES].decode(errors="ignore").strip("-_")
    return f"{name}-" if _RESERVED.fullmatch(name) else name


def _is_kept(letter: str) -> bool:
    """Letters, digits, and the marks with which Hindi or Thai write their vowels."""
    return letter.isalnum() or letter in "-_" or unicodedata.category(letter) in ("Mn", "Mc")
