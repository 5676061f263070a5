"""The bytes that a step of training or of drawing allocates: simulated on a model with one block of each kind
(`simulation.py`), and added up for the whole model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sd3_lora.common.memory import round_up
from sd3_lora.common.placement_flags import AttentionKernel
from sd3_lora.common.records import StepInputs
from sd3_lora.gpu.exact_attention import AttentionBackward
from sd3_lora.gpu.packed_tensors import layout
from sd3_lora.gpu.round_trips import Item
from sd3_lora.gpu.simulation import AllocationCounter, stand_in_for_gpu
from sd3_lora.transformer.base_weights import BasePrecision, make_hollow
from sd3_lora.transformer.lora import PLAIN_LORA, LoraKind, attach_lora, require_blocks, target_modules
from sd3_lora.transformer.recompute import recompute_blocks
from sd3_lora.transformer.trained_clips import ClipTraining
from sd3_lora.transformer.velocity import VelocityModel
from sd3_lora.transformer.whole_weights import train_whole

import torch
from diffusers import SD3Transformer2DModel

# How many blocks' inputs are on the device at a time when they are offloaded: this block's, those being offloaded, and
# in backward those being prefetched.
INPUTS_IN_FLIGHT = 3
# What compiled blocks keep for backward, of what plain ones do: 461 of 598 MiB for three of SD3-Medium's on an H200,
# and 3.58 of 4.69 GiB for all 24 on an H100. Normalized queries and keys (SD3.5) are not kept but computed again:
# 5.18 of 7.88 GiB in SD3.5-Medium on an H200, 2.94 of 4.49 in SD3.5-Large at 512 px on an H100.
COMPILED_SHARE, COMPILED_SHARE_QK_NORM = 0.77, 0.66


@dataclass(frozen=True)
class StepShape:
    """What decides the memory of a training step.

    Attributes:
        batch_size: pictures in a micro-batch.
        latent_size: height and width of the largest crops, in latent pixels.
        text_tokens: of a prompt, the CLIPs' included.
        layers: that get a LoRA, as `target_modules` takes them.
        blocks: likewise.
        rank: of the LoRA.
        dropout: of the LoRA.
        dtype: of autocast, and of the base where it is not in 4 bits.
        bytes_per_parameter: of what is trained, with its gradient and the optimizer's state.
        attention_backward: that computes attention's backward pass.
        compiled: whether the blocks are, where they can be.
        kind: of the LoRA.
        longest_side: of all crops, in latent pixels; 0 where none is longer than the largest.
        masked: whether the loss has a weight for each latent pixel.
        prior_rows: of the trained model's batch beside the pictures: those that come once more with a prior prompt.
        base_rows: that the base is given too, without gradient.
        clips: what is trained of the CLIPs, if anything is.
        whole_bytes: of the optimizer's state and of gradients that are kept, where the whole transformer is trained and
            no LoRA; None where there is a LoRA.
        state_of: the optimizer's state of a matrix with so many numbers, without memory: it is streamed with that.
    """

    batch_size: int
    latent_size: tuple[int, int]
    text_tokens: int
    layers: Sequence[str] | None
    blocks: Sequence[int] | None
    rank: int
    dropout: float
    dtype: torch.dtype
    bytes_per_parameter: float
    attention_backward: AttentionBackward = AttentionBackward.TORCH
    compiled: bool = False
    kind: LoraKind = PLAIN_LORA
    longest_side: int = 0
    masked: bool = False
    prior_rows: int = 0
    base_rows: int = 0
    clips: ClipTraining | None = None
    whole_bytes: int | None = None
    state_of: Callable[[int], Item] | None = None

    @property
    def whole(self) -> bool:
        """Whether the whole transformer is trained."""
        return self.whole_bytes is not None

    @property
    def rows(self) -> int:
        """Of the trained model's batch."""
        return self.batch_size + self.prior_rows

    @property
    def enclosing_size(self) -> tuple[int, int]:
        """Height and width in which the crops of every shape lie, in latent pixels."""
        side = max(*self.latent_size, self.longest_side)
        return side, side


@dataclass(frozen=True)
class DenoisingShape:
    """What decides the memory of a forward.

    Attributes:
        batch_size: rows in it: two a picture under guidance.
        latent_size: height and width, in latent pixels.
        text_tokens: of a prompt, the CLIPs' included.
        dtype: of the base and of what it computes in.
        lora_bytes: of the LoRAs' weights, where they stay beside the base's.
        merging_bytes: of merging them into the base's, a layer at a time; 0 where they must stay beside.
        captured: whether the forward is captured as a CUDA graph, which has its own inputs.
    """

    batch_size: int
    latent_size: tuple[int, int]
    text_tokens: int
    dtype: torch.dtype
    lora_bytes: int
    merging_bytes: int = 0
    captured: bool = False


@dataclass(frozen=True)
class StepMemory:
    """What a step allocates, in bytes.

    Attributes:
        kept: for each block, the activations that it keeps for backward if it is not recomputed.
        inputs: for each block, what it keeps if it is.
        outside: what is kept by all that is not a block.
        working: the most that backward allocates beside what is kept.
        working_recomputed: the same where every block is recomputed.
        lora: the trained parameters, in float32.
        clips: the frozen weights of the CLIPs, where these are trained too.
        clip_pieces: those of them that can be streamed, by piece.
    """

    kept: tuple[int, ...]
    inputs: tuple[int, ...]
    outside: int
    working: int
    working_recomputed: int
    lora: int
    clips: int = 0
    clip_pieces: tuple[int, ...] = ()

    def compiled(self, config: Mapping[str, Any]) -> StepMemory:
        """Of compiled blocks: they keep less for backward, and compute what is cheap a second time.

        Args:
            config: of the transformer.
        """
        share = COMPILED_SHARE_QK_NORM if config.get("qk_norm") else COMPILED_SHARE
        return replace(self, kept=tuple(int(share * size) for size in self.kept), working=int(share * self.working))

    def peak(self, recomputed: Sequence[int], offload_inputs: bool) -> tuple[int, int]:
        """The activations that are kept and the working memory beside them, at the worst moment.

        That is either the end of forward, with the recomputed blocks' inputs and all that the others keep; or a moment
        of backward: the activations of one block that was just recomputed, those that the blocks before it keep, and
        the inputs.

        Args:
            recomputed: indices of blocks.
            offload_inputs: whether their inputs are offloaded.
        """
        inputs = [self.inputs[block] for block in recomputed]
        if offload_inputs:
            inputs = sorted(inputs)[-INPUTS_IN_FLIGHT:]
        outside = self.outside + sum(inputs)
        kept = [0 if block in recomputed else size for block, size in enumerate(self.kept)]
        moments = [(outside + sum(kept), self.working)]
        moments += [(outside + sum(kept[:block]) + self.kept[block], self.working_recomputed) for block in recomputed]
        return max(moments, key=sum)


def _packed_weights(
    transformer: SD3Transformer2DModel, precision: BasePrecision | None
) -> Callable[[torch.Tensor], bool]:
    """Whether a weight is held in 4 bits: the blocks' frozen matrices are."""
    frozen = {id(p) for p in transformer.transformer_blocks.parameters() if not p.requires_grad and p.dim() == 2}
    return lambda weight: precision == "nf4" and id(weight) in frozen


def simulate_denoising(
    config: dict[str, Any],
    shape: DenoisingShape,
    precision: BasePrecision | None,
    attention_kernel: AttentionKernel | None = None,
) -> int:
    """The most bytes that a forward without gradient allocates, by a model of the first two blocks and the last."""
    dual = set(config.get("dual_attention_layers") or ())
    count = min(3, config["num_layers"])
    small = {**config, "num_layers": count, "dual_attention_layers": tuple(i for i in range(count) if i in dual)}
    with torch.device("meta"):
        transformer = make_hollow(small, shape.dtype)
        size, (height, width) = shape.batch_size, shape.latent_size
        arguments = {
            "hidden_states": torch.empty(size, config["in_channels"], height, width, dtype=shape.dtype),
            "timestep": torch.empty(size),
            "encoder_hidden_states": torch.empty(
                size, shape.text_tokens, config["joint_attention_dim"], dtype=shape.dtype
            ),
            "pooled_projections": torch.empty(size, config["pooled_projection_dim"], dtype=shape.dtype),
        }
    stand_in_for_gpu(transformer, torch.float32, _packed_weights(transformer, precision), attention_kernel)
    counter = AllocationCounter()
    with torch.no_grad(), counter:
        transformer(**arguments, return_dict=False)
    inputs = sum(round_up(tensor.nbytes) for tensor in arguments.values())
    return counter.peak + (2 if shape.captured else 1) * inputs


Step = Callable[[VelocityModel, StepInputs], torch.Tensor]  # → the loss of a micro-batch


class _Kind(NamedTuple):
    """What decides how much a block allocates."""

    is_before_lora: bool
    is_first_with_lora: bool
    is_dual: bool
    is_trained: bool
    is_last: bool


class _SmallModel:
    """A hollow model with one block of each kind, and a LoRA.

    Args:
        config: of the whole transformer.
        shape: of the step.
        precision: of the base.
        attention_kernel: that computes attention.

    Attributes:
        kinds: of the whole transformer's blocks.
        distinct: the kinds, each once: those of this model's blocks.
        transformer: with its LoRA, in training mode.
    """

    def __init__(
        self,
        config: dict[str, Any],
        shape: StepShape,
        precision: BasePrecision | None,
        attention_kernel: AttentionKernel | None,
    ):
        self._config, self._shape, self._attention_kernel = config, shape, attention_kernel
        self.kinds = _kinds_of_blocks(config, shape.blocks, shape.clips is not None or shape.whole)
        self.distinct = list(dict.fromkeys(self.kinds))
        small = {**config, "num_layers": len(self.distinct)}
        small["dual_attention_layers"] = tuple(i for i, kind in enumerate(self.distinct) if kind.is_dual)
        with torch.device("meta"):
            self.transformer = make_hollow(small, shape.dtype)
            if shape.whole:
                self._train_whole()
            else:
                trained = [i for i, kind in enumerate(self.distinct) if kind.is_trained]
                targets = target_modules(self.transformer, shape.layers, trained)
                attach_lora(self.transformer, targets, shape.rank, float(shape.rank), shape.dropout, 0, shape.kind)
        self.transformer.train()
        self.clips = shape.clips.hollow(shape.dtype) if shape.clips else None
        self._packed = _packed_weights(self.transformer, precision)
        self._stand_in(self.transformer)

    def _train_whole(self) -> None:
        """All weights, whose gradients go as soon as they have been applied."""

        def apply(parameter: torch.nn.Parameter) -> None:
            parameter.grad = None

        for parameter in train_whole(self.transformer):
            parameter.register_post_accumulate_grad_hook(apply)

    def _stand_in(self, module: torch.nn.Module) -> None:
        shape = self._shape
        stand_in_for_gpu(module, shape.dtype, self._packed, self._attention_kernel, shape.attention_backward)

    @property
    def trained_parameters(self) -> dict[_Kind, int]:
        """How many a block of each kind has."""
        return {
            kind: sum(p.numel() for p in block.parameters() if p.requires_grad)
            for kind, block in zip(self.distinct, self.transformer.transformer_blocks, strict=True)
        }

    def recompute(self) -> None:
        """Recomputes every block from now on."""
        recompute_blocks(self.transformer, range(len(self.distinct)))
        for block in self.transformer.transformer_blocks:
            self._stand_in(block)

    def loss(self, step: Step) -> torch.Tensor:
        """Of a hollow micro-batch."""
        model = VelocityModel(self.transformer, self._shape.dtype, clips=self.clips)
        return step(model, _hollow_inputs(self._config, self._shape))


def _kinds_of_blocks(
    config: Mapping[str, Any], blocks: Sequence[int] | None, is_input_trained: bool = False
) -> list[_Kind]:
    """The kind of each block, where `blocks` get a LoRA (None for all); blocks of one kind allocate the same.

    Nothing is kept for backward before the first LoRA, and little in its block, whose input needs no gradient; unless
    the prompts' embeddings need one.
    """
    count = config["num_layers"]
    dual = set(config.get("dual_attention_layers") or ())
    require_blocks(blocks, count)  # the small model would not miss one
    trained = set(range(count) if blocks is None else blocks)
    first = -1 if is_input_trained else min(trained)
    return [_Kind(i < first, i == first, i in dual, i in trained, i == count - 1) for i in range(count)]


@dataclass(frozen=True)
class _StepBytes:
    """What one step allocates.

    Attributes:
        kept: by a block of each kind, for backward.
        after_forward: all that is allocated then.
        peak: of forward and backward.
    """

    kept: dict[_Kind, int]
    after_forward: int
    peak: int


def _count_step(model: _SmallModel, step: Step) -> _StepBytes:
    """Counts what a step allocates whose blocks are not recomputed."""
    counter = AllocationCounter()
    # Before each block and after the last, when what is not kept of the block before has been freed.
    allocated: list[int] = []

    def note(*_: object) -> None:
        if torch.is_grad_enabled():  # the base's own pass keeps nothing
            allocated.append(counter.now)

    hooks = [
        module.register_forward_pre_hook(note)
        for module in (*model.transformer.transformer_blocks, model.transformer.norm_out)
    ]
    with counter:
        loss = model.loss(step)
        after_forward = counter.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    kept = [after - before for before, after in itertools.pairwise(allocated)]
    return _StepBytes(dict(zip(model.distinct, kept, strict=True)), after_forward, counter.peak)


def simulate_step(
    config: dict[str, Any],
    shape: StepShape,
    precision: BasePrecision | None,
    step: Step,
    attention_kernel: AttentionKernel | None = None,
) -> StepMemory:
    """Runs a training step of a model with one block of each kind, on tensors that have no memory.

    Args:
        config: of the transformer.
        shape: of the step.
        precision: of the base.
        step: the same function that trains.
        attention_kernel: that computes attention.
    """
    model = _SmallModel(config, shape, precision, attention_kernel)
    trained = model.trained_parameters
    of_clips = sum(p.numel() for p in model.clips.parameters() if p.requires_grad) if model.clips else 0
    counted = _count_step(model, step)
    tokens = image_tokens(config, shape.latent_size) + shape.text_tokens
    width = config["num_attention_heads"] * config["attention_head_dim"]
    input_bytes = shape.rows * tokens * width * shape.dtype.itemsize

    def memory(kinds: Sequence[_Kind], working: int, working_recomputed: int) -> StepMemory:
        return StepMemory(
            kept=tuple(counted.kept[kind] for kind in kinds),
            inputs=tuple(0 if kind.is_before_lora else input_bytes for kind in kinds),
            outside=max(0, counted.after_forward - sum(counted.kept.values())),
            working=working,
            working_recomputed=working_recomputed,
            lora=0 if shape.whole else 4 * (sum(trained[kind] for kind in kinds) + of_clips),
            clips=model.clips.frozen_bytes if model.clips else 0,
            clip_pieces=tuple(layout(piece.weights)[-1] for piece in model.clips.pieces()) if model.clips else (),
        )

    # The most that one block needs beside what is kept: the peak when each is recomputed.
    model.recompute()
    with AllocationCounter() as recomputing:
        model.loss(step).backward()
    every = range(len(model.distinct))
    beside = recomputing.peak - sum(memory(model.distinct, 0, 0).peak(every, False))
    return memory(model.kinds, max(0, counted.peak - counted.after_forward), max(0, beside))


def image_tokens(config: Mapping[str, Any], latent_size: tuple[int, int]) -> int:
    """How many tokens the transformer makes of a picture's latents."""
    height, width = latent_size
    patch: int = config["patch_size"]
    return (height // patch) * (width // patch)


def _shape_of_places(shape: StepShape) -> tuple[int, ...]:
    """That of `StepInputs.clip_places`."""
    return (shape.rows, 2, shape.clips.states_shape[0]) if shape.clips and shape.clips.vectors else (0,)


def _hollow_inputs(config: Mapping[str, Any], shape: StepShape) -> StepInputs:
    """A micro-batch on the meta device."""
    size = shape.batch_size
    with torch.device("meta"):
        latents = torch.empty(size, config["in_channels"], *shape.latent_size)
        return StepInputs(
            latents=latents,
            noise=torch.empty_like(latents),
            sigmas=torch.empty(size, 1, 1, 1),
            timesteps=torch.empty(shape.rows),
            prompt_embeds=torch.empty(shape.rows, shape.text_tokens, config["joint_attention_dim"], dtype=shape.dtype),
            pooled_prompt_embeds=torch.empty(shape.rows, config["pooled_projection_dim"], dtype=shape.dtype),
            loss_weights=torch.empty(size, 1, *shape.latent_size) if shape.masked else torch.empty(size),
            prior_rows=torch.empty(shape.prior_rows, dtype=torch.long),
            clip_states=torch.empty(shape.rows, *(shape.clips.states_shape if shape.clips else ()), dtype=shape.dtype),
            clip_ends=torch.empty(shape.rows, 2, dtype=torch.long),
            clip_kept=torch.empty(shape.rows, 2),
            clip_places=torch.empty(*_shape_of_places(shape), dtype=torch.long),
        )
