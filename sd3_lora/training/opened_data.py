"""The data of a run, opened: stage one's artefacts and the class pictures checked, made where they are missing, read,
and dealt out in micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sd3_lora.common.defaults import DEFAULT_SEQUENCE_LENGTH
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.run_locks import reading_in, wait_for_writer
from sd3_lora.stage_one.crop_boxes import size_of_variant
from sd3_lora.stage_one.data_sets import with_folder
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.prompts import read_prompts
from sd3_lora.training.artefacts import StageOne
from sd3_lora.training.class_images import ClassImages
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.crops import choose_crops, require_masks
from sd3_lora.training.data_flags import DataConfig
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.encoder_dropout import EncoderDropout
from sd3_lora.training.flow import load_noise_table
from sd3_lora.training.identifier_start import IdentifierStart
from sd3_lora.training.micro_batches import InputSampler, MicroBatches
from sd3_lora.training.pool import with_class_pool
from sd3_lora.training.prior_prompts import PriorPrompts
from sd3_lora.training.stage_one_request import StageOneRequest
from sd3_lora.training.state import Training
from sd3_lora.training.watch_flags import WatchFlags

import torch
from accelerate import Accelerator


def with_pictures(flags: TrainingFlags, accelerator: Accelerator) -> TrainingFlags:
    """The flags with a folder in place of a data set, which rank 0 lays out where that was not done yet."""
    with accelerator.main_process_first():
        return replace(flags, data=with_folder(flags.data, flags.model.cache_dir))


def stage_one_request(flags: TrainingFlags, files: ModelFiles, resolution: int) -> StageOneRequest:
    """What is asked of stage one."""
    return StageOneRequest(
        flags.data,
        flags.model,
        files,
        resolution,
        flags.device.device,
        flags.prior,
        flags.budget,
        flags.run.seed or 0,
        flags.watch.stage_one_flags(),
    )


def validation_prompts(watch: WatchFlags) -> tuple[str, ...]:
    """The distinct prompts whose embeddings are needed to draw while training, the negative one last."""
    prompts = list(watch.validation_prompt)
    if watch.validation_prompts_file is not None:
        prompts += read_prompts(Path(watch.validation_prompts_file))
    return (*dict.fromkeys(prompts), watch.validation_negative_prompt) if prompts else ()


def text_tokens_of(data: DataConfig, files: ModelFiles) -> int:
    """The tokens of a prompt, before the data is opened: by the flag, by the embeddings file, or by default."""
    length = data.max_sequence_length
    if length is None and Path(data.data_df_path).is_file():
        with EmbeddingStore(Path(data.data_df_path)) as store:
            length = store.provenance.size
    return files.clip_tokens() + (length or DEFAULT_SEQUENCE_LENGTH)


def open_data(
    request: StageOneRequest,
    prompts: Sequence[str],
    accelerator: Accelerator,
    trains_clips: bool,
    identifier: IdentifierStart | None,
    locks: ExitStack,
) -> TrainingData:
    """Stage one's artefacts, checked against the flags; what is missing of them and of class pictures is made.

    Where another run is writing them, waits for its end.
    """
    stage_one = StageOne(request)
    class_images = ClassImages(stage_one)
    if accelerator.num_processes == 1 and stage_one.lacks_embeddings():
        stage_one.make_embeddings()
    wait_for_writer(Path(request.data.data_df_path))
    store = stage_one.open_embeddings()
    class_images.require_folders(store)
    stage_one.require_embedded(store, prompts)
    prior_prompts = stage_one.prior_prompts(store)
    if accelerator.is_main_process and not stage_one.has_latents():
        stage_one.make_latents()
    locks.enter_context(reading_in(Path(request.data.latents_path)))
    accelerator.wait_for_everyone()
    cache = stage_one.open_latents()
    images = stage_one.find_images(store, cache)
    variants = choose_crops(request, images, cache)
    sizes = Counter(size_of_variant(variants[image.image_id][0]) for image in images for _ in range(image.repeats))
    if accelerator.num_processes > 1:
        class_images.require(sizes)
    if accelerator.is_main_process:
        class_images.make(sizes)
    accelerator.wait_for_everyone()
    others = class_images.find(images, sizes, cache)
    pools = with_class_pool(images, others, request.prior.prior_loss_weight)
    require_masks(request, images, variants, cache)
    variants |= choose_crops(request, others, cache)
    tokens: dict[str, torch.Tensor] = {}
    if trains_clips:
        from sd3_lora.stage_one.text_encoders import clip_token_ids  # imports all of transformers' encoders

        captions = [prompt for pool in pools for image in pool.images for prompt in image.prompts]
        if identifier:
            identifier.require_in([prompt for image in images for prompt in image.prompts])
        of_class = [*store.prompts_with_role("class"), request.prior.class_prompt or ""]
        counts = {identifier.word: identifier.count} if identifier else {}
        tokens = clip_token_ids(request.files, [*captions, "", *prior_prompts, *prompts, *of_class], counts)
    return TrainingData(pools, variants, store, cache, request.data.weight_beside_masks, prior_prompts, tokens)


def sizes_sentence(data: TrainingData, resolution: int) -> str:
    """How many pictures there are, and in which shapes."""
    counts = Counter(map(str, data.sizes))
    shapes = ", ".join(f"{count} of {size}" for size, count in sorted(counts.items()))
    return f"{data.counted()} at {resolution} px" + (f" ({shapes})" if len(counts) > 1 else "")


def make_batches(
    training: Training, data: TrainingData, files: ModelFiles, flags: TrainingFlags, device: torch.device
) -> MicroBatches:
    """The run's micro-batches; one more is drawn early where modulations are computed ahead."""
    table = load_noise_table(files.read_scheduler_config(), flags.flow.timestep_shift)
    prior = None
    if data.prior_prompts:
        tokens = [data.clip_tokens[prompt] for prompt in data.prior_prompts] if data.clip_tokens else ()
        prior = PriorPrompts(data.prior_embeddings(), flags.prior.share, tokens)
    vae_config, dtype = files.read_config("vae"), training.model.dtype
    taken = training.step * flags.run.gradient_accumulation_steps
    clips = training.model.clips
    sampler = InputSampler(training.draws, vae_config, table, flags.flow, dtype, device, prior, taken, clips)
    early = 2 if training.ahead else 1
    asked = flags.data
    encoder_dropout = EncoderDropout.of(files, asked.clip_l_dropout, asked.clip_g_dropout, asked.t5_dropout)
    return MicroBatches(training.order, data, sampler, early, asked.caption_dropout, encoder_dropout)
