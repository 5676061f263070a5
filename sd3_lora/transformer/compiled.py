"""Blocks that torch compiles: fewer kernels and fewer passes over memory, with other roundings."""

from __future__ import annotations

import enum
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
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
    if any(parameter.requires_grad for parameter in transformer.transformer_blocks[0].parameters()):
        for embedder in (transformer.pos_embed, transformer.context_embedder):
            embedder.register_forward_hook(_with_gradient)
    for block in transformer.transformer_blocks:
        block.compile()


def uncompiled(compiled: Compiled) -> AbstractContextManager[object]:
    """Within it the blocks run as they are: other shapes would have torch compile anew, and for any shape from then on.

    Args:
        compiled: how they were compiled, if they were.
    """
    return nullcontext() if compiled is Compiled.NO else torch.compiler.set_stance("force_eager")


def _with_gradient(_module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """The first block's input as that of any block, with a gradient: it is then of the same kind as those after it.

    Of its own kind it would take a third of all compiling, 9 s on an H100. The gradient of its input, which nobody
    reads, takes a fraction of a millisecond.
    """
    return output.detach().requires_grad_() if torch.is_grad_enabled() else output


def start_compile_workers(compiled: Compiled, device: torch.device) -> None:
    """Starts the processes in which torch compiles kernels for a GPU, so that they are ready when the first comes.

    Each imports torch. torch itself starts them when it has traced the first block, and compiles in this process,
    kernel after kernel, until they are ready.
    """
    if compiled is Compiled.NO or device.type != "cuda":
        return
    try:
        from torch._inductor.async_compile import maybe_warm_pool
    except ImportError:  # a torch without it: it only saves time
        return
    maybe_warm_pool()


def blocks_were_compiled() -> bool:
    """Whether all was compiled that had to be since `compile_blocks`; what does not compile runs uncompiled."""
    if "torch._dynamo" not in sys.modules:  # its import takes seconds, and nothing was compiled without it
        return False
    from torch._dynamo.utils import counters

    frames = counters["frames"]
    return 0 < frames["ok"] == frames["total"]
