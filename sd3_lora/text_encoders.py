"""The three text encoders of SD3: loaded one at a time, used, freed.

Shapes: N prompts, B prompts of a batch, T T5 tokens, S = 77 + T text tokens, D joint attention width (T5's),
P pooled width (the two CLIPs' projections side by side).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from sd3_lora.budget import DeviceBudget, too_small
from sd3_lora.command_line import UserError
from sd3_lora.devices import DTYPES
from sd3_lora.memory import GIB, StageReport, memory_stage
from sd3_lora.model_files import ModelFiles
from sd3_lora.read_ahead import read_ahead
from sd3_lora.simulation import AllocationCounter, stand_in_for_gpu
from sd3_lora.t5_halves import half_bytes, read_halves, set_dtypes
from sd3_lora.tensor_files import TensorFiles

import psutil
import torch
from accelerate import cpu_offload
from tqdm import tqdm
from transformers import (
    BitsAndBytesConfig,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

T5Precision = Literal["int8", "nf4", "fp16", "fp32"]
BATCH_SIZE = 8  # prompts in one forward of T5: with 77 tokens each they keep even a large GPU busy
# But a host that takes 30 µs to start a kernel does not keep up with it: where there is room, fewer and larger batches.
LARGE_BATCH_SIZE = 32
# The CLIPs are small for a GPU, and a streamed one is copied to it whole for each batch: so many times as many prompts
# as T5 takes, up to 32. Those, and CLIP-G's hidden states, which are all kept, still take less than T5 does.
CLIP_BATCHES = 4
CLIP_BATCH_SIZE = CLIP_BATCHES * BATCH_SIZE
# cuBLAS' workspace (32 MiB on Hopper, 8 MiB before), and what the allocator's pages leave unused.
_MARGIN_BYTES = 80 * 1024**2
# An H100 held 0.54 GiB beside streamed weights for 8 prompts of 256 tokens, where 0.28 were simulated.
_KERNELS_SHARE = 2
# Beside encoders that are resident also what the conversion of one weight takes for a moment, and leaves unused: an
# H100 held 0.44 GiB beside T5's weights in int8.
_LOADING_BYTES = 7 * GIB // 20
_FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class TextEncoderPlan:
    """How the encoders run.

    Attributes:
        t5_precision: of T5's weights; fp16 keeps the `wo` projections in fp32, where its activations overflow fp16.
        t5_stream: whether half a block of T5 is on the device at a time, and one layer of the CLIPs.
        max_sequence_length: T5 tokens, 1 to 512.
        device: where they run.
        batch_size: prompts in one forward of T5. Kernels round differently for another one (by 1e-6), so the answers
            are those of resident encoders with the same; the last batch has always been smaller.
        kept_prompts: of so many prompts a streamed T5's hidden states stay on the device from half block to half block,
            instead of going to the host and back; 0 for none.
        whole_clips: whether the CLIPs are on the device whole though T5 is streamed; else they come again for each
            batch.
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
        """The parts of the peak, in bytes: CUDA's own, the largest that is resident of an encoder, and the rest."""
        cuda = {"CUDA": budget.context_bytes}
        parts = cuda | {"text encoder": encoder_bytes(files, self), "working memory": working_bytes(files, self)}
        if self.kept_prompts:
            parts["hidden states"] = hidden_bytes(files, self, self.kept_prompts)
        if not self.whole_clips:
            return parts
        clips = cuda | {"text encoder": clip_bytes(files, self), "working memory": clip_working_bytes(files, self)}
        return max(parts, clips, key=lambda found: sum(found.values()))


def choose_text_encoder_plan(
    files: ModelFiles,
    device: torch.device,
    budget: DeviceBudget | None,
    max_sequence_length: int,
    asked: T5Precision | None,
    stream: bool,
    kept: str | None = None,
    prompts: int = 0,
    say: Callable[[str], None] = print,
) -> TextEncoderPlan:
    """The plan that was asked for, or the default, made to fit the device.

    As many prompts go through at a time as fit: on a GPU up to 32, else 8, and where a streamed T5 has too little
    room for these 4, 2 or 1.

    Args:
        files: the model.
        device: where to run.
        budget: what may be used of the device; None, on a CPU alone, for the memory that is available.
        max_sequence_length: T5 tokens.
        asked: `--t5_precision`, None for the default: the `kept` one, else int8 on a GPU and fp32 on a CPU.
        stream: `--t5_stream`.
        kept: the precision of an embeddings file that exists already.
        prompts: the most that are encoded together; those of a streamed T5 stay on a GPU if they fit.
        say: told why the plan differs from the default.

    Raises:
        UserError: a quantized T5 cannot be streamed; a length that T5 was not trained for; a budget that not even
            streaming fits.
    """
    if not 1 <= max_sequence_length <= 512:
        raise UserError(f"--max_sequence_length {max_sequence_length} is not between 1 and 512: type 77 or 256")
    precision: Any = asked or kept or ("fp16" if stream else "int8" if device.type == "cuda" else "fp32")
    if stream and precision in ("int8", "nf4"):
        raise UserError(f"--t5_stream reads fp16 or fp32 weights, not {precision}: add --t5_precision fp16")
    plan = TextEncoderPlan(precision, stream, max_sequence_length, device)
    free = budget.tensor_bytes if budget else psutil.virtual_memory().available
    if not stream:
        for candidate in (_in_large_batches(plan, prompts), plan):
            needed = encoder_bytes(files, candidate) + working_bytes(files, candidate)
            if needed <= free:
                return candidate
        shortage = f"T5 in {precision} takes {needed / GIB:.1f} GiB and {free / GIB:.1f} GiB are left for it"
        if precision == "nf4":
            raise UserError(f"{shortage}: type --t5_precision fp16 --t5_stream")
        if precision == "int8":
            exact: T5Precision = "fp16" if device.type == "cuda" else "fp32"
            say(f"{shortage}: streaming it in {exact}, one block at a time (--t5_stream)")
            plan = replace(plan, t5_precision=exact, t5_stream=True)
        else:  # the same numbers; also what goes on with a file that was streamed before
            say(f"{shortage}: streaming it, one block at a time (--t5_stream)")
            plan = replace(plan, t5_stream=True)
    return _within(plan, files, budget, prompts) if budget else plan


def _in_large_batches(plan: TextEncoderPlan, prompts: int) -> TextEncoderPlan:
    """The plan for so many prompts, for a device that has room; a CPU gains nothing by it."""
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
        # What saves time, the most of it first. Of few prompts a CLIP comes to the device once either way.
        for faster in (
            lambda plan: replace(plan, kept_prompts=prompts),
            lambda plan: replace(plan, whole_clips=prompts > CLIP_BATCH_SIZE),
            lambda plan: _in_large_batches(plan, prompts),
        ):
            if peak(faster(plan)) <= budget.total_bytes:
                plan = faster(plan)
    return plan


def hidden_bytes(files: ModelFiles, plan: TextEncoderPlan, prompts: int) -> int:
    """What so many prompts' hidden states take between T5's halves: float32 after the first `wo`."""
    width = files.read_config("text_encoder_3")["d_model"]
    return prompts * plan.max_sequence_length * width * torch.float32.itemsize


def encoder_bytes(files: ModelFiles, plan: TextEncoderPlan) -> int:
    """The most weights that are on the device at once, from the shapes in the files' headers.

    Of encoders that are resident, the largest encoder; of streamed ones, T5's largest half block or a CLIP's largest
    matrix. A streamed T5's are larger than any matrix of CLIPs that come whole.
    """
    if plan.t5_stream:
        t5 = half_bytes(_empty_t5(files, DTYPES[plan.t5_precision]).block)
        return max(t5, *(max(sizes) for sizes in _clip_sizes(files, plan)))
    return max(t5_device_bytes(files, plan.t5_precision), clip_bytes(files, plan))


def clip_bytes(files: ModelFiles, plan: TextEncoderPlan) -> int:
    """The larger CLIP's weights."""
    return max(sum(sizes) for sizes in _clip_sizes(files, plan))


def _clip_sizes(files: ModelFiles, plan: TextEncoderPlan) -> list[list[int]]:
    """For each CLIP, what each of its weights takes, from the shapes in the files' headers."""
    found = []
    for component in ("text_encoder", "text_encoder_2"):
        files.component(component)
        with TensorFiles(files.weight_files(component)) as weights:
            found.append([plan.clip_dtype.itemsize * shape.numel() for shape in weights.shapes().values()])
    return found


def clip_working_bytes(files: ModelFiles, plan: TextEncoderPlan) -> int:
    """What a batch takes beside the larger CLIP's weights: every layer's hidden states, and its way through one."""
    config = CLIPTextConfig.from_dict(files.read_config("text_encoder_2"))
    tokens = plan.clip_batch_size * config.max_position_embeddings
    states = tokens * config.hidden_size * plan.clip_dtype.itemsize
    # Within a layer: what came in and its norm; queries, keys, values, and what attention makes of them; then twice
    # as wide as the layer is inside, before and after the activation, which has one more of them while it computes.
    inside = 6 * states + 3 * tokens * config.intermediate_size * plan.clip_dtype.itemsize
    return (config.num_hidden_layers + 1) * states + inside + _MARGIN_BYTES + _LOADING_BYTES


def working_bytes(files: ModelFiles, plan: TextEncoderPlan) -> int:
    """What a batch takes beside the weights: its way through one of T5's blocks, simulated; the CLIPs are smaller."""
    dtype = torch.float32 if plan.t5_precision == "fp32" else torch.float16
    encoder = _empty_t5(files, dtype)
    width = files.read_config("text_encoder_3")["d_model"]
    with torch.device("meta"):
        hidden = torch.empty(plan.batch_size, plan.max_sequence_length, width)  # float32 after the first `wo`
    block = encoder.block[0]
    stand_in_for_gpu(block, torch.float32)
    with torch.no_grad(), AllocationCounter() as counter:
        block(hidden)
    return hidden.nbytes + _KERNELS_SHARE * counter.peak + _MARGIN_BYTES + (0 if plan.t5_stream else _LOADING_BYTES)


def _empty_t5(files: ModelFiles, dtype: torch.dtype) -> Any:
    """T5's encoder without weights, in the dtypes that it is loaded in."""
    files.component("text_encoder_3")  # downloaded now, if need be
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config.from_dict(files.read_config("text_encoder_3"))).eval().encoder
    set_dtypes(encoder.block, dtype)
    return encoder


def t5_device_bytes(files: ModelFiles, precision: str) -> int:
    """What T5's weights take on the device, from the shapes in its files' headers."""
    return sum(_t5_tensor_bytes(files, precision).values())


def _t5_tensor_bytes(files: ModelFiles, precision: str) -> dict[str, int]:
    """By name, what each of T5's weights takes on the device."""
    per_weight = {"int8": 1.0, "nf4": 0.5625, "fp16": 2.0, "fp32": 4.0}[precision]
    files.component("text_encoder_3")  # downloaded now, if need be: without its files nothing would seem to fit
    sizes = {}
    with TensorFiles(files.weight_files("text_encoder_3")) as weights:
        for key, shape in weights.shapes().items():
            if key.endswith(".wo.weight"):
                each = 4.0  # kept in fp32 whatever the precision
            elif "block" in key and "norm" not in key and "bias" not in key:
                each = per_weight
            else:
                each = max(per_weight, 2.0)
            sizes[key] = int(each * shape.numel())
    return sizes


@torch.no_grad()
def encode_prompts(
    files: ModelFiles, prompts: Sequence[str], plan: TextEncoderPlan, reports: list[StageReport]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts through CLIP-L, CLIP-G and T5, one encoder at a time.

    The arrangement is `StableDiffusion3Pipeline.encode_prompt`'s: the CLIPs' penultimate hidden states side by side,
    padded with zeros to T5's width, followed by T5's tokens; the pooled projections side by side.

    Returns:
        prompt_embeds `(N, S, D)` and pooled_prompt_embeds `(N, P)`, float16 on the CPU.

    Raises:
        UserError: an embedding that float16 cannot hold, with its prompt.
    """
    clip_hidden, pooled = [], []
    clip_tokens = CLIPTokenizer.from_pretrained(files.component("tokenizer")).model_max_length
    for suffix, name in (("", "CLIP-L"), ("_2", "CLIP-G")):
        with memory_stage(f"encode with {name}", plan.device, reports):
            encoder = load_clip(files, f"text_encoder{suffix}", plan)
            tokenizer = CLIPTokenizer.from_pretrained(files.component(f"tokenizer{suffix}"))
            hidden, projected = rounded(encode_clip(encoder, tokenizer, prompts, clip_tokens, plan), prompts, name)
            clip_hidden.append(hidden)
            pooled.append(projected)
            del encoder

    with (
        memory_stage(f"encode with T5 ({describe_t5(plan)})", plan.device, reports),
        tensor_cores_for_wo(files, plan.t5_precision),
    ):
        tokenizer = T5TokenizerFast.from_pretrained(files.component("tokenizer_3"))
        token_ids = tokenize(tokenizer, prompts, plan.max_sequence_length)  # (N, T)
        encode_t5 = encode_t5_streamed if plan.t5_stream else encode_t5_resident
        (t5_hidden,) = rounded(zip(encode_t5(files, token_ids, plan)), prompts, "T5")

    clips = torch.cat(clip_hidden, dim=-1)  # (N, 77, D1 + D2)
    clips = torch.nn.functional.pad(clips, (0, t5_hidden.shape[-1] - clips.shape[-1]))  # (N, 77, D)
    return torch.cat([clips, t5_hidden], dim=1), torch.cat(pooled, dim=-1)


def describe_t5(plan: TextEncoderPlan) -> str:
    """The precision, and whether streamed, in words."""
    if not plan.t5_stream:
        return plan.t5_precision
    few = f", {plan.batch_size} prompt{'s'[: plan.batch_size - 1]} at a time" if plan.batch_size < BATCH_SIZE else ""
    return f"{plan.t5_precision}, one block at a time{few}"


@contextmanager
def tensor_cores_for_wo(files: ModelFiles, precision: T5Precision) -> Iterator[None]:
    """Has T5's `wo`, in float32 whatever the precision, multiplied by tensor cores where that rounds no factor.

    They round factors to TF32, a float16's ten bits in a float32's range. In 16 bits and fewer what `wo` multiplies was
    a float16 before; and so was its weight, or a bfloat16, where the model's files have it so.
    """
    files.component("text_encoder_3")  # downloaded and looked at now, if need be
    with TensorFiles(files.weight_files("text_encoder_3")) as weights:
        dtypes = weights.dtypes()
    is_exact = precision != "fp32" and all(
        dtype in ("F16", "BF16") for name, dtype in dtypes.items() if name.endswith(".wo.weight")
    )
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or is_exact
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rounded(
    batches: Iterable[Sequence[torch.Tensor]], prompts: Sequence[str], encoder: str
) -> tuple[torch.Tensor, ...]:
    """What an encoder gives, batch by batch, as float16 on the CPU.

    Args:
        batches: tensors `(B, ...)`, alike in number; they are rounded on their device, which is fast.
        prompts: N, in the batches' order.
        encoder: its name.

    Returns:
        As many tensors `(N, ...)`.

    Raises:
        UserError: as `to_float16`.
    """
    found = []
    for values in batches:
        own, prompts = prompts[: len(values[0])], prompts[len(values[0]) :]
        found.append([to_float16(each, own, encoder).cpu() for each in values])
    return tuple(torch.cat(each) for each in zip(*found, strict=True))


def to_float16(values: torch.Tensor, prompts: Sequence[str], encoder: str) -> torch.Tensor:
    """Rounds `(N, ...)` to float16, the precision of the store.

    Raises:
        UserError: a NaN, or a value that float16 would turn to infinity; names the first such prompt.
    """
    per_prompt = values.flatten(1).float().abs().amax(1)  # NaN propagates
    bad = ~(per_prompt <= _FLOAT16_MAX)
    if bad.any():
        index = int(bad.nonzero()[0])
        raise UserError(
            f"{encoder} gives {per_prompt[index]:g} for the prompt {prompts[index]!r}, which float16 cannot hold: "
            "type --t5_precision fp32, or change the prompt"
        )
    return values.to(torch.float16)


def batches(values: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """`values` in pieces of `size` rows, with a progress bar where there are several."""
    pieces = values.split(size)
    return iter(tqdm(pieces, unit="batch", leave=False, disable=len(pieces) < 4))


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
    """Token ids `(N, length)`, padded and cut to `length`; says which prompts are cut."""
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    ids = tokenizer(list(prompts), return_tensors="pt", **options).input_ids
    untruncated = tokenizer(list(prompts)).input_ids
    too_long = [prompt for prompt, found in zip(prompts, untruncated, strict=True) if len(found) > length]
    if too_long:
        shown = repr(too_long[0] if len(too_long[0]) <= 60 else too_long[0][:57] + "...")
        others = f" and {len(too_long) - 1} more prompts" if len(too_long) > 1 else ""
        print(f"note: {shown}{others} exceed {length} tokens of {type(tokenizer).__name__}; the rest is cut off")
    return ids


def load_clip(files: ModelFiles, component: str, plan: TextEncoderPlan) -> CLIPTextModelWithProjection:
    """One CLIP text encoder: on the plan's device, whole or, as T5 is streamed, one layer at a time."""
    encoder = CLIPTextModelWithProjection.from_pretrained(
        files.component(component), variant=files.config.variant, dtype=plan.clip_dtype, use_safetensors=True
    )
    if plan.t5_stream and not plan.whole_clips:
        return cpu_offload(encoder, execution_device=plan.device)
    return encoder.to(plan.device)


def encode_clip(
    encoder: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    length: int,
    plan: TextEncoderPlan,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields each batch's penultimate hidden states `(B, 77, d)` and pooled projections `(B, p)`, on the device."""
    for ids in batches(tokenize(tokenizer, prompts, length), plan.clip_batch_size):
        output = encoder(ids.to(plan.device), output_hidden_states=True)
        yield output.hidden_states[-2], output.text_embeds


def load_t5(files: ModelFiles, plan: TextEncoderPlan) -> T5EncoderModel:
    """T5's encoder, whole, on the plan's device in the plan's precision."""
    options: dict[str, Any] = {"dtype": torch.float16, "device_map": {"": plan.device}}
    if plan.t5_precision == "int8":  # LLM.int8(), arXiv 2208.07339
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif plan.t5_precision == "nf4":  # arXiv 2305.14314
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
        )
    else:
        options["dtype"] = DTYPES[plan.t5_precision]  # transformers itself keeps `wo` in fp32 under fp16
    return T5EncoderModel.from_pretrained(
        files.component("text_encoder_3"), variant=files.config.variant, use_safetensors=True, **options
    )


@torch.no_grad()
def encode_t5_resident(files: ModelFiles, token_ids: torch.Tensor, plan: TextEncoderPlan) -> Iterator[torch.Tensor]:
    """Yields the hidden states `(B, T, D)` of token ids `(N, T)`, batch by batch, on the device."""
    encoder = load_t5(files, plan)
    for ids in batches(token_ids, plan.batch_size):
        yield encoder(ids.to(plan.device))[0]


@torch.no_grad()
def encode_t5_streamed(files: ModelFiles, token_ids: torch.Tensor, plan: TextEncoderPlan) -> Iterator[torch.Tensor]:
    """T5 with half a block on the device at a time, read straight from the safetensors files.

    All prompts pass one half while the next is read, in the batches of the resident encoder, through transformers' own
    block modules: the result is the resident encoder's, bit for bit.

    Args:
        files: the model.
        token_ids: `(N, T)`.
        plan: precision fp16 or fp32, the batch size, and the device.

    Yields:
        Hidden states `(B, T, D)` on the device, in the dtype of the resident encoder's output.
    """
    dtype, device = DTYPES[plan.t5_precision], plan.device
    encoder = _empty_t5(files, dtype)
    with TensorFiles(files.weight_files("text_encoder_3")) as weights:
        is_kept = len(token_ids) <= plan.kept_prompts
        place = device if is_kept else torch.device("cpu")
        pieces = token_ids.split(plan.batch_size)
        hidden = [weights.rows("shared.weight", ids).to(place, dtype) for ids in pieces]  # (B, T, D)
        room = torch.empty(half_bytes(encoder.block), dtype=torch.uint8, device=device)
        position_bias = None  # (1, heads, T, T): made by the first block, shared by all
        halves = read_ahead(read_halves(weights, encoder.block))
        for half in tqdm(halves, desc="T5 half blocks", total=2 * len(encoder.block), leave=False):
            half.place(room)
            for i, batch in enumerate(hidden):
                states, bias, *_ = half.block(batch.to(device), attention_mask=None, position_bias=position_bias)
                position_bias = bias if position_bias is None else position_bias
                if states.dtype == batch.dtype and not is_kept:
                    batch.copy_(states)  # into memory that is there: to map pages anew takes longer than to copy
                else:
                    hidden[i] = states.to(place)
                del states
            half.leave()
        name = "final_layer_norm"
        value = weights.tensor(f"encoder.{name}.weight").to(device, dtype, copy=True)
        norm = encoder.get_submodule(name)
        norm.weight = torch.nn.Parameter(value, requires_grad=False)
        for batch in hidden:
            yield norm(batch.to(device))


@dataclass(frozen=True)
class IdentifierReport:
    """How the rarest word of a prompt falls into tokens.

    Attributes:
        word: the identifier.
        pieces: by tokenizer, its tokens.
        is_common: whether CLIP knows it as one frequent token, so that it has a meaning already.
    """

    word: str
    pieces: dict[str, list[str]]
    is_common: bool

    def sentences(self) -> list[str]:
        """What to tell the user: the tokens, and a warning where they do not serve."""
        shown = "; ".join(f"{name}: {' '.join(pieces)}" for name, pieces in self.pieces.items())
        lines = [f"identifier {self.word!r} → {shown}"]
        if self.is_common:
            lines.append(
                f"warning: {self.word!r} is a common word, whose meaning the subject would have to displace: "
                "a rare identifier such as 'sks' learns faster"
            )
        elif len(self.pieces["CLIP"]) > 3:
            lines.append(
                f"warning: {self.word!r} falls into {len(self.pieces['CLIP'])} CLIP tokens: "
                "a short rare word holds the subject better"
            )
        return lines


def report_identifier(files: ModelFiles, instance_prompt: str, class_prompt: str | None) -> IdentifierReport | None:
    """Finds the word that stands for the subject, and how it tokenizes; None for an empty prompt.

    It is the rarest word that the class prompt lacks. CLIP's byte-pair ids follow frequency (a merge learnt later is
    rarer), so more pieces, then a higher id, mean rarer.
    """
    known = set((class_prompt or "").lower().split())
    words = [w.strip(".,;:!?'\"()[]<>") for w in instance_prompt.split()]
    words = [w for w in words if w and w.lower() not in known]
    if not words:
        return None
    tokenizers = {
        "CLIP": CLIPTokenizer.from_pretrained(files.component("tokenizer")),
        "T5": T5TokenizerFast.from_pretrained(files.component("tokenizer_3")),
    }
    clip = tokenizers["CLIP"]

    def ids(word: str) -> list[int]:
        return clip(word, add_special_tokens=False).input_ids

    word = max(words, key=lambda w: (len(ids(w)), max(ids(w), default=0)))
    pieces = {name: tokenizer.tokenize(word) for name, tokenizer in tokenizers.items()}
    # Of CLIP's 49,408 tokens the first fifth holds the everyday words: dog 1,929, photo 1,125; sks is 48,136.
    is_common = len(ids(word)) == 1 and ids(word)[0] < len(clip) // 5
    return IdentifierReport(word, pieces, is_common)
