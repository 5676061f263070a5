"""How the three text encoders run on a device, and how much of its memory they need.

A plan has a precision, T5 whole or streamed, and a number of prompts in one forward. It is what the user asked for, as
fast as the budget allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from sd3_lora.common.command_line import UserError
from sd3_lora.common.devices import DTYPES
from sd3_lora.common.memory import GIB, available_host_bytes
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.gpu.budget import DeviceBudget, at_most_gib, enough_gib, too_small
from sd3_lora.gpu.simulation import AllocationCounter, stand_in_for_gpu
from sd3_lora.stage_one.t5_halves import half_bytes, set_dtypes

import torch

T5Precision = Literal["int8", "nf4", "fp16", "fp32"]
BATCH_SIZE = 8  # prompts in one forward of T5: enough to keep even a large GPU busy
# A host that needs 30 µs to launch a kernel is slower than the GPU: where there is memory, fewer and larger batches.
LARGE_BATCH_SIZE = 32
# A CLIP is small for a GPU, and a streamed CLIP is copied to it once for each batch: it takes so many times T5's batch,
# up to 32 prompts. Their hidden states, which are all kept, still need less memory than T5.
CLIP_BATCHES = 4
CLIP_BATCH_SIZE = CLIP_BATCHES * BATCH_SIZE
# cuBLAS' workspace (32 MiB on Hopper, 8 MiB before), and unused parts of the allocator's pages.
_MARGIN_BYTES = 80 * 1024**2
# An H100 held 0.54 GiB beside streamed weights for 8 prompts of 256 tokens, where 0.28 were simulated.
_KERNELS_SHARE = 2
# While resident encoders are loaded, the conversion of a weight needs temporary memory, which the allocator keeps: an
# H100 held 0.44 GiB beside T5's weights in int8.
_LOADING_BYTES = 7 * GIB // 20


@dataclass(frozen=True)
class TextEncoderPlan:
    """How the encoders run.

    Attributes:
        t5_precision: of T5's weights; fp16 keeps the `wo` projections in fp32, where its activations overflow fp16.
        t5_stream: whether the encoders are streamed: half a block of T5 on the device at a time, one layer of a CLIP.
        max_sequence_length: T5 tokens, 1 to 512.
        device: where they run.
        batch_size: prompts in one forward of T5. With another size kernels round differently (by 1e-6), so streamed and
            resident embeddings are equal only for equal sizes.
        kept_prompts: a streamed T5's hidden states of so many prompts stay on the device between half blocks, instead
            of being offloaded to the host; 0 for none.
        whole_clips: whether the CLIPs are on the device whole although T5 is streamed; else they are streamed again
            for each batch.
    """

    t5_precision: T5Precision
    t5_stream: bool
    max_sequence_length: int
    device: torch.device
    batch_size: int = BATCH_SIZE
    kept_prompts: int = 0
    whole_clips: bool = False

    @property
    def clip_batch_size(self) -> int:
        """Prompts in one forward of a CLIP."""
        return min(CLIP_BATCH_SIZE, CLIP_BATCHES * self.batch_size)

    @property
    def clip_dtype(self) -> torch.dtype:
        """The CLIPs run in fp16 on a GPU, unless T5 is to be exact; a CPU has no fast fp16."""
        return torch.float32 if self.t5_precision == "fp32" or self.device.type == "cpu" else torch.float16

    def predicted_parts(self, files: ModelFiles, budget: DeviceBudget) -> dict[str, int]:
        """Bytes of each part of the predicted peak: CUDA's own, the largest resident weights, and working memory."""
        cuda = {"CUDA": budget.context_bytes}
        parts = cuda | {"text encoder": encoder_bytes(files, self), "working memory": working_bytes(files, self)}
        if self.kept_prompts:
            parts["hidden states"] = hidden_bytes(files, self, self.kept_prompts)
        if not self.whole_clips:
            return parts
        clips = cuda | {"text encoder": clip_bytes(files, self), "working memory": clip_working_bytes(files, self)}
        return max(parts, clips, key=lambda each: sum(each.values()))


@dataclass(frozen=True)
class TextWork:
    """What the text encoders are to do, and what the user asked for.

    Attributes:
        max_sequence_length: T5 tokens of a prompt.
        t5_precision: `--t5_precision`; None for the default: `existing_precision`, else int8 on a GPU and fp32 on a
            CPU, and fp16 where T5 is streamed.
        t5_stream: `--t5_stream`.
        existing_precision: T5's in an embeddings file that is kept; None without such a file.
        prompts: the most that are encoded together; the hidden states of a streamed T5 stay on a GPU if they fit.
    """

    max_sequence_length: int
    t5_precision: T5Precision | None = None
    t5_stream: bool = False
    existing_precision: str | None = None
    prompts: int = 0

    def precision_on(self, device: torch.device) -> Any:
        """T5's precision on a device.

        Raises:
            UserError: a quantized T5 cannot be streamed.
        """
        default = "fp16" if self.t5_stream else "int8" if device.type == "cuda" else "fp32"
        precision = self.t5_precision or self.existing_precision or default
        if self.t5_stream and precision in ("int8", "nf4"):
            raise UserError(f"--t5_stream reads fp16 or fp32 weights, not {precision}: add --t5_precision fp16")
        return precision


def choose_text_encoder_plan(
    files: ModelFiles,
    work: TextWork,
    device: torch.device,
    budget: DeviceBudget | None,
    log: Callable[[str], None] = print,
) -> TextEncoderPlan:
    """The plan that was asked for, or the default, made to fit the device.

    As many prompts are encoded together as fit: on a GPU up to 32, else 8. A streamed T5 with too little room for 8
    takes 4, 2 or 1.

    Args:
        files: the model.
        work: what is to be done.
        device: where to run.
        budget: what may be used of the device; None, on a CPU alone, for the memory that is available.
        log: gets a line where the plan differs from the default.

    Raises:
        UserError: a quantized T5 cannot be streamed; a length that T5 was not trained for; a budget that not even
            streaming fits.
    """
    if not 1 <= work.max_sequence_length <= 512:
        raise UserError(f"--max_sequence_length {work.max_sequence_length} is not between 1 and 512: type 77 or 256")
    precision = work.precision_on(device)
    plan = TextEncoderPlan(precision, work.t5_stream, work.max_sequence_length, device)
    free = budget.tensor_bytes if budget else available_host_bytes()
    if not work.t5_stream:
        for candidate in (_in_large_batches(plan, work.prompts), plan):
            needed = encoder_bytes(files, candidate) + working_bytes(files, candidate)
            if needed <= free:
                return candidate
        shortage = f"T5 in {precision} takes {enough_gib(needed)} GiB and {at_most_gib(free)} GiB are free"
        if precision == "nf4":
            raise UserError(f"{shortage}: type --t5_precision fp16 --t5_stream")
        if precision == "int8":
            exact: T5Precision = "fp16" if device.type == "cuda" else "fp32"
            log(f"{shortage}: streaming it in {exact}, one block at a time (--t5_stream)")
            plan = replace(plan, t5_precision=exact, t5_stream=True)
        else:  # the same numbers; also what continues a file that a streamed T5 began
            log(f"{shortage}: streaming it, one block at a time (--t5_stream)")
            plan = replace(plan, t5_stream=True)
    return _within(plan, files, budget, work.prompts) if budget else plan


def choose_clip_plan(
    files: ModelFiles, work: TextWork, device: torch.device, budget: DeviceBudget | None
) -> TextEncoderPlan:
    """The plan of the two CLIPs where T5 does not run: whole if they fit, else streamed, with fewer prompts at a time.

    Args:
        files: the model; nothing of T5 is read.
        work: what is to be done. Where T5 is exact, in fp32, so are the CLIPs.
        device: where to run.
        budget: what may be used of the device; None, on a CPU alone, for the memory that is available.

    Raises:
        UserError: a budget that not even one prompt at a time fits.
    """
    is_exact = (work.t5_precision or work.existing_precision) == "fp32"
    plan = TextEncoderPlan("fp32" if is_exact else "fp16", work.t5_stream, work.max_sequence_length, device)
    free = budget.tensor_bytes if budget else available_host_bytes()
    if not work.t5_stream and clip_bytes(files, plan) + clip_working_bytes(files, plan) <= free:
        return plan
    plan = replace(plan, t5_stream=True)
    largest = max(max(sizes) for sizes in _clip_sizes(files, plan))
    while budget and largest + clip_working_bytes(files, plan) > free:
        if plan.batch_size == 1:
            raise too_small("encoding with a CLIP", budget.context_bytes + largest + clip_working_bytes(files, plan))
        plan = replace(plan, batch_size=plan.batch_size // 2)
    return plan


def _in_large_batches(plan: TextEncoderPlan, prompts: int) -> TextEncoderPlan:
    """The plan with as large batches as so many prompts fill; a CPU gains nothing by them."""
    size = min(LARGE_BATCH_SIZE, -(-prompts // BATCH_SIZE) * BATCH_SIZE)
    return replace(plan, batch_size=size) if size > BATCH_SIZE and plan.device.type == "cuda" else plan


def _within(plan: TextEncoderPlan, files: ModelFiles, budget: DeviceBudget, prompts: int) -> TextEncoderPlan:
    """A streaming plan as fast as the budget allows.

    Raises:
        UserError: not even one prompt at a time fits.
    """

    def peak(of: TextEncoderPlan) -> int:
        return sum(of.predicted_parts(files, budget).values())

    while peak(plan) > budget.total_bytes:
        if plan.batch_size == 1:
            raise too_small(f"T5 in {describe_t5(plan)}", peak(plan))
        plan = replace(plan, batch_size=plan.batch_size // 2)
    if plan.device.type == "cuda" and plan.batch_size == BATCH_SIZE:
        # By the time that they save. With few prompts a CLIP is copied to the device once in any case.
        for faster in (
            lambda plan: replace(plan, kept_prompts=prompts),
            lambda plan: replace(plan, whole_clips=prompts > CLIP_BATCH_SIZE),
            lambda plan: _in_large_batches(plan, prompts),
        ):
            candidate = faster(plan)
            if candidate != plan and peak(candidate) <= budget.total_bytes:  # only now: simulating a peak takes time
                plan = candidate
    return plan


def hidden_bytes(files: ModelFiles, plan: TextEncoderPlan, prompts: int) -> int:
    """Bytes of so many prompts' hidden states between T5's halves: float32 after the first `wo`."""
    width = files.read_config("text_encoder_3")["d_model"]
    return prompts * plan.max_sequence_length * width * torch.float32.itemsize


def encoder_bytes(files: ModelFiles, plan: TextEncoderPlan) -> int:
    """Bytes of the most weights that are on the device at once, from the shapes in the files' headers.

    - Resident: the largest encoder.
    - Streamed: T5's largest half block, or a CLIP's largest matrix.
    """
    if plan.t5_stream:
        t5 = half_bytes(empty_t5(files, DTYPES[plan.t5_precision]).block)
        return max(t5, *(max(sizes) for sizes in _clip_sizes(files, plan)))
    return max(t5_device_bytes(files, plan.t5_precision), clip_bytes(files, plan))


def clip_bytes(files: ModelFiles, plan: TextEncoderPlan) -> int:
    """Bytes of the larger CLIP's weights."""
    return max(sum(sizes) for sizes in _clip_sizes(files, plan))


def _clip_sizes(files: ModelFiles, plan: TextEncoderPlan) -> list[list[int]]:
    """Bytes of each weight of each CLIP, from the shapes in the files' headers."""
    sizes = []
    for component in ("text_encoder", "text_encoder_2"):
        shapes = files.tensor_shapes(component).values()
        sizes.append([plan.clip_dtype.itemsize * shape.numel() for shape in shapes])
    return sizes


def clip_working_bytes(files: ModelFiles, plan: TextEncoderPlan) -> int:
    """Bytes of a batch beside the larger CLIP's weights: every layer's hidden states, and the work of one layer."""
    from transformers import CLIPTextConfig  # takes seconds, and is needed where a prompt is encoded

    config = CLIPTextConfig.from_dict(files.read_config("text_encoder_2"))
    tokens = plan.clip_batch_size * config.max_position_embeddings
    states = tokens * config.hidden_size * plan.clip_dtype.itemsize
    # Within a layer: its input and the norm of it; queries, keys, values and attention's output. Then the wider tensors
    # of the feed-forward, before and after the activation, and one more while the activation computes.
    inside = 6 * states + 3 * tokens * config.intermediate_size * plan.clip_dtype.itemsize
    return (config.num_hidden_layers + 1) * states + inside + _MARGIN_BYTES + _LOADING_BYTES


def working_bytes(files: ModelFiles, plan: TextEncoderPlan) -> int:
    """Bytes of a batch beside the weights: one of T5's blocks, simulated. The CLIPs need less."""
    dtype = torch.float32 if plan.t5_precision == "fp32" else torch.float16
    encoder = empty_t5(files, dtype)
    width = files.read_config("text_encoder_3")["d_model"]
    with torch.device("meta"):
        hidden = torch.empty(plan.batch_size, plan.max_sequence_length, width)  # float32 after the first `wo`
    block = encoder.block[0]
    stand_in_for_gpu(block, torch.float32)
    with torch.no_grad(), AllocationCounter() as counter:
        block(hidden)
    return hidden.nbytes + _KERNELS_SHARE * counter.peak + _MARGIN_BYTES + (0 if plan.t5_stream else _LOADING_BYTES)


def empty_t5(files: ModelFiles, dtype: torch.dtype) -> Any:
    """T5's encoder on the meta device, in the dtypes in which it is loaded."""
    from transformers import T5Config, T5EncoderModel  # takes seconds, and is needed where a prompt is encoded

    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config.from_dict(files.read_config("text_encoder_3"))).eval().encoder
    set_dtypes(encoder.block, dtype)
    return encoder


def t5_device_bytes(files: ModelFiles, precision: str) -> int:
    """Bytes of T5's weights on the device, from the shapes in its files' headers."""
    return sum(_t5_tensor_bytes(files, precision).values())


def _t5_tensor_bytes(files: ModelFiles, precision: str) -> dict[str, int]:
    """Bytes of each of T5's weights on the device, by name."""
    per_weight = {"int8": 1.0, "nf4": 0.5625, "fp16": 2.0, "fp32": 4.0}[precision]
    sizes = {}
    for key, shape in files.tensor_shapes("text_encoder_3").items():
        if key.endswith(".wo.weight"):
            each = 4.0  # kept in fp32 whatever the precision
        elif "block" in key and "norm" not in key and "bias" not in key:
            each = per_weight
        else:
            each = max(per_weight, 2.0)
        sizes[key] = int(each * shape.numel())
    return sizes


def describe_t5(plan: TextEncoderPlan) -> str:
    """The precision, and how T5 is streamed: "fp16, one block at a time"."""
    if not plan.t5_stream:
        return plan.t5_precision
    few = f", {plan.batch_size} prompt{'s'[: plan.batch_size - 1]} at a time" if plan.batch_size < BATCH_SIZE else ""
    return f"{plan.t5_precision}, one block at a time{few}"
