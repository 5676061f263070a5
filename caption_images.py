"""Before stage one: pictures → captions beside them (dog.txt for dog.jpg), written by a captioning model.

Captions that are there, beside a picture or in a metadata file, are never touched. Read what was written and mend it:
put the identifier into every caption, and leave out what is part of the subject.

    python caption_images.py --instance_data_dir dog --caption_prefix "a photo of sks dog, "
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.config import BudgetConfig, DeviceConfig
from sd3_lora.common.lean_imports import import_transformers, start_driver
from sd3_lora.stage_one.config import CaptioningConfig

COMMAND_LINE = CommandLine("caption_images.py", __doc__, (CaptioningConfig, DeviceConfig, BudgetConfig))
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()
    start_driver()
    import_transformers("AutoModelForImageTextToText", "AutoProcessor")

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import (
    UserError,
    command,
    counted,
    exit_code,
    first_line,
    shown,
    write_text_atomically,
)
from sd3_lora.common.config import missing_path
from sd3_lora.common.devices import choose_device, make_deterministic
from sd3_lora.common.memory import GIB, free_memory
from sd3_lora.common.progress import Progress
from sd3_lora.common.stage_report import StageReport, memory_stage
from sd3_lora.gpu.budget import BudgetTooSmall, DeviceBudget, enough_gib, open_budget
from sd3_lora.stage_one.captions import read_captions
from sd3_lora.stage_one.image_files import list_images
from sd3_lora.stage_one.images import BrokenImage, open_rgb

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

Model, Processor = Any, Any


def load_captioner(config: CaptioningConfig, device: torch.device) -> tuple[Model, Processor]:
    """The model, in float16 on a GPU and float32 on a CPU, and what prepares its inputs.

    Raises:
        UserError: there is no such model here, or it captions no pictures.
    """
    fault = missing_path(config.caption_model)
    if fault:
        raise UserError(f"--caption_model: {fault}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # No code of the model's folder is run, nor asked for.
    source = {"revision": config.revision, "cache_dir": config.cache_dir, "trust_remote_code": False}
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(config.caption_model, **source)
        model, report = AutoModelForImageTextToText.from_pretrained(
            config.caption_model, dtype=dtype, use_safetensors=True, output_loading_info=True, **source
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(
            f"--caption_model {config.caption_model} cannot be loaded ({reason}): give the folder or the hub id of a "
            "model that captions pictures, such as Salesforce/blip-image-captioning-large"
        ) from error
    require_all_tensors(config.caption_model, report)
    if not hasattr(processor, "image_processor"):
        raise UserError(f"--caption_model {config.caption_model} takes no pictures: give one that captions them")
    return model.eval(), processor


def require_all_tensors(name: str, report: Mapping[str, Any]) -> None:
    """Checks what transformers says of a model's weights; it would draw at random what the files lack.

    Args:
        name: of the model.
        report: transformers' `output_loading_info`.

    Raises:
        UserError: a tensor is missing. What is one too many is printed: models of several tasks share files.
    """
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"--caption_model {name} lacks {shown(missing)}: delete it and download it again")
    if unexpected := sorted(report["unexpected_keys"]):
        print(f"note: --caption_model {name} holds {shown(unexpected)}, which it does not use: left out")


def to_device(model: Model, device: torch.device, budget: DeviceBudget | None) -> Model:
    """The model on the device.

    Raises:
        UserError: its weights alone exceed the budget.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if budget and weights > budget.tensor_bytes:
        needed = budget.context_bytes + weights
        raise BudgetTooSmall(
            f"the captioning model needs more than {enough_gib(needed)} GiB: type a larger --vram_budget_gib, a "
            "smaller --caption_model, or --device cpu",
            needed,
        )
    return model.to(device)


@torch.no_grad()
def caption(model: Model, processor: Processor, pictures: Sequence[Image.Image], config: CaptioningConfig) -> list[str]:
    """A caption for each picture, by the likeliest words: nothing is drawn at random."""
    text = {"text": [config.caption_task] * len(pictures)} if config.caption_task else {}
    inputs = processor(images=list(pictures), return_tensors="pt", **text).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    ids = model.generate(**inputs, max_new_tokens=config.max_new_tokens, do_sample=False)
    if not hasattr(processor, "post_process_generation"):
        return [" ".join(words.split()) for words in processor.batch_decode(ids, skip_special_tokens=True)]
    # A Florence model answers a task, within marks that only its processor knows.
    answers = processor.batch_decode(ids, skip_special_tokens=False)
    parsed = [
        processor.post_process_generation(answer, task=config.caption_task, image_size=picture.size)
        for answer, picture in zip(answers, pictures, strict=True)
    ]
    return [" ".join(str(answer[config.caption_task]).split()) for answer in parsed]


def caption_all(
    model: Model, processor: Processor, paths: Sequence[Path], config: CaptioningConfig
) -> Iterator[tuple[Path, str | BrokenImage]]:
    """Each picture with its caption, or with why it does not decode; fewer at a time where memory runs out.

    Raises:
        torch.OutOfMemoryError: a single picture does not fit.
    """
    left, size = list(paths), config.caption_batch_size
    while left:
        batch, pictures = left[:size], list[tuple[Path, Image.Image]]()
        for path in batch:
            try:
                pictures.append((path, open_rgb(path)))
            except BrokenImage as error:
                yield path, error.with_traceback(None)
        try:
            captions = caption(model, processor, [picture for _, picture in pictures], config) if pictures else []
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            left, size = [path for path, _ in pictures] + left[size:], size // 2
            free_memory(model.device)
            continue
        yield from zip([path for path, _ in pictures], captions, strict=True)
        left = left[len(batch) :]


def find_uncaptioned(config: CaptioningConfig) -> dict[Path, Path]:
    """The pictures that have no caption, and the file of each that will hold one; prints how many have one.

    Raises:
        UserError: the folder is not given, holds no pictures, or has captions that cannot be read.
    """
    if config.instance_data_dir is None:
        raise UserError("which pictures? Type --instance_data_dir with the folder of your pictures")
    folder = Path(config.instance_data_dir)
    images = list_images(folder, config.recursive).images
    captions = read_captions(folder, images)
    missing = {path: caption for path, caption in caption_paths(images).items() if path not in captions}
    print(f"{counted(len(images), 'picture')} in {folder}, {len(images) - len(missing)} of them with a caption")
    return missing


def caption_paths(pictures: Sequence[Path]) -> dict[Path, Path]:
    """`dog.txt` for `dog.jpg`; `dog.jpg.txt` where there is a `dog.png` too, or both would get one caption."""
    sharing = Counter(picture.with_suffix("") for picture in pictures)
    return {
        picture: picture.with_suffix(".txt")
        if sharing[picture.with_suffix("")] == 1
        else picture.with_name(f"{picture.name}.txt")
        for picture in pictures
    }


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    config, device_config, budget_config = COMMAND_LINE.parse(argv)
    device = choose_device(device_config.device)
    if device_config.must_be_deterministic:
        make_deterministic()
    budget = open_budget(budget_config, device)
    if budget and not budget_config.plan:
        budget.cap()
    missing = find_uncaptioned(config)
    model, processor = load_captioner(config, device) if missing else (None, None)
    if budget_config.plan:
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) if model is not None else 0
        print(f"{counted(len(missing), 'caption')} to write; the model's weights take {weights / GIB:.2f} GiB")
        return
    written, broken, wordless, reports = 0, list[str](), list[str](), list[StageReport]()
    if missing:
        with memory_stage("caption pictures", device, reports):
            model = to_device(model, device, budget)
            answers = caption_all(model, processor, list(missing), config)
            for path, answer in Progress(answers, total=len(missing), desc="captions", unit="picture"):
                if isinstance(answer, BrokenImage):
                    broken.append(str(answer))
                    continue
                text = f"{config.caption_prefix}{answer}{config.caption_suffix}"
                if not text.strip():  # an empty file would stop stage one
                    wordless.append(path.name)
                    continue
                write_text_atomically(missing[path], text + "\n")
                written += 1
            del model, answers
    print(f"wrote {counted(written, 'caption')} to {config.instance_data_dir}: read them, and mend what is wrong")
    if wordless:
        print(f"note: the model has no words for {shown(wordless)}: write these captions yourself")
    if broken:
        raise UserError(
            f"{counted(len(broken), 'broken picture')} ({shown(broken)}): mend or delete what does not decode"
        )
    folders = {"instance_data_dir": config.instance_data_dir, "recursive": config.recursive}
    print("next: " + command("compute_embeddings.py", **folders))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(run, argv, "--caption_batch_size 1, a smaller --caption_model or --device cpu")


if __name__ == "__main__":
    sys.exit(main())
