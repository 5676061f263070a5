"""The modulations of streamed blocks, computed one micro-step ahead.

A modulation multiplies one row a picture, made of the noise level and the pooled prompt, with the largest matrix of a
block: a third of SD3-Medium's block, to make 18 KB a picture. Forward computes least and so waits for its copies;
backward computes more, and the link is idle. So a block's modulation matrices are streamed when backward recomputes
the block, and multiply the next micro-batch's row. Both passes of the current micro-batch use the results of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from sd3_lora.common.memory import drop_workspaces, free_memory
from sd3_lora.transformer.streaming import StreamedBlocks

import torch
from diffusers import SD3Transformer2DModel

Modulating = tuple[torch.Tensor, torch.Tensor]  # timesteps (B,) and pooled prompts (B, P), the transformer's inputs


class ModulationsAhead:
    """The modulations of blocks that are both streamed and recomputed. Their results stay the same, bit for bit.

    Before each micro-step `advance` is called, and forward and backward run within `active`. Outside of it the layers
    compute as usual. A micro-step may be repeated, and captured as a CUDA graph: it changes nothing that it reads.

    Shapes: B batch, C channels of the transformer, P pooled width.

    Args:
        transformer: its blocks streamed, its LoRA attached.
        streamed: what streams its blocks.
        blocks: the indices of those whose modulations are computed ahead.
    """

    def __init__(self, transformer: SD3Transformer2DModel, streamed: StreamedBlocks, blocks: Sequence[int]):
        self._embed = transformer.time_text_embed
        self._streamed = streamed
        self._multiply: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self._next: list[
            torch.Tensor
        ] = []  # the next micro-batch's inputs of the modulations, always in the same memory
        self._row: torch.Tensor | None = (
            None  # (B, C): their embedding, which every modulation multiplies, in a step's backward
        )
        self._given: list[torch.Tensor] = []
        self._coming: list[torch.Tensor] = []
        self._coming_of: torch.Tensor | None = None  # the timesteps of the micro-batch that comes next
        self._is_active = False
        self._ran: set[int] = set()
        for block in (transformer.transformer_blocks[index] for index in blocks):
            for norm in (block.norm1, block.norm1_context):
                layer = getattr(norm.linear, "base_layer", norm.linear)  # peft's, where it has a LoRA
                index = len(self._multiply)
                self._multiply.append(layer.forward)
                layer.forward = partial(self._forward, index)

    @torch.no_grad()
    def advance(self, now: Modulating, coming: Modulating | None) -> None:
        """Goes on to the next micro-step; to be called in the precision that forward has.

        The modulations of `now` were computed in the last micro-step if it was `coming` then. Else they are computed
        here, which streams their matrices.

        Args:
            now: this micro-batch's inputs of the modulations.
            coming: the next one's, the same tensors that will be `now` then; None if it is not known yet.
        """
        if now[0] is not self._coming_of:
            self._compute(now)
        torch._foreach_copy_(self._given, self._coming)
        self._coming_of = coming and coming[0]
        if coming:
            torch._foreach_copy_(self._next, coming)

    def _compute(self, now: Modulating) -> None:
        """Computes the modulations of `now` outside of a micro-step, as before the first one."""
        row = self._row_of(*now)
        self._streamed.begin_pass(prefetch=False)
        computed = [multiply(row) for multiply in self._multiply]
        if not self._next:
            self._next = list(map(torch.clone, now))
            self._given, self._coming = ([torch.empty_like(one) for one in computed] for _ in range(2))
        torch._foreach_copy_(self._coming, computed)
        # A replayed step has another cuBLAS workspace: this one would stay allocated and unused.
        drop_workspaces(row.device)
        free_memory(row.device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """For forward and backward of the micro-step that `advance` went on to."""
        self._ran.clear()
        self._is_active = True
        try:
            yield
        finally:
            self._is_active, self._row = False, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For a forward within a micro-step whose rows are others: its modulations are computed as usual."""
        was_active, self._is_active = self._is_active, False
        try:
            yield
        finally:
            self._is_active = was_active

    def _row_of(self, timesteps: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self._embed(timesteps, pooled))

    def _forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if not self._is_active:
            return self._multiply[index](x)
        if index in self._ran:  # the block is recomputed
            with torch.no_grad():
                if self._row is None:
                    self._row = self._row_of(*self._next)
                self._coming[index].copy_(self._multiply[index](self._row))
        self._ran.add(index)
        return self._given[index]
