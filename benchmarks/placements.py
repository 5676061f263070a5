"""What of a model was kept where, as a row of a result has it: fields, and never a sentence to be taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def placement_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The row's fields of a transformer's plan, as `run.json` has it; blocks are counted.

    Args:
        plan: `plan` of a run of training or of drawing.
    """
    return {
        **plan,
        "streamed": len(plan["streamed"]),
        "recomputed": len(plan["recomputed"]),
    }


def streaming(placement: Mapping[str, Any]) -> str:
    """How a base is kept, in a few words: "16-bit", "16-bit streamed", "nf4, 14 of its 24 blocks streamed"."""
    base = placement["precision"] or "16-bit"
    streamed, blocks = placement["streamed"], placement["blocks"]
    if not streamed:
        return base
    if streamed < blocks:
        return f"{base}, {streamed} of its {blocks} blocks streamed"
    return f"{base} streamed" if base == "16-bit" else f"{base}, streamed"
