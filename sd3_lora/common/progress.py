"""`Progress`: a bar with the time left and the memory in use; where no terminal shows it, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import MutableMapping
from typing import Any

from sd3_lora.common.memory import GIB, host_bytes

import torch
from tqdm import tqdm

LINE_INTERVAL_S = 10.0  # what is done sooner gets no line
_TENTHS = 10
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}, {memory}{postfix}]"


class Progress(tqdm):
    """As tqdm. In a pipe or a file it writes whole lines: one for each tenth, if `LINE_INTERVAL_S` have passed."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._is_terminal = (kwargs.get("file") or sys.stderr).isatty()
        self._written_s, self._written_tenth = time.monotonic(), 0
        if self._is_terminal:
            kwargs = {"bar_format": _BAR, **kwargs}
        else:  # `gui`: tqdm's word for what draws no bar
            kwargs = {**kwargs, "gui": True, "mininterval": LINE_INTERVAL_S}
        super().__init__(*args, **kwargs)

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        """Tqdm's fields, and the memory in use."""
        return {**super().format_dict, "memory": memory_in_use()}

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]
        """Draws the bar; elsewhere writes a line if one is due. Returns whether a bar was drawn, as tqdm asks."""
        if self._is_terminal:
            return bool(super().display(msg, pos))  # True: a bar that goes away leaves the cursor at its beginning
        tenth = int(_TENTHS * self.n / self.total) if self.total else 0
        now = time.monotonic()
        if tenth > self._written_tenth and now - self._written_s >= LINE_INTERVAL_S:
            self._written_tenth, self._written_s = tenth, now
            self.fp.write(self.line() + "\n")
            self.fp.flush()
        return False

    def line(self) -> str:
        """How far it is, in one line: "steps: 250 of 500, 00:41 left, host 1.2 GiB, loss 0.2143"."""
        shown, total, done = self.format_dict, int(self.total or 0), int(self.n - self.initial)
        left_s = shown["elapsed"] * (total - self.n) / done if done else 0
        left = f", {self.format_interval(left_s)} left" if self.n < total else ""
        postfix = f", {shown['postfix']}" if shown["postfix"] else ""
        return f"{self.desc}: {self.n} of {total}{left}, {shown['memory']}{postfix}"

    def clear(self, nolock: bool = False) -> None:
        """Takes the bar away for a line above it; lines stay."""
        if self._is_terminal:
            super().clear(nolock)


def memory_in_use() -> str:
    """What this process holds now: "host 1.2 GiB, GPU 5.6 GiB"."""
    host = f"host {host_bytes() / GIB:.1f} GiB"
    if not torch.cuda.is_initialized():
        return host
    return f"{host}, GPU {torch.cuda.memory_reserved() / GIB:.1f} GiB"
