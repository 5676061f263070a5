"""T5's encoder in 8 bits (LLM.int8(), arXiv 2208.07339), quantized weight by weight as the files are read.

The modules, the kernels and the numbers are those of transformers' `from_pretrained` with bitsandbytes. That sends each
weight to the GPU, back to the host, and to the GPU again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sd3_lora.common.lean_imports import import_bitsandbytes
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.tensor_files import TensorFiles

import torch
from transformers import T5Config, T5EncoderModel

_THREADS = 4  # read as fast as a GPU takes the weights
_OUTLIERS_FROM = 6.0  # activations from here on are multiplied in 16 bits: transformers' default


def load_t5_int8(files: ModelFiles, device: torch.device) -> T5EncoderModel | None:
    """T5's encoder on a device. None where the files name their weights otherwise than transformers saves them.

    Beside the weights there is one of them in 16 bits on the device, and four on the host.
    """
    if device.type == "cuda":
        import_bitsandbytes()
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(files.read_config("text_encoder_3"))).eval()
    model.encoder.set_input_embeddings(model.shared)  # they are tied
    names = list(dict(model.named_parameters()))
    with TensorFiles(files.weight_files("text_encoder_3")) as weights:
        if not set(names) <= set(weights.shapes()):
            return None
        for name, value in _read(weights, names, device):
            _place(model, name, value)
    return model


def _place(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Copies a weight into its module: a block's matrices in 8 bits but for `wo`, which is float32 in any precision."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if isinstance(module, torch.nn.Linear) and not path.endswith(".wo"):
        _set_submodule(model, path, _linear_in_8_bits(value.to(torch.float16)))
        return
    value = value.to(torch.float32 if path.endswith(".wo") else torch.float16, copy=True)
    setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))


def _set_submodule(model: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _linear_in_8_bits(weight: torch.Tensor) -> torch.nn.Module:
    """A linear layer without a bias, as all of T5's are; `weight` is float16 `(out, in)`."""
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    out_features, in_features = weight.shape
    layer = Linear8bitLt(
        in_features, out_features, bias=False, has_fp16_weights=False, threshold=_OUTLIERS_FROM, device="meta"
    )
    rows, scales, _ = int8_vectorwise_quant(weight)
    layer.weight = Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)
    return layer.eval()


def _read(weights: TensorFiles, names: Sequence[str], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors on the device, in the files' dtypes; each is valid until the next."""
    if device.type != "cuda":
        yield from ((name, weights.tensor(name)) for name in names)
        return
    # The table of the tokens' embeddings is three times as large as the largest tensor of a block: it would be most of
    # the pinned memory.
    yield from ((name, weights.tensor(name).to(device)) for name in names if ".block." not in name)
    yield from _read_in_threads(weights, [name for name in names if ".block." in name], device)


def _read_in_threads(
    weights: TensorFiles, names: Sequence[str], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors on the device in order, while threads read the next ones into pinned memory.

    All pass through one buffer on the device. With memory of their own, what is kept would lie in the gaps that they
    leave, and the allocator would hold more than it needs.
    """
    largest = max(weights.tensor(name).nbytes for name in names)
    staging = torch.empty(largest, dtype=torch.uint8, device=device)
    free = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(_THREADS)]
    waiting = deque[tuple[str, Future[torch.Tensor], torch.Tensor]]()

    def read(name: str, buffer: torch.Tensor) -> torch.Tensor:
        tensor = weights.tensor(name)
        return as_tensor(buffer, tensor).copy_(tensor)

    def as_tensor(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return buffer[: like.nbytes].view(like.dtype).view(like.shape)

    upcoming = iter(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        while True:
            while free and (name := next(upcoming, "")):
                buffer = free.pop()
                waiting.append((name, pool.submit(read, name, buffer), buffer))
            if not waiting:
                return
            name, pinned, buffer = waiting.popleft()
            value = as_tensor(staging, pinned.result()).copy_(pinned.result())  # returns when it is there
            free.append(buffer)
            yield name, value
