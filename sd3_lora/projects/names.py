"""Names of files and folders that come from outside: made safe, so that nothing lies outside its folder."""

from __future__ import annotations

import re
import unicodedata

MOST_LETTERS = 40
_RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)  # that Windows keeps for devices


def safe_name(text: str) -> str:
    """A name of letters, digits, `-` and `_` for whatever was typed or uploaded; empty where nothing of it is left.

    Neither separators nor dots are left, so it is a name within a folder on every system.
    """
    folded = unicodedata.normalize("NFKC", text)
    name = re.sub(r"[\W_]*-[\W_]*|[^\w]+", "-", folded)[:MOST_LETTERS].strip("-_")
    return f"{name}-" if _RESERVED.fullmatch(name) else name
