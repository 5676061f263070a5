"""The processes that share a stage's work: torchrun starts them, one for each GPU; without it there is one.

torchrun --nproc-per-node 2 precompute_latents.py ...
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

from sd3_lora.common.command_line import EXIT_USER_ERROR, UserError
from sd3_lora.common.devices import choose_device, cpu_cores

import torch
from torch import distributed

T = TypeVar("T")
# The first may wait for the others while they still decode and encode what is left of their shares.
_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process and the others.

    Attributes:
        index: of this one, 0 for the first.
        count: of all.
    """

    index: int
    count: int

    @property
    def is_first(self) -> bool:
        """Whether this one writes what there is one of, and speaks."""
        return self.index == 0

    @property
    def cpu_cores(self) -> int:
        """The cores for this one, where several share a machine."""
        return max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", self.count)))

    def choose_device(self, asked: str) -> torch.device:
        """The device to compute on; each process has a GPU of its own.

        Raises:
            UserError: as `devices.choose_device`; there are fewer GPUs than processes.
        """
        if self.count > 1 and asked != "cpu" and torch.cuda.is_available():
            gpus, own = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
            if own >= gpus:
                raise UserError(f"there are {gpus} GPUs here, one for each process: type --nproc-per-node {gpus}")
            torch.cuda.set_device(own)
        return choose_device(asked)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every item is in one process' share."""
        return items[self.index :: self.count]

    def gather(self, mine: T) -> list[T]:
        """What each process has, in their order; all of them have to call this.

        Raises:
            UserError: another one has stopped.
        """
        if self.count == 1:
            return [mine]
        everyone: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(everyone, mine)
        except RuntimeError as error:
            raise UserError(
                "another process has stopped: mend what it says, and type the same command again"
            ) from error
        return everyone

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, which alone does it, in all of them."""
        return self.gather(work() if self.is_first else None)[0]  # type: ignore[return-value]


@contextmanager
def open_processes() -> Iterator[Processes]:
    """Joins the processes that torchrun started; all but the first are silent.

    The first one that fails says why. It ends, and torchrun ends the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes(0, 1)
        return
    store, index, count = next(distributed.rendezvous("env://"))
    # gloo, with GPUs too: what is exchanged is small, and NCCL would give up after ten minutes.
    group = distributed.PrefixStore("stage", store)
    distributed.init_process_group("gloo", store=group, rank=index, world_size=count, timeout=_PATIENCE)
    try:
        with open(os.devnull, "w") as nowhere, ExitStack() as silence:
            if index:
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))
            yield Processes(index, count)
    except (Exception, KeyboardInterrupt) as error:
        if store.add("stage-errors", 1) > 1:  # another has said it, or what this one's follows from
            raise SystemExit(EXIT_USER_ERROR) from error
        raise
    finally:
        distributed.destroy_process_group()


def in_processes(
    script: Callable[[Sequence[str] | None, Processes], None],
) -> Callable[[Sequence[str] | None], None]:
    """A script's body that is run in each of the processes, for `exit_code`."""

    def run(argv: Sequence[str] | None) -> None:
        with open_processes() as processes:
            script(argv, processes)

    return run
