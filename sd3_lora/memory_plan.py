"""What training and drawing keep where, so that it fits a budget; and the peak that this will have, part by part.

The peak is the sum of CUDA's own memory, the base's weights, the LoRA with its gradients and optimizer, and the step:
the activations that are kept for backward and the working memory beside them. The step is simulated
(`simulation.py`) on a model with one block of each kind, and put together from there.

Of the measures that leave every number what it is, the fastest that fits is taken: compute k of the n blocks anew, as
few as will do; then let the blocks' weights visit the device (`streaming.py`); then send the blocks' inputs to the host
too. Weights in 4 bits change the numbers, and have to be asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from sd3_lora.base_weights import BasePrecision, base_bytes
from sd3_lora.budget import DeviceBudget
from sd3_lora.checkpointing import checkpoint_blocks
from sd3_lora.command_line import UserError
from sd3_lora.lora import attach_lora, target_modules
from sd3_lora.memory import GIB
from sd3_lora.model_files import ModelFiles
from sd3_lora.simulation import AllocationCounter, round_up, stand_in_for_gpu
from sd3_lora.tensor_files import TensorFiles

import torch
from diffusers import SD3Transformer2DModel

CLIP_TOKENS = 77  # of SD3's CLIPs; T5's tokens follow them
AskedPrecision = Literal["16bit", "nf4", "auto"]
_PRECISIONS: dict[AskedPrecision, list[BasePrecision | None]] = {
    "16bit": [None],
    "nf4": ["nf4"],
    "auto": [None, "nf4"],
}
# cuBLAS keeps a workspace for each stream that multiplies (32 MiB on Hopper, 8 MiB before), here at most two.
WORKSPACE_BYTES = 2 * 32 * 1024**2
# The allocator takes whole pages from the driver, and what lies between tensors stays unused; a second stream, which
# streaming copies on, has pages of its own.
UNUSED_BYTES = 48 * 1024**2
UNUSED_SHARE = 0.005
# How many blocks' inputs are on the device at a time when they are sent to the host: this block's, the one that leaves,
# and in backward the one that arrives.
INPUTS_IN_FLIGHT = 3


@dataclass(frozen=True)
class StepShape:
    """What decides the memory of a training step.

    Attributes:
        batch_size: pictures in a micro-batch.
        resolution: of the crops, in pixels.
        text_tokens: of a prompt, the CLIPs' 77 included.
        layers: that get a LoRA, as `target_modules` takes them.
        blocks: likewise.
        rank: of the LoRA.
        dropout: of the LoRA.
        dtype: of autocast, and of the base where it is not in 4 bits.
        use_8bit_adam: whether the optimizer's state takes 2 bytes a parameter instead of 8.
    """

    batch_size: int
    resolution: int
    text_tokens: int
    layers: Sequence[str] | None
    blocks: Sequence[int] | None
    rank: int
    dropout: float
    dtype: torch.dtype
    use_8bit_adam: bool


@dataclass(frozen=True)
class StepMemory:
    """What a step allocates, in bytes.

    Attributes:
        kept: for each block, the activations that it keeps for backward if it is not computed anew.
        inputs: for each block, what it keeps if it is.
        outside: what is kept by all that is not a block.
        working: the most that backward takes beside what is kept.
        working_anew: the same where every block is computed anew.
        lora: the trained parameters, in float32.
    """

    kept: tuple[int, ...]
    inputs: tuple[int, ...]
    outside: int
    working: int
    working_anew: int
    lora: int

    def peak(self, checkpointed: int, offload_inputs: bool) -> tuple[int, int]:
        """The activations that are kept and the working memory beside them, at the worst moment.

        That is either the end of forward, with the checkpointed blocks' inputs and all that the others keep; or a
        moment of backward when the others' activations are gone: those of one block that was just computed anew, and
        the inputs before it.
        """
        inputs = list(self.inputs[:checkpointed])
        if offload_inputs:
            inputs = sorted(inputs)[-INPUTS_IN_FLIGHT:]
        kept = self.outside + sum(inputs)
        after_forward = kept + sum(self.kept[checkpointed:]), self.working
        if not checkpointed:
            return after_forward
        return max(after_forward, (kept + max(self.kept[:checkpointed]), self.working_anew), key=sum)


@dataclass(frozen=True)
class TrainingPlan:
    """What is kept where.

    Attributes:
        base_precision: nf4, or None for 16 bits (32 under --mixed_precision no).
        checkpointed: how many of the first blocks are computed anew in backward.
        blocks: how many there are.
        streamed: whether the blocks' frozen weights stay on the host and visit the device.
        offload_inputs: whether the checkpointed blocks' inputs are sent to the host until backward.
        parts: the predicted peak in bytes, by part.
    """

    base_precision: BasePrecision | None
    checkpointed: int
    blocks: int
    streamed: bool
    offload_inputs: bool
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The predicted peak."""
        return sum(self.parts.values())

    def sentence(self) -> str:
        """What is kept where, in words."""
        inputs = ", their inputs sent to the host" if self.offload_inputs else ""
        where = _where(self.base_precision, self.streamed)
        return f"{where}; {self.checkpointed} of {self.blocks} blocks computed anew in backward{inputs}"


def plain_plan(blocks: int, asked: AskedPrecision, all_checkpointed: bool) -> TrainingPlan:
    """What is done where there is no budget: all on the device, and no more computed anew than asked for."""
    precision: BasePrecision | None = "nf4" if asked == "nf4" else None
    return TrainingPlan(precision, blocks if all_checkpointed else 0, blocks, False, False, {})


def plan_training(
    files: ModelFiles,
    shape: StepShape,
    budget: DeviceBudget,
    asked: AskedPrecision = "16bit",
    all_checkpointed: bool = False,
    can_stream: bool = True,
) -> TrainingPlan:
    """The fastest plan that fits.

    Args:
        files: the model.
        shape: of the step.
        budget: to stay under.
        asked: 16bit for exact measures alone; nf4; or auto, which takes nf4 rather than stream the exact weights.
        all_checkpointed: whether all blocks are to be computed anew (`--gradient_checkpointing`).
        can_stream: not with several processes.

    Raises:
        UserError: nothing fits; says the smallest budget that would do, and whether nf4 would.
    """
    candidates = list_plans(files, shape, budget, asked, all_checkpointed, can_stream)
    for plan in candidates:
        if plan.peak_bytes <= budget.total_bytes:
            return plan
    smallest = min(plan.peak_bytes for plan in candidates)
    remedy = f"type --vram_budget_gib {_gib_up(smallest)}"
    if asked == "16bit":
        packed = min(plan.peak_bytes for plan in list_plans(files, shape, budget, "nf4", all_checkpointed, can_stream))
        if packed <= budget.total_bytes:
            remedy = "add --base_precision nf4 (less exact), or give it more with --vram_budget_gib"
    raise UserError(
        f"{budget.total_bytes / GIB:.1f} GiB of GPU memory are too little, training takes at least "
        f"{_gib_up(smallest)} GiB here: {remedy}, or lower --resolution or --train_batch_size"
    )


@dataclass(frozen=True)
class DenoisingPlan:
    """What is kept where while pictures are denoised.

    Attributes:
        base_precision: nf4, or None for 16 bits (32 under --mixed_precision no).
        streamed: whether the blocks' weights stay on the host and visit the device.
        parts: the predicted peak in bytes, by part.
    """

    base_precision: BasePrecision | None
    streamed: bool
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The predicted peak."""
        return sum(self.parts.values())

    def sentence(self) -> str:
        """What is kept where, in words."""
        return _where(self.base_precision, self.streamed)


def _where(precision: BasePrecision | None, streamed: bool) -> str:
    base = "in 4 bits (nf4)" if precision else "unchanged"
    return f"base {base}, {'streamed from host memory block by block' if streamed else 'on the device'}"


def plan_denoising(
    files: ModelFiles,
    shape: DenoisingShape,
    budget: DeviceBudget | None,
    asked: AskedPrecision = "16bit",
) -> DenoisingPlan:
    """The fastest plan that fits; everything on the device where there is no budget.

    Args:
        files: the model.
        shape: of a forward.
        budget: to stay under.
        asked: as in `plan_training`.

    Raises:
        UserError: nothing fits; says the smallest budget that would do.
    """
    if budget is None:
        return DenoisingPlan("nf4" if asked == "nf4" else None, False, {})
    resident: list[DenoisingPlan] = []
    streamed: list[DenoisingPlan] = []
    for precision in _PRECISIONS[asked]:
        working = simulate_denoising(files.read_config("transformer"), shape, precision)
        weights = base_bytes(files, shape.dtype, precision, shape.latent_size)
        blocks = block_bytes(files, shape.dtype, precision)
        for is_streamed, found in ((False, resident), (True, streamed)):
            parts = {
                "CUDA": budget.context_bytes,
                "weights": weights + (2 * max(blocks) - sum(blocks) if is_streamed else 0),
                "LoRA": shape.lora_bytes,
                "working memory": working + WORKSPACE_BYTES,
            }
            parts["unused between them"] = _unused(parts, is_streamed)
            found.append(DenoisingPlan(precision, is_streamed, parts))
    for plan in (*resident, *streamed):
        if plan.peak_bytes <= budget.total_bytes:
            return plan
    smallest = _gib_up(min(plan.peak_bytes for plan in (*resident, *streamed)))
    raise UserError(
        f"{budget.total_bytes / GIB:.1f} GiB of GPU memory are too little to denoise a picture, which takes at least "
        f"{smallest} GiB here: type --vram_budget_gib {smallest}, or a smaller --height, --width or --batch_size"
    )


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


def simulate_denoising(config: dict[str, Any], shape: DenoisingShape, precision: BasePrecision | None) -> int:
    """The most bytes that a forward without gradient takes, by a model of the first two blocks and the last."""
    dual = set(config.get("dual_attention_layers") or ())
    count = min(3, config["num_layers"])
    small = {**config, "num_layers": count, "dual_attention_layers": tuple(i for i in range(count) if i in dual)}
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(small)
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            tensor.data = tensor.data.to(shape.dtype)
        size, (height, width) = shape.batch_size, shape.latent_size
        words = {
            "hidden_states": torch.empty(size, config["in_channels"], height, width, dtype=shape.dtype),
            "timestep": torch.empty(size),
            "encoder_hidden_states": torch.empty(
                size, shape.text_tokens, config["joint_attention_dim"], dtype=shape.dtype
            ),
            "pooled_projections": torch.empty(size, config["pooled_projection_dim"], dtype=shape.dtype),
        }
    packed = {id(p) for p in transformer.transformer_blocks.parameters() if p.dim() == 2}
    stand_in_for_gpu(transformer, torch.float32, lambda weight: precision == "nf4" and id(weight) in packed)
    counter = AllocationCounter()
    with torch.no_grad(), counter:
        transformer(**words, return_dict=False)
    inputs = sum(round_up(tensor.nbytes) for tensor in words.values())
    return counter.peak + inputs


def list_plans(
    files: ModelFiles,
    shape: StepShape,
    budget: DeviceBudget,
    asked: AskedPrecision,
    all_checkpointed: bool,
    can_stream: bool,
) -> list[TrainingPlan]:
    """All plans that may be taken, the fastest first."""
    resident: list[TrainingPlan] = []
    streamed: list[TrainingPlan] = []
    for precision in _PRECISIONS[asked]:
        step = simulate_step(files.read_config("transformer"), shape, precision)
        count = len(step.kept)
        most = count if all_checkpointed else count - 1
        weights = base_bytes(files, shape.dtype, precision, (shape.resolution // 8, shape.resolution // 8))
        plan = partial(_predict, step, shape, budget, precision)
        resident += [plan(weights, k) for k in range(most if all_checkpointed else 0, most + 1)]
        if can_stream:
            blocks = block_bytes(files, shape.dtype, precision)
            weights += 2 * max(blocks) - sum(blocks)
            streamed += [plan(weights, most, True, offload) for offload in (False, True)]
    return resident + streamed


def _predict(
    step: StepMemory,
    shape: StepShape,
    budget: DeviceBudget,
    precision: BasePrecision | None,
    weights: int,
    checkpointed: int,
    streamed: bool = False,
    offload_inputs: bool = False,
) -> TrainingPlan:
    """The plan with its peak."""
    # Beside each parameter its gradient, and two moments of the optimizer; 8-bit ones take 2 bytes and their scales.
    of_a_parameter = 4 + 4 + (2.1 if shape.use_8bit_adam else 8)
    activations, working = step.peak(checkpointed, offload_inputs)
    parts = {
        "CUDA": budget.context_bytes,
        "weights": weights,
        "LoRA and optimizer": int(step.lora / 4 * of_a_parameter),
        "activations": activations,
        "working memory": working + WORKSPACE_BYTES,
    }
    parts["unused between them"] = _unused(parts, streamed)
    return TrainingPlan(precision, checkpointed, len(step.kept), streamed, offload_inputs, parts)


def _unused(parts: Mapping[str, int], streamed: bool) -> int:
    return (2 if streamed else 1) * UNUSED_BYTES + int(UNUSED_SHARE * sum(parts.values()))


def block_bytes(files: ModelFiles, dtype: torch.dtype, precision: BasePrecision | None) -> list[int]:
    """The frozen weights of each block, in bytes."""
    files.component("transformer")
    sizes: dict[int, int] = {}
    with TensorFiles(files.weight_files("transformer")) as weights:
        for name, shape in weights.shapes().items():
            if name.startswith("transformer_blocks."):
                packed = precision == "nf4" and len(shape) == 2
                size = shape.numel() * 33 // 64 if packed else shape.numel() * dtype.itemsize  # 0.516 bytes a weight
                index = int(name.split(".")[1])
                sizes[index] = sizes.get(index, 0) + round_up(size)
    return [sizes[index] for index in sorted(sizes)]


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
        transformer = SD3Transformer2DModel.from_config(small)
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            tensor.data = tensor.data.to(shape.dtype)
        blocks = [i for i, kind in enumerate(kinds) if kind.is_trained]
        targets = target_modules(transformer, shape.layers, blocks)
        attach_lora(transformer, targets, shape.rank, float(shape.rank), shape.dropout, 0)
    transformer.train()
    trained_in = {
        kind: sum(p.numel() for p in block.parameters() if p.requires_grad)
        for kind, block in zip(kinds, transformer.transformer_blocks, strict=True)
    }
    frozen = {id(p) for p in transformer.transformer_blocks.parameters() if not p.requires_grad and p.dim() == 2}

    def packed(weight: torch.Tensor) -> bool:
        return precision == "nf4" and id(weight) in frozen

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
    tokens = (shape.resolution // _pixels_a_token(config)) ** 2 + shape.text_tokens
    width = config["num_attention_heads"] * config["attention_head_dim"]
    one_input = shape.batch_size * tokens * width * shape.dtype.itemsize
    outside = max(0, after_forward - sum(kept.values()))

    def memory(blocks: Sequence[_Kind], working: int, working_anew: int) -> StepMemory:
        return StepMemory(
            kept=tuple(kept[kind] for kind in blocks),
            inputs=tuple(0 if kind.is_before_lora else one_input for kind in blocks),
            outside=outside,
            working=working,
            working_anew=working_anew,
            lora=4 * sum(trained_in[kind] for kind in blocks),
        )

    # Which block needs the most beside what is kept, shows when each is computed anew.
    checkpoint_blocks(transformer, len(kinds))
    for block in transformer.transformer_blocks:
        stand_in_for_gpu(block, shape.dtype, packed)
    with AllocationCounter() as anew:
        _forward(transformer, config, shape).backward()
    beside = anew.peak - sum(memory(kinds, 0, 0).peak(len(kinds), False))
    return memory(keys, max(0, counter.peak - after_forward), max(0, beside))


def _pixels_a_token(config: dict[str, Any]) -> int:
    return 8 * int(config["patch_size"])


def _forward(transformer: SD3Transformer2DModel, config: dict[str, Any], shape: StepShape) -> torch.Tensor:
    """The loss of a micro-batch, as `micro_step` has it."""
    side, size = shape.resolution // 8, shape.batch_size
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


def _gib_up(size: int) -> str:
    """GiB with one decimal, rounded up."""
    return f"{-(-size * 10 // GIB) / 10:g}"
