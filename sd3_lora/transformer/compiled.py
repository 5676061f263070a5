"""Blocks that torch compiles: fewer kernels and fewer passes over memory, with other roundings."""

from __future__ import annotations

import enum
import sys

from diffusers import SD3Transformer2DModel


class Compiled(enum.Enum):
    """Whether blocks are compiled, and what happens to one that cannot be."""

    NO = "no"
    WHERE_POSSIBLE = "where possible"  # a block that does not compile runs as it is
    ALWAYS = "always"  # it is an error


def compile_blocks(transformer: SD3Transformer2DModel, compiled: Compiled) -> None:
    """Has each block compiled when it first runs; blocks of one kind share their kernels.

    Args:
        transformer: with its LoRA attached.
        compiled: what happens to a block that does not compile.
    """
    from torch import _dynamo  # its import takes seconds, and only this needs it

    # After runs of other shapes in this process torch would compile for any shape, and at last not at all.
    _dynamo.reset()
    _dynamo.utils.counters.clear()
    _dynamo.config.suppress_errors = compiled is not Compiled.ALWAYS
    for block in transformer.transformer_blocks:
        block.compile()


def blocks_were_compiled() -> bool:
    """Whether all was compiled that had to be since `compile_blocks`; what does not compile runs uncompiled."""
    if "torch._dynamo" not in sys.modules:  # its import takes seconds, and nothing was compiled without it
        return False
    from torch._dynamo.utils import counters

    frames = counters["frames"]
    return 0 < frames["ok"] == frames["total"]
