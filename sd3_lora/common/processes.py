"""The processes that share a stage's work. torchrun starts one for each GPU; without torchrun there is one.

torchrun --nproc-per-node 2 precompute_latents.py ...
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

from sd3_lora.common.command_line import EXIT_USER_ERROR, UserError
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.devices import choose_device, cpu_cores

import torch
from torch import distributed

T = TypeVar("T")
# Set in a script that training starts on its way.
STARTED_BY_TRAINING = "SD3_LORA_STARTED_BY_TRAINING"
# Rank 0 may wait this long while the others finish their shares.
_TIMEOUT = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among all that run the stage.

    Attributes:
        rank: of this process.
        count: of all processes, torch's world size.
    """

    rank: int
    count: int

    @property
    def is_rank_0(self) -> bool:
        """Whether this process is rank 0, which alone prints and writes files that all share."""
        return self.rank == 0

    @property
    def cpu_cores(self) -> int:
        """The CPU cores for this process, where several share a machine."""
        return max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", self.count)))

    def choose_device(self, asked: str, model: ModelConfig | None = None) -> torch.device:
        """The device to compute on, as `devices.choose_device`; each process has a GPU of its own.

        Raises:
            UserError: as `devices.choose_device`; there are fewer GPUs than processes.
        """
        if self.count > 1 and asked != "cpu" and torch.cuda.is_available():
            gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
            if local_rank >= gpus:
                raise UserError(f"there are {gpus} GPUs here, one for each process: type --nproc-per-node {gpus}")
            torch.cuda.set_device(local_rank)
        return choose_device(asked, model)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process' part of the items: every item is in the share of one process."""
        return items[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. All of them have to call this.

        Raises:
            UserError: another process has stopped.
        """
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise UserError(
                "another process has stopped: correct the error that it printed, and type the same command again"
            ) from error
        return values

    def from_rank_0(self, work: Callable[[], T]) -> T:
        """Runs `work` in rank 0 alone, and returns its result in all processes."""
        return self.gather(work() if self.is_rank_0 else None)[0]  # type: ignore[return-value]

    @contextmanager
    def holding(self, lock: AbstractContextManager[None]) -> Iterator[None]:
        """Rank 0 holds a lock inside the block, which the others enter after it."""
        with lock if self.is_rank_0 else nullcontext():
            self.gather(None)
            yield


@contextmanager
def open_processes() -> Iterator[Processes]:
    """Joins the processes that torchrun started; only rank 0 prints.

    The first process that fails prints its error and ends; torchrun ends the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes(0, 1)
        return
    store, rank, count = next(distributed.rendezvous("env://"))
    # gloo, with GPUs too: what is exchanged is small, and NCCL would give up after ten minutes.
    group = distributed.PrefixStore("stage", store)
    distributed.init_process_group("gloo", store=group, rank=rank, world_size=count, timeout=_TIMEOUT)
    try:
        with open(os.devnull, "w") as null, ExitStack() as redirections:
            if rank:
                redirections.enter_context(redirect_stdout(null))
                redirections.enter_context(redirect_stderr(null))
            yield Processes(rank, count)
    except (Exception, KeyboardInterrupt) as error:
        if store.add("stage-errors", 1) > 1:  # another process printed its error first
            raise SystemExit(EXIT_USER_ERROR) from error
        raise
    finally:
        distributed.destroy_process_group()


def print_next(line: str) -> None:
    """Prints what to type next; not where training has started this script, and goes on by itself."""
    if STARTED_BY_TRAINING not in os.environ:
        print(line)


def in_processes(
    script: Callable[[Sequence[str] | None, Processes], None],
) -> Callable[[Sequence[str] | None], None]:
    """Wraps a script's body for `exit_code`, so that it runs in each of the processes."""

    def run(argv: Sequence[str] | None) -> None:
        with open_processes() as processes:
            script(argv, processes)

    return run
