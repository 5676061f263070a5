"""float32 → bfloat16, up or down by chance, so that the mean is the number itself.

A bfloat16 has 8 bits of precision. An update smaller than a 512th of its weight, as most are, would be rounded away
each time; here it counts once in so many times (Zamirai et al., arXiv 2010.06192).

The random bits are a hash of a key and of the place in the tensor. So they are the same on every device, in a step that
is replayed as a CUDA graph, and in a run that is resumed; nothing is kept of a generator.
"""

from __future__ import annotations

import torch

_LOW_BITS = 0xFFFF  # of a float32, which a bfloat16 lacks
# Of the hash lowbias32 (Chris Wellons); the second one as int32 has it.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32


def mixed(values: torch.Tensor) -> torch.Tensor:
    """A hash of each int32, which is another int32; in operations that every device computes alike."""
    values = (values ^ _shifted(values, 16)) * _FIRST
    values = (values ^ _shifted(values, 15)) * _SECOND
    return values ^ _shifted(values, 16)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, filled with zeros: int32's own shift repeats the sign."""
    return (values >> bits) & ((1 << (32 - bits)) - 1)


def step_keys(seed: int, step: int, count: int, device: torch.device) -> torch.Tensor:
    """The keys of so many tensors in an optimizer step, `(count, 2)` int32.

    Args:
        seed: of the run, at least 0.
        step: from 1.
        count: of the tensors.
        device: that computes them.
    """
    index = torch.arange(2 * count, dtype=torch.int32, device=device)
    for word in (seed & 0xFFFFFFFF, seed >> 32, step):
        signed = word - 2**32 if word >= 2**31 else word
        index = mixed(index ^ signed)
    return index.view(count, 2)


def random_bits(places: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """16 random bits for each place, int32.

    Args:
        places: int32.
        key: two int32.
    """
    return mixed(mixed(places ^ key[0]) ^ key[1]) & _LOW_BITS


def round_stochastically(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Each number as one of the two bfloat16 beside it, the nearer one more often; as it is where it is one of them.

    Args:
        values: float32 and finite.
        bits: of `random_bits`, in the same shape.
    """
    whole = (values.view(torch.int32) + bits) & ~_LOW_BITS
    return whole.view(torch.float32).to(torch.bfloat16)
