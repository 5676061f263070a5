"""What code would allocate on a GPU, counted without one: it is run on tensors that have shapes and no memory.

Meta tensors go through the same modules, the same autograd and the same checkpointing as real ones, so whatever those
keep is counted, for any model, LoRA and size. Three things are stood in for, as a meta tensor has no GPU's kernels:
autocast's casts, the fused attention, and a 4-bit layer's weight, which is unpacked for as long as it is multiplied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from sd3_lora.common.memory import round_up
from sd3_lora.common.placement_flags import AttentionKernel

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

# Autocast's lists for CUDA (torch/amp/autocast_mode's documentation), as far as SD3's modules use them.
_IN_LOW_PRECISION = {
    torch.nn.functional.linear,
    torch.nn.functional.conv2d,
    torch.addmm,
    torch.matmul,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
}
_IN_FLOAT32 = {
    torch.nn.functional.layer_norm,
    torch.nn.functional.group_norm,
    torch.nn.functional.mse_loss,
    torch.nn.functional.softmax,
    torch.pow,
    torch.Tensor.pow,
    torch.Tensor.__pow__,
    torch.rsqrt,
    torch.Tensor.rsqrt,
    torch.sum,
    torch.Tensor.sum,
    torch.exp,
}


class AllocationCounter(TorchDispatchMode):
    """Counts the storages that are made while it is active, and the most that there were at once.

    Attributes:
        now: bytes of the storages made here that are still alive.
        peak: the most that `now` has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x.untyped_storage() for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        for storage in inputs:
            self._known.add(storage)  # made before, or outside: not counted
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = round_up(storage.nbytes())
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


class _Attention(torch.autograd.Function):
    """The fused kernels' memory: backward needs what went in, what came out, and a float32 for each row and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        scratch = torch.empty_like(query, dtype=torch.float32), torch.empty_like(sums)  # of flash attention's dQ
        grads = tuple(map(torch.empty_like, (query, key, value)))
        del scratch
        return grads


class _MathAttention(torch.autograd.Function):
    """torch's plain attention: in float32 a score for each pair of tokens, and a probability, which backward needs.

    Backward makes the gradient of both, and takes one such matrix more: an H100 held 11.8 GiB, 10.5 without it.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.dtype = query.dtype
        out = torch.empty_like(query)
        query, key, value = query.float(), key.float(), value.float()
        scores = query.new_empty(*query.shape[:-1], key.shape[-2])
        probabilities = torch.empty_like(scores)
        del scores
        ctx.save_for_backward(query, key, value, probabilities)
        return out

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, probabilities = ctx.saved_tensors
        matrices = [torch.empty_like(probabilities) for _ in range(3)]
        grads = tuple(tensor.to(ctx.dtype) for tensor in map(torch.empty_like, (query, key, value)))
        del matrices
        return grads


class _UnpackedLinear(torch.autograd.Function):
    """A linear layer whose weight exists only while it multiplies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        unpacked = torch.empty_like(weight, dtype=x.dtype)
        out = x @ unpacked.t()
        del unpacked
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        unpacked = torch.empty_like(ctx.weight, dtype=ctx.dtype)
        return grads[0] @ unpacked, None


class _StandIns(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype, packed: Callable[[torch.Tensor], bool], keeps_scores: bool):
        super().__init__()
        self._dtype, self._packed, self._keeps_scores = dtype, packed, keeps_scores
        self._casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            inputs = [self._low(x) for x in args[:3]]
            if self._keeps_scores:
                return _MathAttention.apply(*inputs)
            return _Attention.apply(*inputs)
        if self._dtype != torch.float32:
            if func in _IN_LOW_PRECISION:
                args, kwargs = tree_map(self._low, (args, kwargs))
            elif func in _IN_FLOAT32:
                args, kwargs = tree_map(self._full, (args, kwargs))
        if func is torch.nn.functional.linear and self._packed(args[1]):
            out = _UnpackedLinear.apply(args[0], args[1])
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return out if bias is None else out + bias
        return func(*args, **kwargs)

    def _low(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self._dtype)
        # Autocast keeps the cast of a weight until it is left.
        if id(x) not in self._casts:
            self._casts[id(x)] = (x, x.to(self._dtype))
        return self._casts[id(x)][1]

    def _full(self, x: Any) -> Any:
        return x.float() if isinstance(x, torch.Tensor) and x.dtype == self._dtype else x


def stand_in_for_gpu(
    module: torch.nn.Module,
    dtype: torch.dtype,
    packed: Callable[[torch.Tensor], bool] = lambda _: False,
    attention_kernel: AttentionKernel | None = None,
) -> None:
    """Has a module on the meta device compute as it would on a GPU under `torch.autocast("cuda", dtype)`.

    In backward too, where a checkpoint computes it anew.

    Args:
        module: a model, and in a call of its own each part that is recomputed.
        dtype: as autocast's; float32 casts nothing.
        packed: whether a weight is held in 4 bits.
        attention_kernel: math keeps a score for each pair of tokens; the others are fused, and do not.
    """
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _StandIns(dtype, packed, attention_kernel == "math"):
            return forward(*args, **kwargs)

    module.forward = run
