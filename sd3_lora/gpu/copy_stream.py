"""Copies between host and device that run beside the computation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Copy:
    """A copy that was started.

    Attributes:
        done: the event behind it on its stream; None on a CPU, where it is done already.
    """

    done: torch.cuda.Event | None = None


class CopyStream:
    """Copies for one device, one after another, on a stream of their own.

    The host never waits here: the device's streams wait for events. On a CPU a copy is done at once.

    Args:
        device: that computes, on the calling thread's current stream.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        _copy_streams.add(self)

    def start(self, copy: Callable[[], object]) -> Copy:
        """Queues `copy` after everything that is queued on the device so far, and beside what is queued later.

        Memory that `copy` allocates on the device belongs to this stream's pool. Once freed it can only be reused by
        a later copy, which again starts after everything that was queued before. So it is never overwritten while in
        use, even if it is freed before anything has waited for the copy.

        Args:
            copy: calls `copy_(..., non_blocking=True)`; without a gradient.
        """
        with torch.no_grad():
            if self._stream is None:
                copy()
                return Copy()
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                copy()
                return Copy(self._stream.record_event())

    def wait(self, copy: Copy) -> None:
        """Has everything that is queued on the device from now on wait for `copy`."""
        if copy.done is not None:
            torch.cuda.current_stream(self._device).wait_event(copy.done)

    def join(self) -> None:
        """Has everything that is queued on the device from now on wait for all copies that were started."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def join_capture(self) -> None:
        """Has the capture of a CUDA graph, if one is going on, wait for the copies that it has captured."""
        if self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            is_captured = torch.cuda.is_current_stream_capturing()
        if is_captured:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


_copy_streams: weakref.WeakSet[CopyStream] = weakref.WeakSet()


def join_captured_copies() -> None:
    """Has a capture that failed wait for the copies that it has captured: else it cannot be ended."""
    for copies in list(_copy_streams):
        copies.join_capture()


@dataclass(frozen=True)
class DeviceFlag:
    """A boolean that the device computes, on its way to the host.

    Attributes:
        host: a bool scalar in pinned memory, valid after `arrived`.
        arrived: the event behind the copy; None where the value is on the host already.
    """

    host: torch.Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, value: torch.Tensor) -> DeviceFlag:
        """Starts to copy a bool scalar to the host, without a host–device synchronisation."""
        if value.device.type != "cuda":
            return cls(value, None)
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(value, non_blocking=True)
        return cls(host, torch.cuda.current_stream(value.device).record_event())

    def __bool__(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()  # waits for the work queued before `of`, not for what was queued since
        return bool(self.host)
