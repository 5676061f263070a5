"""Signals that ask a run to stop, noted so that it ends in good order: Ctrl-C, SIGTERM, SIGHUP."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from sd3_lora.common.command_line import Interrupted
from sd3_lora.gpu.copy_stream import DeviceFlag

import torch

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class StopSignals:
    """Within its block the first of these signals is noted, and a second one ends the process at once.

    A signal that was ignored stays so: `nohup` runs on.

    Args:
        kept: the sentence for a second signal, which says what is kept.
        device: that computes.
        sum_over_ranks: sums a tensor over the processes; None where there is only one.
    """

    def __init__(
        self,
        kept: Callable[[], str],
        device: torch.device,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.received: int | None = None
        self._kept, self._device, self._sum_over_ranks = kept, device, sum_over_ranks
        self._flag: DeviceFlag | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other thread may
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        if self.received is not None:
            raise Interrupted(self._kept(), number)
        self.received = number

    def agreed(self) -> bool:
        """Whether to stop after this step. All ranks have to call this once a step, and get the same answer.

        Several ranks get it one step late, so that nobody waits for the device.
        """
        if self._sum_over_ranks is None:
            return self.received is not None
        mine = torch.full((), float(self.received is not None), device=self._device)
        last, self._flag = self._flag, DeviceFlag.of(self._sum_over_ranks(mine) > 0)
        return last is not None and bool(last)


def _leave_terminal() -> None:
    """Writes to nowhere what would go to a terminal that has closed: each such line would be an error."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), stream.fileno())
