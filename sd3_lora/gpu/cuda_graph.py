"""A computation on a GPU that is captured once as a CUDA graph, and replayed from then on.

A micro-step of SD3-Medium is some six thousand kernels, and the VAE's encoder six hundred. Many take
less time than the host needs to launch one, and it launches only while it holds Python's lock. A graph launches them
all at once. They are the same kernels, so the numbers are the same.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from sd3_lora.common.memory import drop_workspaces, free_memory
from sd3_lora.gpu.copy_stream import join_captured_copies

import torch


class CapturedCall:
    """A computation that is captured the first time it is called, and replayed from then on.

    The first replay's result is compared with that of the plain computation, since a graph that lacked a copy or a
    wait would give wrong numbers without an error.

    Args:
        compute: tensors on the device → a tensor. It may change no memory but `changed`, and must draw nothing at
            random.
        device: a GPU.
        changed: the tensors to which it adds; zero when it is first called.
        asked: whether the user asked for it. If not, a computation that cannot be captured runs without a graph.
        log: gets a line with the reason for that.
        exact: whether the first replay must have the plain computation's bits, or its numbers but for roundings.

    Attributes:
        captured: whether it has been captured and replayed at least once.
        refusal: why it could not be captured; None where it was, or was not tried.
    """

    def __init__(
        self,
        compute: Callable[..., torch.Tensor],
        device: torch.device,
        changed: Sequence[torch.Tensor] = (),
        asked: bool = False,
        log: Callable[[str], None] = print,
        exact: bool = False,
    ):
        self._compute, self._device, self._changed = compute, device, changed
        self._asked, self._is_same, self._log = asked, _is_equal if exact else _is_close, log
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._result = torch.empty(())
        self._may_capture = True
        self.captured = False
        self.refusal: str | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result of `compute`. Inputs of another shape, such as a last, smaller batch, end the replays."""
        if self._graph is not None and any(a.shape != b.shape for a, b in zip(self._inputs, inputs, strict=True)):
            self._give_up()
        if self._may_capture and self._graph is None:
            self._capture(inputs)
        if self._graph is None:
            return self._compute(*inputs)
        for captured, given in zip(self._inputs, inputs, strict=True):
            captured.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result.clone()

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self._inputs = tuple(map(torch.clone, inputs))
        try:
            # Once without a graph, on another stream as capturing needs it: loads kernels and makes workspaces.
            aside = torch.cuda.Stream(self._device)
            aside.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(aside):
                result = self._compute(*self._inputs)
            torch.cuda.current_stream(self._device).wait_stream(aside)
            torch.cuda.synchronize(self._device)
            expected = [tensor.to("cpu", copy=True) for tensor in (result, *self._changed)]
            del result
            # The graph has its own memory. What that run took is freed first, or the peak would double.
            drop_workspaces(self._device)
            free_memory(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                try:
                    self._result = self._compute(*self._inputs)
                except BaseException:
                    # With unfinished copies ending the capture would fail too, and never free its memory and stream.
                    join_captured_copies()
                    raise
            self._clear()
            graph.replay()
            if not all(map(self._is_same, (self._result.cpu(), *(tensor.cpu() for tensor in self._changed)), expected)):
                raise RuntimeError("its replay gives other numbers than the plain computation")
            self._graph, self.captured = graph, True
        except RuntimeError as error:
            if self._asked:
                raise
            graph = None
            cause = error.__context__ or error  # a failure while capturing makes the end of the capture fail too
            for each in (error, cause):
                traceback.clear_frames(each.__traceback__)  # the frames hold the computed tensors
            self._give_up()
            self.refusal = str(cause).splitlines()[0]
            self._log(f"not captured as a CUDA graph ({self.refusal}): kernels are launched one by one")
        finally:
            self._clear()

    def _clear(self) -> None:
        for tensor in self._changed:
            tensor.zero_()

    def _give_up(self) -> None:
        self._may_capture, self._graph, self._inputs, self._result = False, None, (), torch.empty(())
        drop_workspaces(self._device)  # the capture's lie in the graph's memory, and keep it from being freed
        free_memory(self._device)


def _is_equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit: the first loss scale makes infinities, and NaN of them."""
    return torch.equal(actual.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def _is_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the order in which some kernels sum. Infinities are left out: the first loss scale makes some."""
    both = actual.isfinite() & expected.isfinite()
    difference = torch.where(both, actual - expected, 0).double().norm()
    return bool(difference <= 0.01 * torch.where(both, expected, 0).double().norm())
