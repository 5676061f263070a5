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
        done: recorded behind it on its stream; None on a CPU, where it is done already.
    """

    done: torch.cuda.Event | None = None


class CopyStream:
    """Copies for one device, one after another, on a stream of their own.

    Nothing here makes the host wait: what has to wait is queued behind an event. On a CPU a copy is done at once.

    Args:
        device: that computes; its computation is what the calling thread's current stream holds.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        _copy_streams.add(self)

    def start(self, copy: Callable[[], object]) -> Copy:
        """Runs `copy` after everything that has been queued on the device so far, but beside what is queued later.

        Memory that `copy` allocates on the device is of this stream's pool: freed, it can only go to a later copy,
        which again starts after everything that was queued before. So it is never overwritten while in use, even if
        it is given up before anyone has waited for the copy.

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
        """Makes what is queued on the device from now on wait for `copy`."""
        if copy.done is not None:
            torch.cuda.current_stream(self._device).wait_event(copy.done)

    def join_recording(self) -> None:
        """Has the recording that is under way, if any, wait for what it has copied."""
        if self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            is_captured = torch.cuda.is_current_stream_capturing()
        if is_captured:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


_copy_streams: weakref.WeakSet[CopyStream] = weakref.WeakSet()


def join_captured_copies() -> None:
    """Makes a recording that is given up wait for the copies that it has begun: without that it cannot be ended."""
    for copies in list(_copy_streams):
        copies.join_recording()


@dataclass(frozen=True)
class DeviceFlag:
    """A yes or no that the device will have said soon.

    Attributes:
        host: a bool scalar in pinned memory, once `arrived` has happened.
        arrived: None where it is there already.
    """

    host: torch.Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, value: torch.Tensor) -> DeviceFlag:
        """Begins to bring a bool scalar to the host, without waiting for it."""
        if value.device.type != "cuda":
            return cls(value, None)
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(value, non_blocking=True)
        return cls(host, torch.cuda.current_stream(value.device).record_event())

    def __bool__(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()  # for what was queued up to here, not for what was queued since
        return bool(self.host)
