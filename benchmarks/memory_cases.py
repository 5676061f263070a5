"""The rows of the memory benchmark, by set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import random_sd3
from stream_buffers import SETTINGS

EMBED, LATENTS, TRAIN, DRAW = (
    "compute_embeddings.py",
    "precompute_latents.py",
    "train_dreambooth_sd3_lora_miniature.py",
    "inference.py",
)
SIZES_PX = (512, 768, 1024)
CARDS_GIB = (2, 3, 4, 6, 8, 12, 15)
MANY_PROMPTS = 100


@dataclass(frozen=True)
class Case:
    """One run of one of the four scripts.

    Attributes:
        name: of the row.
        model: of `random_sd3.TRANSFORMERS`.
        resolution: in pixels.
        batch: pictures in a micro-batch; for `compute_embeddings.py`, prompts.
        rank: of the LoRA.
        flags: more of the script's.
        steps: optimizer steps.
        script: which of the four.
        use_8bit_adam: or AdamW in 32 bits.
        beside: components whose weights lie on the device in float32 meanwhile, as if they had been loaded too.
        largest: whether the largest of `SIZES_PX` that is not refused is to run, whatever `resolution` says.
        smallest: whether a refused budget is to be replaced by the smallest that would do, as the refusal names it.
        with_lora: whether the last row's LoRA is to be drawn with.
        exactness: against the row before it: exact, rounding or lossy.
        trick: the flag or script that makes the difference to the row before it.
        streamed: of a streamed step that is to be compared, its buffers and how many blocks stay on the device.
    """

    name: str
    model: str
    resolution: int = 1024
    batch: int = 1
    rank: int = 4
    flags: tuple[str, ...] = ()
    steps: int = 3
    script: str = TRAIN
    use_8bit_adam: bool = True
    beside: tuple[str, ...] = ()
    largest: bool = False
    smallest: bool = False
    with_lora: bool = False
    exactness: str | None = None
    trick: str = ""
    streamed: tuple[int, int] | None = None


def budget(gib: float, *more: str) -> tuple[str, ...]:
    """The flags that set a budget, and more."""
    return ("--vram_budget_gib", str(gib), *more)


NF4, ALL_BLOCKS = ("--base_precision", "nf4"), ("--gradient_checkpointing",)


def accuracy_cases() -> Iterator[Case]:
    """Three models, three resolutions, batches of 1 and 4, ranks 4 and 128; none, some and all blocks recomputed."""
    grid = itertools.product((4, 1), (4, 128), SIZES_PX, random_sd3.TRANSFORMERS)
    for number, (batch, rank, resolution, model) in enumerate(grid):
        flags = (ALL_BLOCKS, budget(30), ())[number % 3]
        yield Case("accuracy", model, resolution, batch, rank, flags)


def target_cases() -> Iterator[Case]:
    """The least memory of each model and size, exact and in 4 bits; and the steps that are to be compared.

    Where a budget is refused, the smallest that would do is taken.
    """
    yield Case("warm-up", "sd3-medium", 512)
    for resolution, gib in ((1024, 1.6), (512, 1.2)):
        for _ in range(2):  # in turns: the machine is noisy
            plain = (*ALL_BLOCKS, "--compile", "off", "--capture", "off")
            yield Case("resident, all blocks recomputed, plain", "sd3-medium", resolution, flags=plain, steps=12)
            yield Case("streamed", "sd3-medium", resolution, flags=budget(gib), steps=12, smallest=True)
        yield Case("resident, all blocks recomputed", "sd3-medium", resolution, flags=ALL_BLOCKS, steps=12)
    yield Case("16-bit base", "sd3-medium", flags=budget(5.2))
    yield Case("nf4", "sd3-medium", flags=budget(3.0, *NF4), steps=12)
    yield Case("nf4", "sd3-medium", 512, flags=budget(2.2, *NF4), steps=12)
    yield Case("streamed", "sd3.5-medium", flags=budget(2.0), smallest=True)
    yield Case("nf4", "sd3.5-medium", flags=budget(3.6, *NF4))
    bf16 = ("--mixed_precision", "bf16")
    yield Case("3 pictures, rank 128, bf16", "sd3.5-medium", batch=3, rank=128, flags=(*ALL_BLOCKS, *bf16), steps=12)
    yield Case("nf4", "sd3.5-large", flags=budget(7.5, *NF4))
    yield Case("streamed", "sd3.5-large", flags=budget(3.2))


def card_cases() -> Iterator[Case]:
    """What is predicted to fit cards as people own them: exact, and in 4 bits where that would have to be streamed."""
    for gib, model, resolution in itertools.product(CARDS_GIB, random_sd3.TRANSFORMERS, SIZES_PX):
        yield Case(f"{gib} GiB", model, resolution, flags=budget(gib, "--plan"))
        flags = budget(gib, "--base_precision", "auto", "--plan")
        yield Case(f"{gib} GiB, auto", model, resolution, flags=flags)


def card_run_cases() -> Iterator[Case]:
    """The largest size that fits each card and model, trained under the cap, 16-bit and exact; the last as on a T4."""
    for model in random_sd3.TRANSFORMERS:
        for gib in CARDS_GIB:
            yield Case(f"{gib} GiB", model, flags=budget(gib), largest=True)
        # The only fused kernel that a T4 has.
        t4 = budget(CARDS_GIB[-1], "--mixed_precision", "fp16", "--attention_kernel", "efficient")
        yield Case(f"{CARDS_GIB[-1]} GiB, as a T4", model, flags=t4, largest=True)


def ladder_cases() -> Iterator[Case]:
    """From everything in float32 at once to the least, one trick a row."""

    def row(name: str, trick: str, exactness: str, *flags: str, **words: object) -> Case:
        return Case(name, "sd3-medium", flags=flags, steps=8, trick=trick, exactness=exactness, **words)

    fp32, fp16 = ("--mixed_precision", "no"), ("--mixed_precision", "fp16")
    text = ("text_encoder", "text_encoder_2", "text_encoder_3")
    adam = {"use_8bit_adam": False}
    yield replace(row("warm-up", "", "exact"), steps=2)
    yield row("everything at once, in float32", "", "exact", *fp32, **adam, beside=(*text, "vae"))
    yield row("prompt embeddings cached", "compute_embeddings.py", "exact", *fp32, **adam, beside=("vae",))
    yield row("latents cached", "precompute_latents.py", "exact", *fp32, **adam)
    yield row("base in fp16", "--mixed_precision fp16", "rounding", *fp16, **adam)
    yield row("Adam's state in 8 bits", "--use_8bit_adam", "lossy", *fp16)
    every = str(random_sd3.TRANSFORMERS["sd3-medium"]["num_layers"])
    recomputed, streamed = ("--recompute_blocks", every), ("--stream_blocks", every)
    offloaded = ("--offload_inputs", "on", "--stream_buffers", "2")
    yield row("all blocks recomputed", " ".join(recomputed), "exact", *fp16, *recomputed)
    yield row("base in 4 bits", " ".join(NF4), "lossy", *fp16, *recomputed, *NF4)
    yield row("instead: fp16 base streamed", " ".join(streamed), "exact", *fp16, *recomputed, *streamed)
    yield row("block inputs offloaded", " ".join(offloaded[:2]), "exact", *fp16, *recomputed, *streamed, *offloaded)
    small = (*fp16, *recomputed, *streamed, *offloaded)
    yield row("512 px", "--resolution 512", "lossy", *small, resolution=512)


def text_cases() -> Iterator[Case]:
    """The text encoders: held whole, and streamed under the hardest cap; one prompt, and many long ones.

    Beside the prompts that are asked for the empty one is always encoded.
    """

    def row(name: str, *flags: str, prompts: int = 1, **words: object) -> Case:
        flags = ("--t5_precision", "fp16", *flags)
        return Case(name, "sd3-medium", flags=flags, script=EMBED, batch=prompts, **words)

    tight = ("--t5_stream", *budget(1.3))
    yield row("warm-up", "--t5_stream")
    for _ in range(2):  # in turns: the machine is noisy
        yield row("resident")
        yield row("streamed", *tight, smallest=True)
    long = ("--max_sequence_length", "256")
    yield row("streamed", *tight, *long, prompts=MANY_PROMPTS, smallest=True)
    yield row("streamed, in large batches", "--t5_stream", *long, prompts=MANY_PROMPTS)
    yield row("resident", *long, prompts=MANY_PROMPTS)


def picture_cases() -> Iterator[Case]:
    """The VAE in tiles, and whole pictures: exact, in 4 bits, streamed."""
    for gib in (2.2, 6.0):
        yield Case(f"encode within {gib} GiB", "sd3-medium", flags=budget(gib), script=LATENTS)
    for gib, more in ((5.3, ()), (3.2, NF4), (2.4, ())):
        yield Case(f"draw within {gib} GiB", "sd3-medium", flags=budget(gib, *more), script=DRAW)


def saving_cases() -> Iterator[Case]:
    """Training, with and without checkpoints, and a picture drawn with its LoRA, all under one budget."""
    flags = budget(5.6, "--mixed_precision", "fp16")
    yield Case("warm-up", "sd3-medium", flags=flags, steps=2)
    yield Case("training", "sd3-medium", flags=flags, steps=6)
    checkpoints = ("--checkpointing_steps", "2")
    yield Case("training, a checkpoint every 2 steps", "sd3-medium", flags=(*flags, *checkpoints), steps=6)
    yield Case("a validation picture", "sd3-medium", flags=flags, script=DRAW, with_lora=True)


def streaming_cases() -> Iterator[Case]:
    """A streamed step by the buffers and the blocks on the device, beside the resident one: as `stream_buffers.py`."""
    for resolution in (1024, 512):
        yield Case("resident", "sd3-medium", resolution, flags=ALL_BLOCKS, steps=12)
        count = random_sd3.TRANSFORMERS["sd3-medium"]["num_layers"]
        for buffers, staying in SETTINGS:
            flags = ("--recompute_blocks", str(count - 1), "--stream_blocks", str(count - staying))
            flags = (*flags, "--stream_buffers", str(buffers))
            yield Case("streamed", "sd3-medium", resolution, flags=flags, steps=12, streamed=(buffers, staying))


def flag_cases() -> Iterator[Case]:
    """Each trick forced by its flag, beside the step without any: what it saves and what it costs."""
    recomputed, streamed = ("--recompute_blocks", "23"), ("--stream_blocks", "24")
    yield Case("warm-up", "sd3-medium", steps=2)
    for flags in (
        (),
        ("--recompute_blocks", "12"),
        ("--recompute_blocks", "24"),
        ("--recompute_blocks", "24", "--offload_inputs", "on"),
        (*recomputed, *streamed),
        (*recomputed, *streamed, "--stream_from", "files"),
        (*recomputed, *streamed, "--stream_buffers", "2"),
        (*recomputed, *streamed, "--modulations_ahead", "off"),
        (*recomputed, "--stream_blocks", "12"),
        ("--capture", "off"),
        *(("--attention_kernel", kernel) for kernel in ("cudnn", "flash", "efficient")),
        ("--recompute_blocks", "24", "--attention_kernel", "math"),
        ("--compile", "on"),
    ):
        yield Case(" ".join(flags) or "no flag", "sd3-medium", flags=flags, steps=12)


def prediction_cases() -> Iterator[Case]:
    """What a person meets, in three models: every rung, compiled or not, dropout, batches of 1 to 4, pictures."""
    medium, medium_35, large = random_sd3.TRANSFORMERS

    def train(model: str, resolution: int, *flags: str, batch: int = 1, rank: int = 4) -> Case:
        return Case("training", model, resolution, batch, rank, flags)

    def draw(model: str, resolution: int, *flags: str) -> Case:
        steps = () if "--num_steps" in flags else ("--num_steps", "3")
        return Case("drawing", model, resolution, flags=(*flags, *steps), script=DRAW)

    every, half, compiled = ("--recompute_blocks", "24"), ("--recompute_blocks", "12"), ("--compile", "on")
    streamed = ("--recompute_blocks", "23", "--stream_blocks", "24")
    dropout = ("--lora_dropout", "0.1")
    t4 = ("--mixed_precision", "fp16", "--attention_kernel", "efficient")
    yield train(medium, 1024)
    yield train(medium, 1024, *compiled)
    yield train(medium, 1024, *dropout)
    yield train(medium, 1024, *dropout, batch=2)
    yield train(medium, 1024, batch=2)
    yield train(medium, 1024, *compiled, batch=2)
    yield train(medium, 1024, *half)
    yield train(medium, 1024, *half, *compiled)
    yield train(medium, 1024, *every)
    yield train(medium, 1024, *every, batch=4)
    yield train(medium, 1024, *every, "--offload_inputs", "on")
    yield train(medium, 1024, *every, *NF4)
    yield train(medium, 1024, *NF4)
    yield train(medium, 1024, *streamed)
    yield train(medium, 1024, *streamed, "--stream_from", "files")
    yield train(medium, 1024, "--recompute_blocks", "23", "--stream_blocks", "12")
    yield train(medium, 1024, *t4)
    yield train(medium, 1024, *half, rank=128)
    yield train(medium, 1024, *budget(7))
    yield train(medium, 512, "--mixed_precision", "no")
    yield train(medium, 512)
    yield train(medium, 512, *compiled)
    yield train(medium, 512, *compiled, batch=4)
    yield train(medium, 512, *dropout, batch=4)
    yield train(medium, 512, *NF4, batch=3)
    yield train(medium, 768, "--mixed_precision", "bf16", batch=2)
    yield draw(medium, 1024)
    yield draw(medium, 1024, "--num_images", "16", "--num_steps", "14")
    yield draw(medium, 1024, "--num_images", "8", "--batch_size", "4")
    yield draw(medium, 1024, *NF4)
    yield draw(medium, 1024, *budget(2.4))
    yield draw(medium, 512, "--num_images", "8", "--batch_size", "8")
    yield train(medium_35, 1024)
    yield train(medium_35, 1024, *compiled)
    yield train(medium_35, 1024, *every)
    yield train(medium_35, 512, *dropout, batch=2)
    yield train(medium_35, 1024, *streamed)
    yield draw(medium_35, 1024, "--num_images", "2", "--batch_size", "2")
    yield train(large, 1024, *budget(40))
    yield train(large, 512)
    yield train(large, 512, *compiled)
    yield train(large, 1024, "--recompute_blocks", "38", *NF4)
    yield train(large, 1024, "--recompute_blocks", "37", "--stream_blocks", "38")
    yield draw(large, 1024)


def clip_cases() -> Iterator[Case]:
    """A LoRA of the CLIPs beside the transformer's: the least memory, the fastest step, and the same steps without."""
    clips = ("--train_text_encoder",)
    yield Case("warm-up", "sd3-medium", 512)
    for _ in range(2):  # in turns: the machine is noisy
        for name, flags in (
            ("all blocks recomputed", ALL_BLOCKS),
            ("as planned", ()),
            ("streamed", budget(2.9)),
        ):
            yield Case(name, "sd3-medium", flags=flags, steps=12)
            yield Case(f"{name}, and the CLIPs", "sd3-medium", flags=(*flags, *clips), steps=12, smallest=True)
    yield Case("three pictures, and the CLIPs", "sd3-medium", batch=3, flags=(*ALL_BLOCKS, *clips))
    yield Case("512 px, and the CLIPs", "sd3-medium", 512, flags=(*ALL_BLOCKS, *clips))
    yield Case("all blocks recomputed, and the CLIPs", "sd3.5-medium", flags=(*ALL_BLOCKS, *clips), steps=12)
    yield Case("streamed, and the CLIPs", "sd3.5-large", flags=(*budget(4.5), *clips), smallest=True)


def full_cases() -> Iterator[Case]:
    """The whole transformer under the smallest budgets, recomputed or not, and with gradients kept; and streamed."""
    whole = ("--full", "--mixed_precision", "bf16")
    yield Case("warm-up", "sd3-medium", 512, flags=whole)
    for model, gib in (("sd3-medium", 9.0), ("sd3.5-medium", 10.5)):
        yield Case("whole, as little as fits", model, flags=(*whole, *budget(gib)), steps=12, smallest=True)
        yield Case("whole, all blocks recomputed", model, flags=(*whole, *ALL_BLOCKS), steps=12)
        yield Case("whole", model, flags=whole, steps=12)
    window = ("--gradient_accumulation_steps", "4")
    yield Case("whole, gradients kept", "sd3-medium", flags=(*whole, *ALL_BLOCKS, *window), steps=6)
    yield Case("whole, as little as fits", "sd3.5-large", flags=(*whole, *budget(36)), smallest=True)
    for model, gib in (("sd3-medium", 4.0), ("sd3.5-medium", 4.0), ("sd3.5-large", 10.0)):
        yield Case("whole, streamed", model, flags=(*whole, *budget(gib)), steps=12, smallest=True)


SETS: dict[str, Callable[[], Iterator[Case]]] = {
    "predictions": prediction_cases,
    "flags": flag_cases,
    "accuracy": accuracy_cases,
    "targets": target_cases,
    "pictures": picture_cases,
    "cards": card_cases,
    "cards_run": card_run_cases,
    "ladder": ladder_cases,
    "text": text_cases,
    "saving": saving_cases,
    "clips": clip_cases,
    "full": full_cases,
    "streaming": streaming_cases,
}
