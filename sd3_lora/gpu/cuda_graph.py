"""A computation on a GPU that is captured once as a CUDA graph, and replayed from then on.

A micro-step of SD3-Medium is some six thousand kernels, and the VAE's encoder six hundred. Many take
less time than the host needs to launch one, and it launches only while it holds Python's lock. A graph launches them
all at once. They are the same kernels, so the numbers are the same.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from sd3_lora.common.command_line import first_line
from sd3_lora.common.memory import drop_workspaces, free_memory
from sd3_lora.gpu.copy_stream import join_captured_copies

import torch

_Shapes = tuple[torch.Size, ...]


@dataclass(frozen=True)
class _Captured:
    """The computation of one shape.

    Attributes:
        graph: that computes it.
        inputs: which it reads.
        result: which it writes.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    result: torch.Tensor

    @property
    def numel(self) -> int:
        """Of all inputs."""
        return sum(tensor.numel() for tensor in self.inputs)


class CapturedCall:
    """A computation that is captured the first time it is called, and replayed from then on.

    The first replay's result is compared with that of the plain computation, since a graph that lacked a copy or a
    wait would give wrong numbers without an error.

    Inputs of several shapes have a graph each. These share one pool of memory, which holds what the largest one needs,
    since only one is replayed at a time. The largest is captured first: what a smaller one allocates then fits into
    what the largest has freed, and not the other way round. While a new shape is computed plainly there are no graphs,
    or both would have to fit; those of the other shapes are captured again when they next come.

    Args:
        compute: tensors on the device → a tensor. It may change no memory but `changed`, and must draw nothing at
            random. What else it changes must stay as it is inside `rehearsal`.
        device: a GPU.
        changed: the tensors to which it adds; zero when it is first called.
        asked: whether the user asked for it. If not, a computation that cannot be captured runs without a graph.
        log: gets a line with the reason for that.
        exact: whether the first replay must have the plain computation's bits, or its numbers but for roundings.
        most_shapes: how many shapes get a graph; one more, such as a last, smaller batch, ends the replays.

    Attributes:
        rehearsal: the context in which it is tried out before a result counts.
        captured: whether it has been captured and replayed at least once.
        refusal: why it could not be captured; None where it was, or was not tried.
        gave_up: whether it computes plainly from now on, so that no graph of it is ever replayed again.
    """

    def __init__(
        self,
        compute: Callable[..., torch.Tensor],
        device: torch.device,
        changed: Sequence[torch.Tensor] = (),
        asked: bool = False,
        log: Callable[[str], None] = print,
        exact: bool = False,
        most_shapes: int = 1,
    ):
        self._compute, self._device, self._changed = compute, device, changed
        self._asked, self._is_same, self._log = asked, _is_equal if exact else _is_close, log
        self._most_shapes = most_shapes
        self._compared: set[_Shapes] = set()  # whose first replay gave the plain computation's numbers
        self._graphs: dict[_Shapes, _Captured] = {}  # in one pool, the largest first
        self._inputs: dict[tuple[int, torch.Size], torch.Tensor] = {}  # by position; graphs share those of one shape
        self._aside: torch.cuda.Stream | None = None
        self.rehearsal: Callable[[], AbstractContextManager[object]] = nullcontext
        self.captured = False
        self.gave_up = False
        self.refusal: str | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result of `compute`."""
        shapes = tuple(tensor.shape for tensor in inputs)
        if not self.gave_up and shapes not in self._graphs:
            if shapes in self._compared or len(self._compared) < self._most_shapes:
                with self.rehearsal():
                    self._capture(shapes, inputs)
            else:
                self._give_up()
        captured = self._graphs.get(shapes)
        if captured is None:
            return self._compute(*inputs)
        for read, given in zip(captured.inputs, inputs, strict=True):
            read.copy_(given, non_blocking=True)
        captured.graph.replay()
        return captured.result.clone()

    def release(self) -> None:
        """Frees the graphs' memory for other work; each is captured again when its shape next comes."""
        self._free()

    def _capture(self, shapes: _Shapes, inputs: tuple[torch.Tensor, ...]) -> None:
        is_new = shapes not in self._compared
        if is_new or sum(tensor.numel() for tensor in inputs) > max(
            (g.numel for g in self._graphs.values()), default=0
        ):
            self._free()
        # Within a window of micro-steps the gradients of those before are in them.
        held = [tensor.clone() for tensor in self._changed] if is_new and self._compared else []
        captured: _Captured | None = None
        try:
            if held:
                self._clear()
            copies = tuple(self._copy(place, tensor) for place, tensor in enumerate(inputs))
            if self._aside is None:
                self._aside = torch.cuda.Stream(self._device)  # one for all graphs: the pool keeps memory by stream
            expected = self._compute_plainly(copies, self._aside) if is_new else None
            captured = self._record(copies, self._aside)
            if expected:
                self._clear()
                captured.graph.replay()
                results = (captured.result.cpu(), *(tensor.cpu() for tensor in self._changed))
                if not all(map(self._is_same, results, expected)):
                    raise RuntimeError("its replay gives other numbers than the plain computation")
                self._compared.add(shapes)
            self._graphs[shapes], self.captured = captured, True
        except RuntimeError as error:
            if self._asked:
                raise
            captured = None
            cause = error.__context__ or error  # a failure while capturing makes the end of the capture fail too
            for each in (error, cause):
                traceback.clear_frames(each.__traceback__)  # the frames hold the computed tensors
            self._give_up()
            self.refusal = first_line(cause)
            self._log(f"not captured as a CUDA graph ({self.refusal}): kernels are launched one by one")
        finally:
            if is_new:
                self._clear()
                for tensor, before in zip(self._changed, held, strict=False):
                    tensor.copy_(before)

    def _copy(self, place: int, tensor: torch.Tensor) -> torch.Tensor:
        """A copy that graphs read, in the memory that those of the same shape read."""
        key = place, tensor.shape
        if key not in self._inputs:
            self._inputs[key] = torch.empty_like(tensor)
        return self._inputs[key].copy_(tensor)

    def _compute_plainly(self, inputs: tuple[torch.Tensor, ...], aside: torch.cuda.Stream) -> list[torch.Tensor]:
        """The result and what is changed, on the host.

        Once without a graph, on another stream as capturing needs it: loads kernels and makes workspaces.
        """
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            result = self._compute(*inputs)
        torch.cuda.current_stream(self._device).wait_stream(aside)
        torch.cuda.synchronize(self._device)
        expected = [tensor.to("cpu", copy=True) for tensor in (result, *self._changed)]
        del result
        # The graph has its own memory. What that run took is freed first, or the peak would double.
        drop_workspaces(self._device)
        free_memory(self._device)
        return expected

    def _record(self, inputs: tuple[torch.Tensor, ...], aside: torch.cuda.Stream) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool, stream=aside), _noted(self):
            try:
                result = self._compute(*inputs)
            except BaseException:
                # With unfinished copies ending the capture would fail too, and never free its memory and stream.
                join_captured_copies()
                raise
        return _Captured(graph, inputs, result)

    def _clear(self) -> None:
        for tensor in self._changed:
            tensor.zero_()

    def _free(self) -> None:
        if self._graphs:
            self._destroy_graphs()
            drop_workspaces(self._device)  # the capture's lie in the graphs' memory, and keep it from being freed
            free_memory(self._device)

    def _destroy_graphs(self) -> None:
        """Once the last replay is over: before expandable segments are unmapped, torch waits for the stream that
        captured, not for the one that replays.
        """
        if self._graphs:
            torch.cuda.synchronize(self._device)
        self._graphs = {}

    def _give_up(self) -> None:
        self._destroy_graphs()
        self.gave_up, self._inputs = True, {}
        drop_workspaces(self._device)
        free_memory(self._device)


_in_capture: list[CapturedCall] = []


@contextmanager
def _noted(call: CapturedCall) -> Iterator[None]:
    _in_capture.append(call)
    try:
        yield
    finally:
        _in_capture.remove(call)


def call_in_capture() -> CapturedCall | None:
    """The computation that is captured now; None where there is none, or where another program captures it."""
    return _in_capture[-1] if _in_capture else None


def _is_equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit: the first loss scale makes infinities, and NaN of them."""
    return torch.equal(actual.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def _is_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the order in which some kernels sum. Infinities are left out: the first loss scale makes some."""
    both = actual.isfinite() & expected.isfinite()
    difference = torch.where(both, actual - expected, 0).double().norm()
    return bool(difference <= 0.01 * torch.where(both, expected, 0).double().norm())
