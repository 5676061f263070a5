"""How much of a GPU's memory a script may use, and how much of it is left for tensors."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from sd3_lora.common.command_line import UserError, first_line
from sd3_lora.common.config import BudgetConfig
from sd3_lora.common.memory import GIB, drop_workspaces, free_memory, is_out_of_memory
from sd3_lora.common.progress import Progress
from sd3_lora.common.stage_report import StageReport

import torch

# CUDA's own memory in a process where it cannot be measured: as on an H100; a T4's is about half.
ASSUMED_CONTEXT_BYTES = int(0.75 * GIB)
# Kernels are loaded when they are first used, after the context was measured; the text encoders use few.
LATER_KERNELS_BYTES = int(0.16 * GIB)
FEW_KERNELS_BYTES = int(0.02 * GIB)
LESS_SHARE = 0.9  # of what an attempt had whose memory ran out, for the next one

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceBudget:
    """The memory of one device that a script may use.

    Attributes:
        total_bytes: in all.
        context_bytes: CUDA's own part of it: measured, or assumed where there is no GPU.
        device: whose memory it is.
    """

    total_bytes: int
    context_bytes: int
    device: torch.device

    @property
    def tensor_bytes(self) -> int:
        """Bytes left for torch's allocator."""
        return max(0, self.total_bytes - self.context_bytes)

    def cap(self) -> None:
        """Makes torch's allocator refuse to exceed the budget."""
        if self.device.type == "cuda":
            index = _index(self.device)
            whole = torch.cuda.get_device_properties(index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.tensor_bytes / whole), index)

    def now(self) -> DeviceBudget:
        """The budget while other programs may have taken some of it: no more than is free now, or already this one's.

        Nothing but CUDA's own memory may be on the device.
        """
        if self.device.type != "cuda":
            return self
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) + self.context_bytes
        return replace(self, total_bytes=min(self.total_bytes, free))

    def less(self, stages: Iterable[StageReport]) -> DeviceBudget:
        """The budget of another attempt, after memory ran out: what is free now, and less than was had then.

        Args:
            stages: of the attempt that failed.
        """
        now = self.now()
        had = self.used_bytes(stages) or now.total_bytes
        return replace(now, total_bytes=min(now.total_bytes, int(LESS_SHARE * had)))

    def used_bytes(self, stages: Iterable[StageReport] = ()) -> int:
        """The peak bytes of this process: CUDA's own and the most that the allocator held; 0 on a CPU.

        Args:
            stages: the finished stages, since each stage resets the allocator's peak.
        """
        if self.device.type != "cuda":
            return 0
        peaks = [int(stage.peak_reserved_gib * GIB) for stage in stages]
        return self.context_bytes + max(torch.cuda.max_memory_reserved(self.device), *peaks, 0)


def open_budget(
    config: BudgetConfig, device: torch.device, later_bytes: int = LATER_KERNELS_BYTES
) -> DeviceBudget | None:
    """The budget that was asked for, or all free memory; None on a CPU where none was asked for.

    Args:
        config: the flags.
        device: whose memory is used.
        later_bytes: of kernels that will be loaded later.

    Raises:
        UserError: less is free than asked for, or less asked for than CUDA itself takes.
    """
    asked = None if config.vram_budget_gib is None else int(config.vram_budget_gib * GIB)
    if device.type != "cuda":
        if asked is None and not config.plan:
            return None
        budget = DeviceBudget(asked or _largest(), ASSUMED_CONTEXT_BYTES, device)
    else:
        context = _context_bytes(device) + later_bytes
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + context
        if asked is not None and asked > free and not config.plan:
            raise UserError(
                f"--vram_budget_gib {config.vram_budget_gib:g}: {at_most_gib(free)} GiB are free on "
                f"{torch.cuda.get_device_name(device)}: close other programs, or ask for less"
            )
        budget = DeviceBudget(asked or free, context, device)
    if budget.tensor_bytes == 0:
        raise UserError(
            f"--vram_budget_gib {config.vram_budget_gib:g}: CUDA itself takes {budget.context_bytes / GIB:.2f} GiB: "
            "ask for more"
        )
    return budget


def within_memory(
    attempt: Callable[[DeviceBudget | None], T], budget: DeviceBudget | None, stages: list[StageReport]
) -> T:
    """Does some work within a budget; where the device's memory runs out, once more within a smaller one.

    Args:
        attempt: the work. It plans within the budget that it is given, and goes on with what an earlier one has left.
        budget: of the first attempt; without one there is no other.
        stages: the reports to which the work adds.

    Raises:
        UserError: nothing fits what is left.
    """
    while True:
        before = len(stages)
        try:
            return attempt(budget)
        except RuntimeError as error:
            if budget is None or not is_out_of_memory(error):
                raise
            reason = first_line(error)
        free_memory(budget.device)
        budget = budget.less(stages[before:])
        Progress.write(
            f"note: the GPU's memory ran out ({reason}): going on within {at_most_gib(budget.total_bytes)} GiB"
        )
        budget.cap()


def sentence(parts: Mapping[str, int]) -> str:
    """Predicted parts and their sum: "weights 3.91 + activations 0.60 = 4.51 GiB"."""
    shown = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return f"{shown} = {sum(parts.values()) / GIB:.2f} GiB"


def compared(predicted_bytes: int, measured_bytes: int) -> str:
    """The line that compares the predicted and the measured peak; 0 bytes measured means that there is no GPU."""
    measured = f"measured {measured_bytes / GIB:.2f}" if measured_bytes else "not measured: no GPU"
    return f"peak: predicted {predicted_bytes / GIB:.2f} GiB, {measured}"


def measured_peak(budget: DeviceBudget | None, reports: Iterable[StageReport], predicted_bytes: int) -> int:
    """The bytes that were used at most, printed beside the predicted ones; 0 without a budget or a GPU.

    Args:
        budget: of the stage.
        reports: of its parts.
        predicted_bytes: 0 where nothing was computed, and so nothing is to be compared.
    """
    measured = budget.used_bytes(reports) if budget else 0
    if budget and predicted_bytes:
        print(compared(predicted_bytes, measured))
    return measured


class BudgetTooSmall(UserError):
    """The refusal of a budget that nothing fits.

    Attributes:
        needed_gib: the smallest that would do, CUDA's own included, as it is typed: "1.01".
    """

    def __init__(self, sentence: str, needed_bytes: int):
        super().__init__(sentence)
        self.needed_gib = enough_gib(needed_bytes)


def too_small(what: str, needed_bytes: int) -> BudgetTooSmall:
    """The refusal of a budget that nothing fits, with the smallest that would do.

    Args:
        what: the work that needs it, in the singular: "encoding a picture".
        needed_bytes: the least that it needs, CUDA's own included.
    """
    gib = enough_gib(needed_bytes)
    return BudgetTooSmall(f"{what} needs at least {gib} GiB: type --vram_budget_gib {gib}", needed_bytes)


def enough_gib(needed_bytes: int) -> str:
    """GiB rounded up, because what is typed must suffice: "1.01"."""
    return f"{math.ceil((needed_bytes + 1) * 100 / GIB) / 100:.2f}"


def at_most_gib(free_bytes: int) -> str:
    """GiB rounded down, so that what is too little does not read like what is enough: "1.00"."""
    return f"{math.floor((free_bytes + 1) * 100 / GIB) / 100:.2f}"


def _largest() -> int:
    return 1 << 62  # --plan without a GPU and without a budget: everything fits


_CONTEXTS: dict[int, int] = {}


def _context_bytes(device: torch.device) -> int:
    """Bytes of CUDA beside the tensors, measured once: how much the driver's figure grows, less the tensors."""
    index = _index(device)
    if index not in _CONTEXTS:
        before = driver_bytes(index)
        # One of several processes has made its context when it chose its GPU: too late to measure it.
        was_there = torch._C._cuda_hasPrimaryContext(index)  # type: ignore[attr-defined]  # its stub lacks it
        square = torch.zeros(64, 64, device=device, dtype=torch.float16)
        square @ square
        torch.cuda.synchronize(device)
        after = driver_bytes(index)
        if before is None or after is None or was_there:
            measured = ASSUMED_CONTEXT_BYTES
        else:
            measured = after - before - torch.cuda.memory_reserved(device)
        _CONTEXTS[index] = max(measured, 0)
        del square
        drop_workspaces(device)
    return _CONTEXTS[index]


def _index(device: torch.device) -> int:
    """The GPU's number; a device without one, as accelerate's "cuda", is the current GPU."""
    return torch.cuda.current_device() if device.index is None else device.index


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def driver_bytes(index: int) -> int | None:
    """Bytes in use on a GPU by all programs, as the driver reports; None where it cannot be asked.

    Through NVML, because torch's own function would create the context that is to be measured.
    """
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None
    handle, memory = ctypes.c_void_p(), _Memory()
    identity = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(identity, ctypes.byref(handle))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    )
    return None if failed else memory.used
