"""What a step of training or of drawing allocates: simulated on a model with one block of each kind (`simulation.py`),
and put together from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sd3_lora.common.memory import round_up
from sd3_lora.gpu.simulation import AllocationCounter, stand_in_for_gpu
from sd3_lora.transformer.base_weights import BasePrecision
from sd3_lora.transformer.lora import attach_lora, target_modules
from sd3_lora.transformer.recompute import recompute_blocks

import torch
from diffusers import SD3Transformer2DModel

# How many blocks' inputs are on the device at a time when they are sent to the host: this block's, the one that leaves,
# and in backward the one that arrives.
INPUTS_IN_FLIGHT = 3


@dataclass(frozen=True)
class StepShape:
    """What decides the memory of a training step.

    Attributes:
        batch_size: pictures in a micro-batch.
        latent_side: of the crops, in latent pixels.
        text_tokens: of a prompt, the CLIPs' 77 included.
        layers: that get a LoRA, as `target_modules` takes them.
        blocks: likewise.
        rank: of the LoRA.
        dropout: of the LoRA.
        dtype: of autocast, and of the base where it is not in 4 bits.
        use_8bit_adam: whether the optimizer's state takes 2 bytes a parameter instead of 8.
    """

    batch_size: int
    latent_side: int
    text_tokens: int
    layers: Sequence[str] | None
    blocks: Sequence[int] | None
    rank: int
    dropout: float
    dtype: torch.dtype
    use_8bit_adam: bool


@dataclass(frozen=True)
class DenoisingShape:
    """What decides the memory of a forward.

    Attributes:
        batch_size: rows in it: two a picture under guidance.
        latent_size: height and width, in latent pixels.
        text_tokens: of a prompt, the CLIPs' 77 included.
        dtype: of the base and of what it computes in.
        lora_bytes: of the LoRAs' weights.
    """

    batch_size: int
    latent_size: tuple[int, int]
    text_tokens: int
    dtype: torch.dtype
    lora_bytes: int


@dataclass(frozen=True)
class StepMemory:
    """What a step allocates, in bytes.

    Attributes:
        kept: for each block, the activations that it keeps for backward if it is not computed anew.
        inputs: for each block, what it keeps if it is.
        outside: what is kept by all that is not a block.
        working: the most that backward takes beside what is kept.
        working_recomputed: the same where every block is computed anew.
        lora: the trained parameters, in float32.
    """

    kept: tuple[int, ...]
    inputs: tuple[int, ...]
    outside: int
    working: int
    working_recomputed: int
    lora: int

    def peak(self, recomputed: int, offload_inputs: bool) -> tuple[int, int]:
        """The activations that are kept and the working memory beside them, at the worst moment.

        That is either the end of forward, with the recomputed blocks' inputs and all that the others keep; or a
        moment of backward when the others' activations are gone: those of one block that was just computed anew, and
        the inputs before it.
        """
        inputs = list(self.inputs[:recomputed])
        if offload_inputs:
            inputs = sorted(inputs)[-INPUTS_IN_FLIGHT:]
        kept = self.outside + sum(inputs)
        after_forward = kept + sum(self.kept[recomputed:]), self.working
        if not recomputed:
            return after_forward
        return max(after_forward, (kept + max(self.kept[:recomputed]), self.working_recomputed), key=sum)


def make_hollow(config: dict[str, Any], dtype: torch.dtype) -> SD3Transformer2DModel:
    """A frozen transformer without weights, on the meta device."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data = tensor.data.to(dtype)
    return transformer.requires_grad_(False)


def _packed_weights(
    transformer: SD3Transformer2DModel, precision: BasePrecision | None
) -> Callable[[torch.Tensor], bool]:
    """Tells which weights are held in 4 bits: the blocks' own matrices."""
    frozen = {id(p) for p in transformer.transformer_blocks.parameters() if not p.requires_grad and p.dim() == 2}
    return lambda weight: precision == "nf4" and id(weight) in frozen


def simulate_denoising(config: dict[str, Any], shape: DenoisingShape, precision: BasePrecision | None) -> int:
    """The most bytes that a forward without gradient takes, by a model of the first two blocks and the last."""
    dual = set(config.get("dual_attention_layers") or ())
    count = min(3, config["num_layers"])
    small = {**config, "num_layers": count, "dual_attention_layers": tuple(i for i in range(count) if i in dual)}
    with torch.device("meta"):
        transformer = make_hollow(small, shape.dtype)
        size, (height, width) = shape.batch_size, shape.latent_size
        words = {
            "hidden_states": torch.empty(size, config["in_channels"], height, width, dtype=shape.dtype),
            "timestep": torch.empty(size),
            "encoder_hidden_states": torch.empty(
                size, shape.text_tokens, config["joint_attention_dim"], dtype=shape.dtype
            ),
            "pooled_projections": torch.empty(size, config["pooled_projection_dim"], dtype=shape.dtype),
        }
    stand_in_for_gpu(transformer, torch.float32, _packed_weights(transformer, precision))
    counter = AllocationCounter()
    with torch.no_grad(), counter:
        transformer(**words, return_dict=False)
    inputs = sum(round_up(tensor.nbytes) for tensor in words.values())
    return counter.peak + inputs


class _Kind(NamedTuple):
    """What decides how much a block allocates."""

    is_before_lora: bool
    is_first_with_lora: bool
    is_dual: bool
    is_trained: bool
    is_last: bool


def simulate_step(config: dict[str, Any], shape: StepShape, precision: BasePrecision | None) -> StepMemory:
    """Runs forward and backward of a model with one block of each kind on tensors that have no memory."""
    count = config["num_layers"]
    dual = set(config.get("dual_attention_layers") or ())
    trained = set(range(count) if shape.blocks is None else shape.blocks)
    first = min(trained)
    # Blocks of one key allocate the same. Nothing is kept for backward before the first LoRA, and little in its block,
    # whose input needs no gradient.
    keys = [_Kind(i < first, i == first, i in dual, i in trained, i == count - 1) for i in range(count)]
    kinds = list(dict.fromkeys(keys))
    small = {**config, "num_layers": len(kinds)}
    small["dual_attention_layers"] = tuple(i for i, kind in enumerate(kinds) if kind.is_dual)
    with torch.device("meta"):
        transformer = make_hollow(small, shape.dtype)
        blocks = [i for i, kind in enumerate(kinds) if kind.is_trained]
        targets = target_modules(transformer, shape.layers, blocks)
        attach_lora(transformer, targets, shape.rank, float(shape.rank), shape.dropout, 0)
    transformer.train()
    trained_in = {
        kind: sum(p.numel() for p in block.parameters() if p.requires_grad)
        for kind, block in zip(kinds, transformer.transformer_blocks, strict=True)
    }
    packed = _packed_weights(transformer, precision)
    stand_in_for_gpu(transformer, shape.dtype, packed)
    counter = AllocationCounter()
    at: list[int] = []  # before each block and after the last, when what nobody keeps of the block before is gone
    marks = [
        module.register_forward_pre_hook(lambda *_: at.append(counter.now))
        for module in (*transformer.transformer_blocks, transformer.norm_out)
    ]
    with counter:
        loss = _forward(transformer, config, shape)
        after_forward = counter.now
        loss.backward()
    for mark in marks:
        mark.remove()
    kept = dict(zip(kinds, (after - before for before, after in itertools.pairwise(at)), strict=True))
    tokens = (shape.latent_side // config["patch_size"]) ** 2 + shape.text_tokens
    width = config["num_attention_heads"] * config["attention_head_dim"]
    one_input = shape.batch_size * tokens * width * shape.dtype.itemsize
    outside = max(0, after_forward - sum(kept.values()))

    def memory(blocks: Sequence[_Kind], working: int, working_recomputed: int) -> StepMemory:
        return StepMemory(
            kept=tuple(kept[kind] for kind in blocks),
            inputs=tuple(0 if kind.is_before_lora else one_input for kind in blocks),
            outside=outside,
            working=working,
            working_recomputed=working_recomputed,
            lora=4 * sum(trained_in[kind] for kind in blocks),
        )

    # Which block needs the most beside what is kept, shows when each is computed anew.
    recompute_blocks(transformer, len(kinds))
    for block in transformer.transformer_blocks:
        stand_in_for_gpu(block, shape.dtype, packed)
    with AllocationCounter() as anew:
        _forward(transformer, config, shape).backward()
    beside = anew.peak - sum(memory(kinds, 0, 0).peak(len(kinds), False))
    return memory(keys, max(0, counter.peak - after_forward), max(0, beside))


def _forward(transformer: SD3Transformer2DModel, config: dict[str, Any], shape: StepShape) -> torch.Tensor:
    """The loss of a micro-batch, as `micro_step` has it."""
    side, size = shape.latent_side, shape.batch_size
    with torch.device("meta"):
        latents = torch.empty(size, config["in_channels"], side, side)
        noise = torch.empty_like(latents)
        prompt_embeds = torch.empty(size, shape.text_tokens, config["joint_attention_dim"], dtype=shape.dtype)
        pooled = torch.empty(size, config["pooled_projection_dim"], dtype=shape.dtype)
        sigmas = torch.empty(size, 1, 1, 1)
    velocity = transformer(
        hidden_states=((1 - sigmas) * latents + sigmas * noise).to(shape.dtype),
        timestep=sigmas.flatten(),
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    loss: torch.Tensor = ((velocity.float() - (noise - latents)) ** 2).flatten(1).mean(1).mean()
    return loss
