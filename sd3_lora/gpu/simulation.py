"""How much code would allocate on a GPU, counted without one: it runs on meta tensors, which have no memory.

Meta tensors go through the same modules, the same autograd and the same recomputation as real ones, so all that these
keep is counted, for any model, LoRA and size. Four things that only GPU kernels do are simulated: autocast's casts,
fused attention, dropout's mask, and a 4-bit layer's weight, which is unpacked while it is multiplied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from sd3_lora.common.memory import round_up
from sd3_lora.common.placement_flags import AttentionKernel
from sd3_lora.gpu.exact_attention import AttentionBackward, scratch_bytes

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
    """Counts the bytes of storages that are made while it is active, and their peak.

    Attributes:
        now: bytes of the storages made since it became active that are still alive.
        peak: the largest `now` so far.
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
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backward: AttentionBackward
    ) -> torch.Tensor:
        ctx.computed = backward
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        scratch = query.new_empty(scratch_bytes(ctx.computed, query, key), dtype=torch.uint8)
        grads = tuple(map(torch.empty_like, (query, key, value)))
        del scratch
        return (*grads, None)


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


class _Dropout(torch.autograd.Function):
    """A GPU's one kernel for it: backward needs a byte for each element, which says whether it was kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(grads[0])


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
    def __init__(
        self,
        dtype: torch.dtype,
        packed: Callable[[torch.Tensor], bool],
        keeps_scores: bool,
        backward: AttentionBackward,
    ):
        super().__init__()
        self._dtype, self._packed, self._keeps_scores, self._backward = dtype, packed, keeps_scores, backward
        self._casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            inputs = [self._low(x) for x in args[:3]]
            if self._keeps_scores:
                return _MathAttention.apply(*inputs)
            return _Attention.apply(*inputs, self._backward)
        if func is torch.nn.functional.dropout:
            return _Dropout.apply(args[0]) if kwargs["training"] and kwargs["p"] else args[0]
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
    attention_backward: AttentionBackward = AttentionBackward.TORCH,
) -> None:
    """Has a module on the meta device compute as it would on a GPU under `torch.autocast("cuda", dtype)`.

    In backward too, where blocks are recomputed.

    Args:
        module: a model; each recomputed part of it needs a call of its own.
        dtype: as autocast's; float32 casts nothing.
        packed: whether a weight is held in 4 bits.
        attention_kernel: math keeps a score for each pair of tokens; the others are fused, and do not.
        attention_backward: that of the fused ones.
    """
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _StandIns(dtype, packed, attention_kernel == "math", attention_backward):
            return forward(*args, **kwargs)

    module.forward = run
