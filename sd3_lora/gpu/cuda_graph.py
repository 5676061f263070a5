"""A computation on a GPU that is recorded once, as a CUDA graph, and replayed from then on.

A micro-step of SD3-Medium is some six thousand kernels, and the VAE's encoder six hundred. Many are shorter than the
host needs to start one, which it does only while it has Python's lock. A graph starts them all at once, and they are
the same kernels: the numbers stay what they are, bit for bit.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from sd3_lora.common.memory import drop_workspaces, free_memory
from sd3_lora.gpu.copy_stream import join_captured_copies

import torch


class CapturedCall:
    """A computation that is recorded the first time it is called, and replayed from then on.

    What the first replay gives is compared with what the plain computation gave: a graph that lacked a copy or a wait
    would give other numbers without a word.

    Args:
        compute: tensors on the device → a tensor. It may change no memory but `changed`, and must draw nothing at
            random.
        device: a GPU.
        changed: what it adds to; zero when it is first called.
        asked: whether the user asked for it; else what cannot be recorded is computed as it is.
        say: told why not.

    Attributes:
        captured: whether it has been captured, and replayed at least once.
        refusal: why it could not be; None where it was, or was not tried.
    """

    def __init__(
        self,
        compute: Callable[..., torch.Tensor],
        device: torch.device,
        changed: Sequence[torch.Tensor] = (),
        asked: bool = False,
        say: Callable[[str], None] = print,
    ):
        self._compute, self._device, self._changed = compute, device, changed
        self._asked, self._say = asked, say
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._result = torch.empty(())
        self._may_capture = True
        self.captured = False
        self.refusal: str | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What `compute` gives. Inputs of other shapes than the first end the replaying: a last, smaller batch."""
        if self._graph is not None and any(a.shape != b.shape for a, b in zip(self._inputs, inputs, strict=True)):
            self._give_up()
        if self._may_capture and self._graph is None:
            self._capture(inputs)
        if self._graph is None:
            return self._compute(*inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result.clone()

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self._inputs = tuple(map(torch.clone, inputs))
        try:
            # Once as it is, on another stream as graphs ask for it: kernels are loaded and workspaces made.
            aside = torch.cuda.Stream(self._device)
            aside.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(aside):
                result = self._compute(*self._inputs)
            torch.cuda.current_stream(self._device).wait_stream(aside)
            torch.cuda.synchronize(self._device)
            expected = [tensor.to("cpu", copy=True) for tensor in (result, *self._changed)]
            del result
            # The graph has memory of its own: what that run took goes back first, or the peak would double.
            drop_workspaces(self._device)
            free_memory(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                try:
                    self._result = self._compute(*self._inputs)
                except BaseException:
                    # With copies under way its end would fail too, and keep its memory and its stream for ever.
                    join_captured_copies()
                    raise
            self._clear()
            graph.replay()
            if not all(map(_is_close, (self._result.cpu(), *(tensor.cpu() for tensor in self._changed)), expected)):
                raise RuntimeError("its replay gives other numbers than the plain computation")
            self._graph, self.captured = graph, True
        except RuntimeError as error:
            if self._asked:
                raise
            graph = None
            cause = error.__context__ or error  # the recording's end may fail for what failed in it
            for found in (error, cause):
                traceback.clear_frames(found.__traceback__)  # which hold what was computed
            self._give_up()
            self.refusal = str(cause).splitlines()[0]
            self._say(f"not replayed as a graph ({self.refusal}); kernels are started one by one")
        finally:
            self._clear()

    def _clear(self) -> None:
        for tensor in self._changed:
            tensor.zero_()

    def _give_up(self) -> None:
        self._may_capture, self._graph, self._inputs, self._result = False, None, (), torch.empty(())
        drop_workspaces(self._device)  # the recording's lies in the graph's memory, which could not go before it
        free_memory(self._device)


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for the order in which some kernels sum; and for infinities, which the first loss scale makes."""
    both = found.isfinite() & expected.isfinite()
    difference = torch.where(both, found - expected, 0).double().norm()
    return bool(difference <= 0.01 * torch.where(both, expected, 0).double().norm())
