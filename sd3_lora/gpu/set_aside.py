"""Tensors whose numbers wait on the host, so that their memory on the device is free meanwhile."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sd3_lora.common.memory import drop_workspaces, free_memory

import torch


@contextmanager
def set_aside(tensors: Iterable[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Frees the tensors' memory for the block; afterwards they hold the very bits that they held.

    They stay the same objects, as do all views of their memory, whose addresses may be others afterwards: no CUDA graph
    may have captured them. Inside the block none of them may be read.

    Args:
        tensors: on the device; those that are elsewhere, or whose memory is not torch's, are left alone.
        device: where room is wanted.
    """
    storages = {
        tensor.data_ptr(): tensor.untyped_storage()
        for tensor in tensors
        if tensor.device.type == device.type and tensor.numel() and not getattr(tensor, "is_paged", False)
    }
    kept = []
    for storage in {storage.data_ptr(): storage for storage in storages.values()}.values():
        if storage.resizable():
            kept.append((storage, _bytes_of(storage).to("cpu", copy=True)))
            storage.resize_(0)
    free_memory(device)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # their tensors may fill the memory that is needed now
        raise
    finally:
        drop_workspaces(device)
        free_memory(device)
        for storage, numbers in kept:
            storage.resize_(numbers.numel())
            _bytes_of(storage).copy_(numbers)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
