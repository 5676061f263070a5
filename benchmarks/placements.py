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
        "base_precision": plan["base_precision"],
        "blocks": plan["blocks"],
        "streamed": len(plan["streamed_blocks"]),
        "buffers": plan["buffers"],
        "from_files": plan["from_files"],
        "recomputed": _count(plan.get("recomputed", 0)),
        "offload_inputs": plan.get("offload_inputs", False),
    }


def _count(blocks: Any) -> int:
    """Of blocks that are given as their number or by their indices."""
    return blocks if isinstance(blocks, int) else len(blocks)


def streaming(placement: Mapping[str, Any]) -> str:
    """How a base is kept, in a few words: "16-bit", "16-bit streamed", "nf4, 14 of its 24 blocks streamed"."""
    base = "nf4" if placement["base_precision"] else "16-bit"
    streamed, blocks = placement["streamed"], placement["blocks"]
    if not streamed:
        return base
    if streamed < blocks:
        return f"{base}, {streamed} of its {blocks} blocks streamed"
    return f"{base} streamed" if base == "16-bit" else f"{base}, streamed"
