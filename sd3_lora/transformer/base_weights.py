"""The frozen transformer's weights: read one tensor at a time onto the device, as they are or in 4 bits.

diffusers' `from_pretrained` first makes every module on the host, where SD3.5's positional embedding alone passes
through several GiB; and its quantizer refuses a CPU. Here nothing is made that the files do not hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.tensor_files import TensorFiles

import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel

BasePrecision = Literal["nf4"]
# bitsandbytes' sizes (arXiv 2305.14314): a scale for each block of weights, and double quantization's second scale
# for each group of scales.
_BLOCK, _GROUP = 64, 256
# Double quantization keeps the scales in 8 bits: 1/2 + 1/64 + 4/(64 * 256) = 0.516 bytes a weight instead of
# 1/2 + 4/64 = 0.5625, which is 0.35 GiB of SD3.5-Large. The price is an error of the weights that is the same to five
# digits (9.135 % of their size on the miniature, with and without).
DOUBLE_QUANTIZATION = True
# A thread that reads pages of a mapped file and copies them to a GPU takes a second for 2 or 3 GB.
READING_THREADS = 4
_BLOCKS = "transformer_blocks"
_POSITIONS = "pos_embed.pos_embed"


def load_transformer(
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    precision: BasePrecision | None = None,
    latent_size: tuple[int, int] | None = None,
    streamed_blocks: Collection[int] = (),
) -> SD3Transformer2DModel:
    """The transformer, frozen and in eval mode.

    Beside the result, no more than one tensor at a time is held, on the host as on the device. (Threads that read for a
    GPU hold one each.)

    Args:
        files: the model.
        device: where the weights go.
        dtype: of the weights and, of 4-bit ones, of what they compute in.
        precision: nf4 for the blocks' linear layers in 4 bits; None for all in `dtype`, bit for bit as
            `SD3Transformer2DModel.from_pretrained` loads them.
        latent_size: height and width in which all pictures lie that it will compute, in latent pixels: then only the
            middle of the positional embedding is kept, which is all that they use (SD3.5-Medium's whole one has
            432 MiB).
        streamed_blocks: the indices of blocks whose matrices will be streamed. These stay in the files: here they are
            NaN, on the host, without memory. In 4 bits they are on the host, and their scales on the device.

    Raises:
        UserError: as `ModelFiles.component`: the files are not those of the configuration, or quantized already.
    """
    files.component("transformer")  # downloaded now, if need be, and whole
    config = files.read_config("transformer")
    transformer, not_in_files = _make_empty(config)
    with TensorFiles(files.weight_files("transformer")) as weights:
        expected = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
        if precision == "nf4":
            _replace_linear_layers(transformer, dtype)
        if device.type == "cuda" and device.index is None:  # each thread has a current GPU of its own
            device = torch.device("cuda", torch.cuda.current_device())
        reader = _WeightReader(weights, device, dtype, _kept_positions(config, latent_size))
        streamed = {
            name
            for name, shape in expected.items()
            if _is_linear_weight(name, shape) and int(name.split(".")[1]) in streamed_blocks
        }
        for name in streamed if precision is None else ():
            # Not meta tensors: those cannot be exchanged for others, and a LoRA would be made on that device.
            _set_tensor(transformer, name, torch.full((), math.nan, dtype=dtype).expand(expected[name]))
        read = [name for name in expected if precision or name not in streamed]
        values = reader.read_all(read, 1 if precision or device.type != "cuda" else READING_THREADS)
        for name in read:
            _set_tensor(transformer, name, next(values))  # nothing else holds it
            if name in streamed:  # moved after quantization: a GPU rounds the scales otherwise than a CPU
                weight = transformer.get_parameter(name)
                weight.data = weight.data.to("cpu")
    if reader.kept_positions:
        transformer.pos_embed.pos_embed_max_size = reader.kept_positions
    for name in not_in_files:
        _set_tensor(transformer, name, transformer.get_buffer(name).to(device))  # its dtype is left, as diffusers does
    return transformer.eval()


@dataclass(frozen=True)
class _WeightReader:
    """Reads weights onto the device, one tensor at a time.

    Attributes:
        weights: the files.
        device: where they go.
        dtype: into which they are converted.
        kept_positions: the side of the middle of the positional embedding that is kept; None for all of it.
    """

    weights: TensorFiles
    device: torch.device
    dtype: torch.dtype
    kept_positions: int | None

    def read(self, name: str) -> torch.Tensor:
        """A copy even where nothing is converted: a mapped file may be replaced while it is in use."""
        value = self.weights.tensor(name)
        if name == _POSITIONS and self.kept_positions:
            value = _middle(value, self.kept_positions)
        return value.to(self.device, self.dtype, copy=True)

    def read_all(self, names: Sequence[str], threads: int) -> Iterator[torch.Tensor]:
        """Each in turn. Threads read ahead what is part of the result as it is; what is packed first is read alone."""
        if threads == 1:
            yield from map(self.read, names)
            return
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(self.read, names)


def base_bytes(
    files: ModelFiles,
    dtype: torch.dtype,
    precision: BasePrecision | None = None,
    latent_size: tuple[int, int] | None = None,
) -> int:
    """The bytes of `load_transformer`'s result on the device, from the shapes in the files' headers.

    Not rounded: CUDA's allocator takes a multiple of 512 for each tensor. Buffers that no file holds, of which SD3 has
    none, are not counted.
    """
    shapes = files.tensor_shapes("transformer")
    kept = _kept_positions(files.read_config("transformer"), latent_size)
    if kept:
        shapes[_POSITIONS] = torch.Size([1, kept**2, shapes[_POSITIONS][-1]])
    is_4bit = {name: precision == "nf4" and _is_linear_weight(name, shape) for name, shape in shapes.items()}
    return sum(
        _bytes_in_4_bits(shape.numel()) if is_4bit[name] else shape.numel() * dtype.itemsize
        for name, shape in shapes.items()
    )


def _kept_positions(config: Mapping[str, Any], latent_size: tuple[int, int] | None) -> int | None:
    """The side of the middle of the positional embedding that is kept; None for all of it."""
    whole = config.get("pos_embed_max_size")
    if latent_size is None or not whole:
        return None
    side = max(latent_size) // int(config["patch_size"])
    # The model starts a crop at half of what is left over, rounded down: from the middle as from the whole, if the two
    # differ by an even number.
    return min(whole, side + (whole - side) % 2)


def _middle(positions: torch.Tensor, side: int) -> torch.Tensor:
    """The middle `(1, side * side, C)` of `(1, whole * whole, C)`."""
    whole = math.isqrt(positions.shape[1])
    start = (whole - side) // 2
    square = positions.view(1, whole, whole, -1)[:, start : start + side, start : start + side]
    return square.reshape(1, side * side, -1)


def _make_empty(config: Mapping[str, Any]) -> tuple[SD3Transformer2DModel, set[str]]:
    """The model without weights, and the names of the buffers that no file holds; these have their values."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    not_in_files = {name for name, _ in transformer.named_buffers()} - transformer.state_dict().keys()
    if not_in_files:  # a model whose positional embedding has no largest size computes it; SD3's are all in the files
        with init_empty_weights(include_buffers=False):
            transformer = SD3Transformer2DModel.from_config(config)
    return transformer, not_in_files


def make_hollow(config: dict[str, Any], dtype: torch.dtype) -> SD3Transformer2DModel:
    """A frozen transformer without weights, on the meta device."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data = tensor.data.to(dtype)
    return transformer.requires_grad_(False)


def _set_tensor(transformer: SD3Transformer2DModel, name: str, value: torch.Tensor) -> None:
    """Puts a parameter or buffer where an empty one was; a 4-bit layer's weight is quantized where it lies."""
    module_name, _, leaf = name.rpartition(".")
    module = transformer.get_submodule(module_name)
    empty = getattr(module, leaf)
    if hasattr(empty, "quant_state"):
        # Not its `module`, which would hold the layer in a cycle.
        quantization = {"quant_type": empty.quant_type, "compress_statistics": empty.compress_statistics}
        value = type(empty)(value, requires_grad=False, blocksize=_BLOCK, **quantization).to(value.device)
    elif isinstance(empty, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)


def _replace_linear_layers(transformer: SD3Transformer2DModel, dtype: torch.dtype) -> None:
    """Makes the blocks' linear layers 4-bit ones, still empty.

    They are 99 % of the parameters. Of the rest 4 bits would save 30 MB, and an error in what embeds the input or
    projects the output reaches every pixel, with no residual connection beside it.
    """
    import bitsandbytes  # its import takes seconds, and only this needs it

    blocks = transformer.get_submodule(_BLOCKS)
    for name, linear in list(blocks.named_modules()):
        if not isinstance(linear, torch.nn.Linear):
            continue
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            compress_statistics=DOUBLE_QUANTIZATION,
            quant_type="nf4",
            device="meta",
        )
        # In eval mode on a CPU with AVX512-BF16 it would repack its weight for good: in bfloat16 whatever the dtype,
        # and without a gradient for what is trained afterwards.
        layer.support_avx512bf16_for_cpu = False
        layer.register_forward_pre_hook(_to_compute_dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(blocks.get_submodule(parent), leaf, layer)
    transformer.is_loaded_in_4bit = True  # by this peft knows to attach a LoRA for 4-bit layers


def _to_compute_dtype(layer: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """As autocast does for other linear layers: else a 4-bit one returns float32 for a norm's float32."""
    return (inputs[0].to(layer.compute_dtype),)


def _is_linear_weight(name: str, shape: torch.Size) -> bool:
    """Whether a block's linear layer has it: SD3's blocks have no other matrices."""
    return name.startswith(f"{_BLOCKS}.") and len(shape) == 2


def values_in_4_bits(numel: int) -> int:
    """The bytes of so many weights, without their scales."""
    return -(-numel // 2)


def _bytes_in_4_bits(numel: int) -> int:
    """One weight's 4-bit values, its blocks' scales, and the layer's tables."""
    values, scales = values_in_4_bits(numel), -(-numel // _BLOCK)
    table = 16 * 4
    if not DOUBLE_QUANTIZATION:
        return values + 4 * scales + table
    groups, offset, second_table = -(-scales // _GROUP), 4, 256 * 4
    return values + scales + 4 * groups + offset + table + second_table
