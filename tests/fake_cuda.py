"""Stands for CUDA where a computation is captured as a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import pytest
import torch


class FakeGraph:
    """Stands for a CUDA graph: replayed, what was captured is computed once more, or goes wrong."""

    def __init__(self, fake: FakeCuda):
        self.fake = fake

    def pool(self) -> object:
        return self.memory

    def replay(self) -> None:
        self.fake.events.append(f"replay {len(self.inputs[0])}")
        self.result.copy_(self.fake.compute(*self.inputs))
        for tensor in self.fake.changed:
            tensor.add_(self.fake.error)


class FakeCuda:
    """Stands for CUDA: capturing a computation leaves all memory as it was.

    Attributes:
        events: what was computed, captured, replayed and freed, with the rows of the first input.
        graphs: all that were captured.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        compute: Callable[..., torch.Tensor],
        changed: Sequence[torch.Tensor] = (),
        error: float = 0.0,
    ):
        self.compute, self.changed, self.error = compute, changed, error
        self.events: list[str] = []
        self.graphs: list[FakeGraph] = []
        self._capturing: FakeGraph | None = None
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
        monkeypatch.setattr(torch.cuda, "stream", lambda *_: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr("sd3_lora.gpu.cuda_graph.free_memory", lambda _: self.events.append("freed"))

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The computation, as it is to be given to `CapturedCall`."""
        self.events.append(f"{'capture' if self._capturing else 'compute'} {len(inputs[0])}")
        result = self.compute(*inputs)
        if self._capturing:
            self._capturing.inputs, self._capturing.result = inputs, result
        return result

    @contextmanager
    def capture(self, graph: FakeGraph, pool: object = None, stream: object = None) -> Iterator[None]:
        graph.memory = pool or object()
        self.graphs.append(graph)
        before = [tensor.clone() for tensor in self.changed]
        self._capturing = graph
        try:
            yield
        finally:
            self._capturing = None
            for tensor, value in zip(self.changed, before, strict=True):
                tensor.copy_(value)
